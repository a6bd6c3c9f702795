"""Rotary position embedding (RoPE, arXiv:2104.09864) of heads, also side by side as projections write them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.rope import tpu, xla
from pallas_kernels.rope.frequencies import Scaling


def rope(
  x: Float[Array, "B T H D"],
  positions: Int[Array, "B T"],
  theta: float = 10000.0,
  fraction: float = 1.0,
  scaling: Scaling | None = None,
  *,
  backend: str = "auto",
) -> Float[Array, "B T H D"]:
  """Rotates the first ``fraction`` of each head's channels by position times frequency; halves are paired.

  Channel i < n / 2 of the n that rotate makes a pair with channel i + n / 2, and turns by
  ``position * theta^(-2 i / n)``. In float32, returned in x's dtype. Differentiable in x.

  Args:
    scaling: of the frequencies (pallas_kernels/rope/frequencies.py), for texts longer than those of the first training.
    backend: "auto", "xla", "tpu" (a Pallas kernel, which reads and writes x once; for it heads come first, as for
      attention's), or "interpret": the same on any machine, slowly.

  Raises:
    NotImplementedError: a backend that was named cannot serve the call.
  """
  T, D = x.shape[1], x.shape[3]
  rotated = _rotated(D, fraction)
  name = dispatch.xla_or_tpu(backend, x.dtype, lambda: tpu.supports(x.dtype, T, D, D, rotated))
  if name == "xla" or not rotated:
    return xla.rotate(x, positions, theta, rotated, scaling)
  x = jnp.swapaxes(x, 1, 2)
  y = tpu.rotate(x, positions, D, theta, rotated, scaling, name == "interpret")
  return jnp.swapaxes(y, 1, 2)


def rope_heads(
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  size: int,
  theta: float = 10000.0,
  fraction: float = 1.0,
  scaling: Scaling | None = None,
  *,
  backend: str = "auto",
) -> Float[Array, "B T D"]:
  """``rope`` of heads of ``size`` channels side by side, as linear mechanisms' kernels take them.

  Raises:
    ValueError: heads of ``size`` channels do not make D.
    NotImplementedError: a backend that was named cannot serve the call.
  """
  B, T, D = x.shape
  if D % size:
    raise ValueError(f"{D} channels are no whole number of heads of {size}")
  rotated = _rotated(size, fraction)
  name = dispatch.xla_or_tpu(backend, x.dtype, lambda: tpu.supports(x.dtype, T, D, size, rotated))
  if name == "xla" or not rotated:
    heads = x.reshape(B, T, -1, size)
    return xla.rotate(heads, positions, theta, rotated, scaling).reshape(x.shape)
  return tpu.rotate(x[:, None], positions, size, theta, rotated, scaling, name == "interpret")[:, 0]


def _rotated(size: int, fraction: float) -> int:
  """How many of a head's channels rotate: pairs."""
  return int(size * fraction) // 2 * 2
