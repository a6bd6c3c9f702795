"""Systems with a unit lower triangular matrix, by matmuls.

Forward substitution on blocks instead of rows: two inverted diagonal blocks X1, X2 of I + L are
joined by ``-X2 L21 X1`` into the inverse of a block twice as large. Every product is one that
substitution forms as well, and so the error does not grow with the powers of L. Squaring the
nilpotent part, the other matmul-only way, forms those powers: with keys of correlation 0.5 no digit
of float32 is left (tests/test_triangular.py shows both).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Up to this size, all blocks of a diagonal block are joined at once, by products of the whole of it:
# wasted zeros cost less than matmuls of two rows.
_BASE = 16

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def unit_lower_inverse(L: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
  """``(I + L)^-1`` for strictly lower triangular ``L`` with C a power of two.

  Only the strictly lower part of ``L`` is meant; its diagonal and upper part must be zero.
  """
  lead, C = L.shape[:-2], L.shape[-1]
  if C & (C - 1):
    raise ValueError(f"the size of the matrix must be a power of two; got {C}")

  def diagonal(x, size, down=0):
    """Blocks [..., n, size, size] on the diagonal of x, or ``down`` rows below it."""
    return jnp.stack([x[..., i + down : i + down + size, i : i + size] for i in starts], axis=-3)

  size = min(C, _BASE)
  starts = range(0, C, size)
  block = diagonal(L, size)
  X = jnp.eye(size, dtype=L.dtype)
  row, col = jnp.arange(size)[:, None], jnp.arange(size)
  h = 1
  while h < size:  # X holds the inverses of blocks of size h
    joint = (row // (2 * h) == col // (2 * h)) & (row % (2 * h) >= h) & (col % (2 * h) < h)
    between = jnp.where(joint, block, 0)
    X = X - between if h == 1 else X - _dot(_dot(X, between), X)
    h *= 2
  X = jnp.broadcast_to(X, block.shape)
  while h < C:
    starts = range(0, C, 2 * h)
    first, second = X[..., 0::2, :, :], X[..., 1::2, :, :]
    corner = -_dot(_dot(second, diagonal(L, h, down=h)), first)
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    X = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
    h *= 2
  return X.reshape(*lead, C, C)


@jax.custom_vjp
def unit_lower_solve(
  L: Float[Array, "... C C"], R: Float[Array, "... C D"]
) -> Float[Array, "... C D"]:
  """``Y = (I + L)^-1 R`` for ``L`` as in ``unit_lower_inverse``.

  Its gradients are ``dR = (I + L)^-T dY`` and ``dL = -dR Y^T``: two matmuls, where differentiating
  the inverse itself takes four.
  """
  return _dot(unit_lower_inverse(L), R)


def _forward(L, R):
  X = unit_lower_inverse(L)
  Y = _dot(X, R)
  return Y, (X, Y)


def _backward(residuals, dY):
  X, Y = residuals
  dR = _dot(jnp.swapaxes(X, -1, -2), dY)
  return -jnp.tril(_dot(dR, jnp.swapaxes(Y, -1, -2)), -1), dR


unit_lower_solve.defvjp(_forward, _backward)
