"""2-simplicial attention: to pairs of tokens (arXiv:2507.02754)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import references
from attnlab.mixers.attention import append_to_ring, axes_of, new_cache, own_heads, together
from attnlab.mixers.base import Cache, Context, Layer, MixerOutput, register
from attnlab.mixers.softmax import SoftmaxAttention
from attnlab.mixers.sparse import extend_tails
from attnlab.nn import Linear, RMSNorm
from attnlab.settings import Fraction
from pallas_kernels import segments, simplicial_attention


@register(
  "simplicial",
  family="softmax",
  paper="arXiv:2507.02754",
  title="2-simplicial: attention to pairs of tokens, the first and the second in a window each",
  variants={"gqa": dict(num_heads=4, num_kv_heads=2, qk_norm=True)},
)
class SimplicialAttention(SoftmaxAttention):
  """The logit of a pair is ``sum_c q_c k_c k'_c``, its value ``v * v'``; the first tokens are of the last ``window``,
  the second ones of the last ``second_window``, the query's own included.

  The cache is two rings of tokens: keys and values of both kinds.
  """

  reference = references.simplicial
  in_parts = False

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SoftmaxAttention.Config):
    """Attributes:
    rope_fraction: as softmax attention's, but 0 by default: products of three rotated vectors are of no distance.
    window: how many tokens can be the first of a pair.
    second_window: how many can be the second. The time is proportional to it.
    """

    rope_fraction: Fraction = 0.0
    window: int = 512
    second_window: int = 32

  def __init__(self, config: Config, layer: Layer, key: Array):
    super().__init__(config, layer, key)
    if config.sinks:
      raise UserError(f"mixer {self.name!r} has no sinks")
    self.window = config.window
    a, b = jax.random.split(jax.random.fold_in(key, 1))
    self.k2_proj = Linear(a, layer.d_model, self.Hkv * self.K)
    self.v2_proj = Linear(b, layer.d_model, self.Hkv * self.K)
    self.k2_norm = RMSNorm(self.K, layer.norm_eps) if config.qk_norm else None

  def core_flops(self, length: int, decode: bool) -> float:
    """Of the logits and the weighted sums, a pair each."""
    near, far = sorted(min(w, length) for w in (self.window, self.config.second_window))
    pairs = near * far
    if not decode:  # the mean over tokens of the product of how many each sees
      squares = near * (near + 1) * (2 * near + 1) / 6
      between = near * (far * (far + 1) - near * (near + 1)) / 2
      pairs = (squares + between + (length - far) * pairs) / length
    return 4.0 * self.H * self.K * pairs

  def init_cache(
    self, batch: int, max_len: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> Cache:
    kept, before = (self.Hkv, self.K), self.config.second_window - 1
    tail = jnp.zeros((batch, before, *kept), dtype)
    ids = jnp.zeros((batch, before, 1), jnp.int32)
    return {
      "first": new_cache(batch, self.window, {"k": kept, "v": kept}, dtype),
      "second": {"k": tail, "v": tail, "ids": ids},
    }

  def __call__(
    self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None = None
  ) -> MixerOutput:
    q, k, v = self.heads_of(x, ctx)
    second = dict(zip("kv", self.second_of(x, ctx), strict=True))
    if cache is None:
      where, before = together(ctx), self.config.second_window - 1
      second = {n: jnp.pad(y, ((0, 0), (before, 0), (0, 0), (0, 0))) for n, y in second.items()}
      ids = jnp.ones_like(ctx.positions)
      if ctx.segment_ids is not None:
        ids = 1 + segments.runs(ctx.segment_ids)
      ids = jnp.pad(ids, ((0, 0), (before, 0)))
    else:
      first, seen, where = append_to_ring(cache["first"], {"k": k, "v": v}, ctx)
      k, v = seen["k"], seen["v"]
      own = {"ids": where["segment_ids"][..., None]}
      second, tail = extend_tails(cache["second"], second | own)
      ids = second.pop("ids")[..., 0]
      cache = {"first": first, "second": tail}
    heads = ("batch", None, "heads", None)
    axes = (heads, *[heads] * 4, ("heads",), ("batch", None), axes_of(where))
    key_heads = jnp.arange(self.H) // (self.H // self.Hkv)
    run = sharding.local(self.core, axes, heads)
    o = run(q, k, v, second["k"], second["v"], key_heads, ids, where)
    return MixerOutput(self.output(o, x), cache)

  def second_of(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, Array]:
    """Keys and values [B, T, Hkv, K] of the tokens as the second of a pair, with norm and RoPE."""
    k, v = (project.to_heads(x, self.Hkv) for project in (self.k2_proj, self.v2_proj))
    return self.placed(k, self.k2_norm, ctx), v

  def core(self, q, k, v, k2, v2, key_heads, ids, where):
    T, before = q.shape[1], self.config.second_window - 1
    # Padding, of id 0 in a cache, is no one's second; and before the first token there is nothing.
    distances = [ids[:, before - d : before - d + T] for d in range(before + 1)]
    seen = jnp.stack([(y == distances[0]) & (y > 0) for y in distances], axis=-1)
    keys = own_heads(q, self.H // self.Hkv, key_heads, k, v, k2, v2)
    return simplicial_attention(q, *keys, seen, window=self.window, **where)
