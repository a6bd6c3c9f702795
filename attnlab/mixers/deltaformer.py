"""DeltaFormer: softmax attention whose values leave out what is known already (arXiv:2505.19488)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import references
from attnlab.mixers.attention import append, attend, axes_of, document_ids, together
from attnlab.mixers.base import Cache, Context, Layer, MixerOutput, register
from attnlab.mixers.softmax import SoftmaxAttention
from attnlab.nn import Linear, RMSNorm
from pallas_kernels import delta_values, softmax_attention


@register(
  "deltaformer",
  family="softmax",
  paper="arXiv:2505.19488",
  title="full attention, each value less what is known by then",
  variants={"fla": dict(num_heads=4, own_w=False, beta="any", qk_norm=True)},
)
class DeltaFormer(SoftmaxAttention):
  """``u_t = v_t - beta_t sum_{i < t} softmax_i(w_t . k_i) u_i``, and attention to u for the output: the delta rule with
  all past tokens in the place of a state.

  The cache is softmax attention's, with u for v.
  """

  reference = references.deltaformer
  in_parts = False

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SoftmaxAttention.Config):
    """Attributes:
    own_w: whether w has a projection of its own; otherwise it is q.
    beta: ``sigmoid(W x + b)``, or "any" number, ``W x + b``.
    """

    own_w: bool = True
    beta: Literal["sigmoid", "any"] = "sigmoid"

  def __init__(self, config: Config, layer: Layer, key: Array):
    super().__init__(config, layer, key)
    if self.Hkv != self.H or config.sinks:
      raise UserError(
        f"mixer {self.name!r}: num_kv_heads={self.Hkv} must be num_heads={self.H}, and sinks=False"
      )
    a, b = jax.random.split(jax.random.fold_in(key, 1))
    self.w_proj = Linear(a, layer.d_model, self.H * self.K) if config.own_w else None
    normed = config.own_w and config.qk_norm
    self.w_norm = RMSNorm(self.K, layer.norm_eps) if normed else None
    self.beta_proj = Linear(b, layer.d_model, self.H, bias=jax.nn.initializers.zeros)

  def core_flops(self, length: int, decode: bool) -> float:
    """Of two attentions; the system is that of w's weights."""
    return 2 * super().core_flops(length, decode)

  def __call__(
    self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None = None
  ) -> MixerOutput:
    q, k, v = self.heads_of(x, ctx)
    w, beta = self.asked(x, q, ctx), self.beta(x)
    heads, every = ("batch", None, "heads", None), ("batch", None, "heads")
    if cache is None:
      where = together(ctx)
      run = sharding.local(
        lambda w, k, v, beta, where: delta_values(w, k, v, beta, **where),
        (heads, heads, heads, every, axes_of(where)),
        heads,
      )
      o = attend(q, k, run(w, k, v, beta, where), where)
      return MixerOutput(self.output(o, x), cache)
    # Of the cache, what its tokens are to all of the new ones.
    where = {
      "query_positions": jnp.broadcast_to(cache["length"] - 1, x.shape[1:2]),
      "segment_ids": document_ids(ctx),
      "key_segment_ids": cache["segment_ids"],
    }

    def core(w, k, v, beta, old_k, old_u, where):
      before = softmax_attention(w, old_k.astype(k.dtype), old_u.astype(v.dtype), **where)
      return delta_values(w, k, v, beta, segment_ids=where["segment_ids"], before=before)

    axes = (heads, heads, heads, every, heads, heads, axes_of(where))
    u = sharding.local(core, axes, heads)(w, k, v, beta, cache["k"], cache["v"], where)
    cache, where = append(cache, {"k": k, "v": u}, ctx)
    return MixerOutput(self.output(attend(q, cache["k"], cache["v"], where), x), cache)

  def asked(self, x: Float[Array, "B T D"], q: Array, ctx: Context) -> Float[Array, "B T H K"]:
    """w of the tokens, with norm and RoPE as q has them."""
    if self.w_proj is None:
      return q
    return self.placed(self.w_proj.to_heads(x, self.H), self.w_norm, ctx)

  def beta(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
    """How much of what is known is left out, float32."""
    beta = self.beta_proj(x).astype(jnp.float32)
    return jax.nn.sigmoid(beta) if self.config.beta == "sigmoid" else beta
