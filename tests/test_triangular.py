"""Unit lower triangular systems: accuracy where keys are correlated, and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_recurrence.triangular import unit_lower_inverse, unit_lower_solve


def chunk(rho, beta, C=64, K=128, seed=0):
  """``beta tril(k k^T, -1)`` in float64, for unit keys of correlation rho: what a chunk inverts."""
  rng = np.random.default_rng(seed)
  k = np.sqrt(1 - rho) * rng.normal(size=(C, K)) + np.sqrt(rho) * rng.normal(size=(1, K))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  return beta * np.tril(k @ k.T, -1), rng.normal(size=(C, K))


solve = jax.jit(unit_lower_solve)
inverse = jax.jit(unit_lower_inverse)


def relative(got, want):
  return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@jax.jit
def by_powers(L):
  """The other way with matmuls alone: (I - L)(I + L^2)(I + L^4)..., as L^C is 0."""
  X, power = jnp.eye(L.shape[-1], dtype=L.dtype) - L, L @ L
  for _ in range(L.shape[-1].bit_length() - 2):
    X, power = X + X @ power, power @ power
  return X


@pytest.mark.parametrize("rho, beta", itertools.product((0.0, 0.5, 0.9), (1.0, 1.9)))
def test_accurate_for_correlated_keys(rho, beta):
  """In float32 against numpy's float64 solution of the same float32 matrix.

  Substitution loses a few roundings (2^-24 = 6e-8) a row, whatever the keys; sums of powers, exact
  on paper, lose everything: their terms reach 1e16 and cancel.
  """
  L, v = (x.astype(np.float32) for x in chunk(rho, beta))
  want = np.linalg.solve(np.eye(64) + L.astype(np.float64), v.astype(np.float64))
  assert relative(solve(L, v), want) < 2e-6
  assert relative(inverse(L) @ v, want) < 2e-6
  powers = relative(by_powers(L) @ v, want)
  if rho == 0 and beta == 1:
    assert powers < 1e-6
  else:
    assert powers > {0.0: 1e-7, 0.5: 1e-4, 0.9: 1e5}[rho]


def test_powers_do_not_grow_in_the_whole_chunk():
  """The same with chunks of 128 and 256, where powers are infinite."""
  for C in (128, 256):
    L, v = (x.astype(np.float32) for x in chunk(0.9, 1.9, C=C))
    want = np.linalg.solve(np.eye(C) + L.astype(np.float64), v.astype(np.float64))
    assert relative(solve(L, v), want) < 1e-5
    assert not relative(by_powers(L) @ v, want) < 1e5


@pytest.mark.parametrize("C", [1, 2, 8, 16, 64])
def test_every_size_and_gradients(C):
  """In float64, with leading axes: the inverse, the solution and both gradients, against JAX's."""
  with jax.enable_x64(True):
    systems = [chunk(0.5, 1.5, C, 5, seed) for seed in range(6)]
    L, R = (np.stack(x).reshape(2, 3, *x[0].shape) for x in zip(*systems, strict=True))
    eye = np.eye(C)
    np.testing.assert_allclose(inverse(L) @ (eye + L), eye + 0 * L, atol=1e-12)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, L, R):
      Y, vjp = jax.vjp(lambda L, R: f(jnp.tril(L, -1), R), L, R)
      return Y, vjp(jnp.cos(Y))

    def library(L, R):
      return jax.scipy.linalg.solve_triangular(eye + L, R, lower=True, unit_diagonal=True)

    got, want = run(unit_lower_solve, L, R), run(library, L, R)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-11), got, want)


def test_only_powers_of_two():
  with pytest.raises(ValueError, match="power of two; got 48"):
    unit_lower_inverse(jnp.zeros((48, 48)))
