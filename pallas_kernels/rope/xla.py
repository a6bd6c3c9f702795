"""RoPE in plain XLA."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.rope.frequencies import Scaling, scaled


def angles(
  positions: Int[Array, "B T"], theta: float, rotated: int, scaling: Scaling | None = None
) -> Float[Array, "B T {rotated}//2"]:
  """By how much each pair of channels turns, in radians."""
  if scaling is None:
    frequency = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
  else:
    frequency = jnp.asarray(scaled(theta, rotated, scaling))
  return positions[..., None].astype(jnp.float32) * frequency


def rotate(
  x: Float[Array, "B T H D"],
  positions: Int[Array, "B T"],
  theta: float,
  rotated: int,
  scaling: Scaling | None = None,
) -> Float[Array, "B T H D"]:
  """Turns the first ``rotated`` channels of each head."""
  if not rotated:
    return x
  angle = angles(positions, theta, rotated, scaling)[:, :, None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return jnp.concatenate([turned.astype(x.dtype), x[..., rotated:]], axis=-1)
