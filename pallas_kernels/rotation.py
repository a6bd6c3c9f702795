"""Rotations that accumulate over time: the angle of a state with complex eigenvalues."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def cumulative_angle(
  turn: Float[Array, "B T H A"], starts: Bool[Array, "B T"] | None = None
) -> Float[Array, "B T H A"]:
  """Sums of angles over time modulo 2 pi, from zero again at every token where ``starts`` is set.

  An associative scan of sums that stay within one turn: the error does not grow with T, as that of a plain cumulative
  sum does.
  """
  if starts is None:
    return jax.lax.associative_scan(lambda a, b: (a + b) % (2 * jnp.pi), turn, axis=1)

  def join(a, b):
    return a[0] | b[0], jnp.where(b[0], b[1], (a[1] + b[1]) % (2 * jnp.pi))

  return jax.lax.associative_scan(join, (starts[..., None, None], turn), axis=1)[1]


def rotate(
  x: Float[Array, "... N"], angle: Float[Array, "... A"], *, interleaved: bool
) -> Float[Array, "... N"]:
  """Rotates A <= N / 2 pairs of channels by angles: (2i, 2i + 1) if interleaved, else (i, i + N / 2).

  ``x`` and ``angle`` broadcast on all axes but the last. The result has x's dtype.
  """
  half = x.shape[-1] // 2
  rest = [(0, 0)] * (angle.ndim - 1) + [(0, half - angle.shape[-1])]
  angle = jnp.pad(angle, rest)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  axis = -1 if interleaved else -2
  pairs = x.reshape(*x.shape[:-1], *((half, 2) if interleaved else (2, half)))
  first, second = jnp.moveaxis(pairs, axis, 0)
  out = jnp.stack((first * cos - second * sin, first * sin + second * cos), axis=axis)
  return out.reshape(x.shape).astype(x.dtype)
