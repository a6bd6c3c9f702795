"""Forgetting attention: softmax attention with a forget gate (FoX, arXiv:2503.02130)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import references
from attnlab.mixers.attention import append, attend, running_sum, together
from attnlab.mixers.base import Cache, Context, Layer, MixerOutput, register
from attnlab.mixers.linear import Recent, without_padding
from attnlab.mixers.softmax import SoftmaxAttention
from attnlab.nn import HeadNorm, Linear, TokenShift, expand_heads
from attnlab.settings import Fraction


@register(
  "fox",
  family="softmax",
  paper="arXiv:2503.02130",
  title="full attention with a forget gate in the place of positions",
  aliases=("forgetting",),
  variants={
    "pro": dict(qk_norm=True, kv_shift=True, output_norm=True, output_gate="element"),
    "grouped": dict(num_heads=4, num_kv_heads=2, kv_shift=True, rope_fraction=0.5),
  },
)
class ForgettingAttention(SoftmaxAttention):
  """A head's logit of a token s is ``q_t . k_s / sqrt(K) + sum_{s < r <= t} log f_r``, ``f = sigmoid(W_f x + b)``.

  The cache is softmax attention's, with the sum of ``log f`` up to each token; it is float32, whose spacing at the sum
  is what the logits are good to.
  """

  reference = references.forgetting_attention
  in_parts = True

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SoftmaxAttention.Config):
    """Settings. FoX (Pro) has qk_norm, kv_shift, output_norm and an output gate for each "element".

    Attributes:
      rope_fraction: as in softmax attention; the gate does without.
      kv_shift: a head's k and v are ``a x_{t-1} + (1 - a) x_t`` of what is projected, ``a = sigmoid(W x_t)``.
      output_norm: RMSNorm of what each head gives, before the gate.
    """

    rope_fraction: Fraction = 0.0
    kv_shift: bool = False
    output_norm: bool = False

  def __init__(self, config: Config, layer: Layer, key: Array):
    super().__init__(config, layer, key)
    if config.sinks:
      raise UserError(f"mixer {self.name!r}: sinks=True is not possible: a sink forgets nothing")
    f, k, v = jax.random.split(jax.random.fold_in(key, 1), 3)
    self.f_proj = Linear(f, layer.d_model, self.H, bias=jax.nn.initializers.zeros)
    self.shifts = ("k", "v") if config.kv_shift else ()
    for name, own in zip(self.shifts, (k, v), strict=False):
      setattr(self, f"{name}_shift", TokenShift(self.Hkv * self.K, "heads"))
      setattr(self, f"{name}_shift_proj", Linear(own, layer.d_model, self.Hkv))
    normed = config.output_norm
    self.out_norm = HeadNorm(self.H, self.K, eps=layer.norm_eps) if normed else None

  def init_cache(
    self, batch: int, max_len: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> Cache:
    cache = super().init_cache(batch, max_len, dtype)
    # log f of all tokens up to each, and up to the last
    sums = {
      "forgotten": jnp.zeros((batch, max_len, self.H, 1), jnp.float32),
      "forgotten_by_now": jnp.zeros((batch, self.H), jnp.float32),
    }
    return cache | Recent.empty(self, batch, dtype) | sums

  def __call__(
    self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None = None
  ) -> MixerOutput:
    log_f = jax.nn.log_sigmoid(self.f_proj(x).astype(jnp.float32))
    forgotten = running_sum(log_f, cache and cache["forgotten_by_now"], ctx.parts)
    q = self.placed(self.q_proj.to_heads(x, self.H), self.q_norm, ctx)
    recent = Recent(self, ctx, cache)
    k, v = self.keys_and_values(x, ctx, recent)
    if cache is None:
      where = together(ctx)
    else:
      new = {"k": k, "v": v, "forgotten": forgotten[..., None]}
      others = recent.states | {"forgotten_by_now": forgotten[:, -1]}
      if ctx.segment_ids is not None:
        others = without_padding(others, ctx.segment_ids)
      cache, where = append(cache, new, ctx)
      k, v, forgotten = cache["k"], cache["v"], cache["forgotten"][..., 0]
      cache = cache | others
    o = attend(q, k, v, where, key_bias=-forgotten, parts=ctx.parts)
    return MixerOutput(self.output(o, x), cache)

  def keys_and_values(
    self, x: Float[Array, "B T D"], ctx: Context, recent: Recent
  ) -> tuple[Array, Array]:
    """k and v [B, T, Hkv, K]."""

    def projected(name):
      y = getattr(self, f"{name}_proj")(x)
      if self.shifts:
        shift = f"{name}_shift"
        a = jax.nn.sigmoid(getattr(self, f"{shift}_proj")(x).astype(jnp.float32))
        a = expand_heads(a, self.K)
        y = (a * recent(shift, y) + (1 - a) * y).astype(x.dtype)
      return sharding.split(y, self.Hkv, self.K)

    k, v = projected("k"), projected("v")
    return self.placed(k, self.k_norm, ctx), v

  def output(self, o: Float[Array, "B T H K"], x: Float[Array, "B T D"]) -> Array:
    if self.out_norm is not None:
      o = sharding.split(self.out_norm.heads(sharding.merge(o, 2)), self.H, self.K)
    return super().output(o, x)
