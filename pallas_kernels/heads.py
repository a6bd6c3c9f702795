"""Heads that lie side by side, [..., heads * size].

A TPU lays out [B, T, heads, size] differently from [B, T, heads * size]: what takes the one view of the other's data
copies all of it, often in float32. So sums over a head, and a head's number at all of its channels, are products with a
matrix of zeros and ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sums(
  x: Float[Array, "... D"], size: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "... heads"]:
  """Sums over each head of ``size`` channels.

  Where ``dtype``, that of what x was computed from, is bfloat16, numbers may be rounded to it before they are added:
  an error of 2^-9 / sqrt(size) in a sum of squares.
  """
  precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  return jnp.matmul(x, _members(x.shape[-1] // size, size, x.dtype), precision=precision)


def expand(x: Float[Array, "... heads"], size: int) -> Float[Array, "... D"]:
  """Each head's number at all of its ``size`` channels, exactly."""
  members = _members(x.shape[-1], size, x.dtype)
  return jnp.matmul(x, members.T, precision=jax.lax.Precision.HIGHEST)


def _members(heads: int, size: int, dtype) -> Float[Array, "D heads"]:
  return jnp.repeat(jnp.eye(heads, dtype=dtype), size, axis=0)
