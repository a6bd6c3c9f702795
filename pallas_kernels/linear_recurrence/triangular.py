"""The inverse of a unit lower triangular matrix, by blocks.

Forward substitution on blocks instead of rows: (I + L) is halved until 2 x 2, and two inverted halves X1, X2 are joined
by ``-X2 L21 X1``. All of it is matmuls, every product is one that substitution forms as well, and so the error does not
grow with the powers of L. Squaring the nilpotent part, the other matmul-only way, forms those powers: at keys of
correlation 0.9 its relative error in float32 is 4e6 (tests/test_triangular.py shows both).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _inverse(L: Array) -> Array:
  n = L.shape[-1]
  if n == 1:
    return jnp.ones_like(L)
  if n == 2:
    return jnp.eye(2, dtype=L.dtype) - L
  h = n // 2
  halves = _inverse(jnp.stack([L[..., :h, :h], L[..., h:, h:]], axis=-3))
  first, second = halves[..., 0, :, :], halves[..., 1, :, :]
  corner = -_dot(_dot(second, L[..., h:, :h]), first)
  top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
  return jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)


def _dot(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def unit_lower_inverse(L: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
  """``(I + L)^-1`` for strictly lower triangular ``L`` with C a power of two.

  Only the strictly lower part of ``L`` is meant; its diagonal and upper part must be zero. Differentiable: the gradient
  is two matmuls with the inverse itself.
  """
  C = L.shape[-1]
  if C & (C - 1):
    raise ValueError(f"the size of the matrix must be a power of two; got {C}")
  return _inverse(L)


def _forward(L):
  X = unit_lower_inverse(L)
  return X, X


def _backward(X, dX):
  Xt = jnp.swapaxes(X, -1, -2)
  return (jnp.tril(-_dot(_dot(Xt, dX), Xt), -1),)


unit_lower_inverse.defvjp(_forward, _backward)
