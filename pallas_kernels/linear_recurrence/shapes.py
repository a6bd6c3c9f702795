"""The real shapes that tests, costs and benchmarks share, and inputs of those shapes."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence


@dataclasses.dataclass(frozen=True)
class Shape:
  """One recurrence as a model runs it.

  Attributes:
    heads, value_heads: of q and k, and of v.
    key_dim, value_dim: channels of a head, K and V.
    decay, erase, reads, bonus: as in ``Recurrence``.
    batch, length: B and T where none are asked for.
  """

  heads: int
  key_dim: int
  value_heads: int
  value_dim: int
  decay: Literal["none", "constant", "scalar", "channel"]
  erase: Literal["none", "key", "low_rank"] = "none"
  reads: Literal["decayed", "undecayed"] = "decayed"
  bonus: bool = False
  batch: int = 1
  length: int = 8192


SHAPES = {
  "retnet": Shape(16, 256, 16, 512, "constant"),  # RetNet 6.7B's heads, arXiv:2307.08621
  "lightning": Shape(64, 128, 64, 128, "constant"),  # MiniMax-01, arXiv:2501.08313
  "mamba2": Shape(1, 128, 80, 64, "scalar"),  # Mamba-2 2.7B, arXiv:2405.21060
  "gla": Shape(4, 256, 4, 512, "channel"),  # GLA 1.3B, arXiv:2312.06635
  "rwkv6": Shape(32, 64, 32, 64, "channel", bonus=True),  # RWKV-6 1.6B, arXiv:2404.05892
  "deltanet": Shape(16, 128, 16, 128, "none", "key"),  # DeltaNet 1.3B, arXiv:2406.06484
  "gated_deltanet": Shape(6, 256, 6, 512, "scalar", "key"),  # Gated DeltaNet 1.3B, arXiv:2412.06464
  "qwen3_next": Shape(16, 128, 32, 128, "scalar", "key"),  # Qwen3-Next 80B-A3B
  "kimi_linear": Shape(32, 128, 32, 128, "channel", "key"),  # Kimi Linear 48B-A3B, arXiv:2510.26692
  "rwkv7": Shape(
    32, 64, 32, 64, "channel", "low_rank", "undecayed"
  ),  # RWKV-7 1.5B, arXiv:2503.14456
  # At one head size, to be compared with Gated DeltaNet's and KDA's above.
  "ssd_128": Shape(16, 128, 16, 128, "scalar"),
  "gla_128": Shape(16, 128, 16, 128, "channel"),
  "rwkv7_128": Shape(16, 128, 16, 128, "channel", "low_rank", "undecayed"),
  # For a laptop: one of each kind, at one size.
  "cpu_retnet": Shape(4, 128, 4, 128, "constant", length=2048),
  "cpu_mamba2": Shape(1, 128, 4, 128, "scalar", length=2048),
  "cpu_gla": Shape(4, 128, 4, 128, "channel", length=2048),
  "cpu_deltanet": Shape(4, 128, 4, 128, "none", "key", length=2048),
  "cpu_gated_deltanet": Shape(4, 128, 4, 128, "scalar", "key", length=2048),
  "cpu_kda": Shape(4, 128, 4, 128, "channel", "key", length=2048),
  "cpu_rwkv7": Shape(4, 128, 4, 128, "channel", "low_rank", "undecayed", length=2048),
}


def inputs(
  shape: Shape,
  *,
  batch: int | None = None,
  length: int | None = None,
  dtype: jax.typing.DTypeLike = jnp.float32,
  correlation: float = 0.0,
  seed: int = 0,
) -> Recurrence:
  """Random inputs with gates as trained models have them: unit keys, decays between e^-1e-3 and e^-1, beta in (0, 1).

  Args:
    shape: of SHAPES, or any other.
    batch, length: B and T; the shape's own by default.
    dtype: of q, k, v and the vectors of a low-rank erase; gates are float32.
    correlation: between keys of one head, in [0, 1): what makes triangular systems hard.
    seed: of the numbers.
  """
  s, B, T = shape, batch or shape.batch, length or shape.length
  keys = iter(jax.random.split(jax.random.key(seed), 10))

  def normal(*size):
    return jax.random.normal(next(keys), size)

  def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  common = normal(B, 1, s.heads, s.key_dim)
  q = unit(normal(B, T, s.heads, s.key_dim)) * s.key_dim**-0.5
  own = normal(B, T, s.heads, s.key_dim)
  k = unit((1 - correlation) ** 0.5 * own + correlation**0.5 * common)
  v = normal(B, T, s.value_heads, s.value_dim)
  sizes = {"constant": (s.value_heads,), "scalar": (B, T, s.value_heads, 1)}
  sizes["channel"] = (B, T, s.value_heads, s.key_dim)
  decay = None
  if s.decay != "none":
    rate = jax.random.uniform(next(keys), sizes[s.decay], minval=jnp.log(1e-3), maxval=0.0)
    decay = -jnp.exp(rate)
  erase = None
  if s.erase == "key":
    erase = KeyErase(jax.nn.sigmoid(normal(B, T, s.value_heads)))
  elif s.erase == "low_rank":
    kappa = unit(normal(B, T, s.value_heads, s.key_dim))
    rate = jax.nn.sigmoid(normal(B, T, s.value_heads, s.key_dim))
    erase = LowRankErase((rate * kappa).astype(dtype), (-kappa).astype(dtype))
  bonus = normal(s.heads, s.key_dim) if s.bonus else None
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  return Recurrence(q, k, v, decay, erase, bonus, s.reads)
