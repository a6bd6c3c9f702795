"""Full softmax attention (arXiv:1706.03762), with what models have added to it."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import references
from attnlab.mixers.attention import Where, append, attend, gated, new_cache, together
from attnlab.mixers.base import Cache, Context, Layer, Mixer, MixerOutput, register
from attnlab.nn import Linear, RMSNorm, param, rope
from attnlab.settings import Fraction, RopeScaling


@register(
  "softmax",
  family="softmax",
  paper="arXiv:1706.03762",
  title="full attention, RoPE; grouped heads, gates, sinks",
  variants={
    "gqa": dict(
      num_heads=4, num_kv_heads=2, rope_fraction=0.5, qk_norm=True, output_gate="element"
    ),
    "llama3": dict(rope_scaling=("llama3", 8.0, 32, 1.0, 4.0)),
    "mqa_nope": dict(num_kv_heads=1, rope_fraction=0.0, output_gate="head"),
    "sinks": dict(sinks=True),
  },
)
class SoftmaxAttention(Mixer):
  """Multi-head, grouped-query (arXiv:2305.13245) or multi-query attention (arXiv:1911.02150)."""

  reference = references.softmax_attention
  in_parts = True

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Settings of softmax attention.

    Attributes:
      num_heads: of the queries; None: ``d_model / head_dim``.
      head_dim: channels of a head.
      num_kv_heads: of keys and values, which num_heads / num_kv_heads query heads share; None: num_heads.
      rope_fraction: how much of each head RoPE (arXiv:2104.09864) rotates; 0: no position encoding.
      rope_theta: its base.
      rope_scaling: of its frequencies, for texts longer than those of the first training: ("llama3" or "yarn", factor,
        length of those, and the turns within it below and above which a pair is wholly changed or kept)
        (pallas_kernels/rope/frequencies.py); None: none. YaRN's factor on logits (arXiv:2309.00071, eq. 22) is not in
        it: in a model that is read (attnlab.hf) it is in the weights.
      qk_norm: RMSNorm of each head's q and k (arXiv:2302.05442), before RoPE.
      output_gate: ``sigmoid(W_g x)`` on what attention gives (arXiv:2505.06708), a number for each "element" or "head".
      sinks: a learned logit for each head that takes its share of the softmax (gpt-oss, arXiv:2508.10925).
    """

    num_heads: int | None = None
    head_dim: int = 128
    num_kv_heads: int | None = None
    rope_fraction: Fraction = 1.0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    output_gate: Literal["none", "element", "head"] = "none"
    sinks: bool = False

  def __init__(self, config: Config, layer: Layer, key: Array):
    c, D = config, layer.d_model
    self.config = config
    self.K = c.head_dim
    self.H, self.Hkv = self.sizes(c, D)
    if self.H % self.Hkv:
      raise UserError(
        f"mixer {self.name!r}: num_heads={self.H} is not a multiple of num_kv_heads={self.Hkv}"
      )
    gates = {"none": 0, "element": self.K, "head": 1}
    keys = jax.random.split(key, 5)
    self.q_proj = Linear(keys[0], D, self.H * self.K)
    self.k_proj = Linear(keys[1], D, self.Hkv * self.K)
    self.v_proj = Linear(keys[2], D, self.Hkv * self.K)
    self.q_norm = RMSNorm(self.K, layer.norm_eps) if c.qk_norm else None
    self.k_norm = RMSNorm(self.K, layer.norm_eps) if c.qk_norm else None
    self.gate_width = gates[c.output_gate]  # numbers a head
    self.gate_proj = Linear(keys[3], D, self.H * self.gate_width) if self.gate_width else None
    zeros = jax.nn.initializers.zeros
    self.sinks = param(keys[4], zeros, (self.H,), ("heads",)) if c.sinks else None
    self.out_proj = Linear(keys[4], self.H * self.K, D, ("heads", "embed"))

  @staticmethod
  def sizes(config: Config, d_model: int) -> tuple[int, int]:
    """Heads of queries, and of keys and values."""
    heads = config.num_heads or max(1, d_model // config.head_dim)
    return heads, config.num_kv_heads or heads

  # How many positions a token sees, its own included; None: all.
  window: int | None = None

  def core_flops(self, length: int, decode: bool) -> float:
    """Of the logits and the weighted sum over the keys that a token sees."""
    w = min(self.window or length, length)
    seen = w if decode else w - w * (w - 1) / 2 / length
    return 4.0 * self.H * self.K * seen

  def init_cache(
    self, batch: int, max_len: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> Cache:
    kept = {"k": (self.Hkv, self.K), "v": (self.Hkv, self.K)}
    return new_cache(batch, max_len, kept, dtype)

  def __call__(
    self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None = None
  ) -> MixerOutput:
    q, k, v = self.heads_of(x, ctx)
    if cache is None:
      where = together(ctx)
    else:
      cache, k, v, where = self.remember(cache, k, v, ctx)
    sinks = None if self.sinks is None else sharding.put(self.sinks[...], "heads")
    o = attend(q, k, v, where, sinks=sinks, window=self.window, parts=ctx.parts)
    return MixerOutput(self.output(o, x), cache)

  def heads_of(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, Array, Array]:
    """q [B, T, H, K], k and v [B, T, Hkv, K] of the tokens, with norm and RoPE."""
    q = self.q_proj.to_heads(x, self.H)
    k, v = (project.to_heads(x, self.Hkv) for project in (self.k_proj, self.v_proj))
    return self.placed(q, self.q_norm, ctx), self.placed(k, self.k_norm, ctx), v

  def placed(
    self, y: Float[Array, "B T H K"], norm: RMSNorm | None, ctx: Context
  ) -> Float[Array, "B T H K"]:
    """Queries or keys with their norm, if there is one, and RoPE."""
    y = y if norm is None else norm(y)
    c = self.config
    return rope(y, ctx.positions, c.rope_theta, c.rope_fraction, c.rope_scaling)

  def output(self, o: Float[Array, "B T H K"], x: Float[Array, "B T D"]) -> Array:
    """What leaves the layer: the output gate, if there is one, and the projection."""
    return self.out_proj.of_heads(gated(o, x, self.gate_proj))

  def remember(
    self, cache: Cache, k: Array, v: Array, ctx: Context
  ) -> tuple[Cache, Array, Array, Where]:
    """The cache with new keys and values, and those that the new queries see."""
    cache, where = append(cache, {"k": k, "v": v}, ctx)
    return cache, cache["k"], cache["v"], where
