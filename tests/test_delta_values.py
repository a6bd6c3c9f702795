"""delta_values against its equation, token by token, and what attention to an earlier call's tokens adds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

B, T, H, K, V = 2, 21, 2, 6, 5
IDS = np.array([[4] * 9 + [2] * 1 + [4] * 11, [1] * 21])


def equation(w, k, v, beta, ids):
  """``u_t = v_t - beta_t sum_{i < t} softmax_i(w_t . k_i / sqrt(K)) u_i`` over a document's tokens."""
  u = []
  for t in range(w.shape[1]):
    left = v[:, t]
    if t:
      # What ends between two tokens ends the document, whatever the ids after it.
      same = np.cumprod((ids[:, t : t + 1] == ids[:, :t])[:, ::-1], axis=1)[:, ::-1] > 0
      logits = jnp.einsum("bhk,bshk->bhs", w[:, t], k[:, :t]) * w.shape[-1] ** -0.5
      logits = jnp.where(same[:, None], logits, -1e30)
      p = jax.nn.softmax(logits, axis=-1) * same.any(1)[:, None, None]
      left = left - beta[:, t, :, None] * jnp.einsum("bhs,bshv->bhv", p, jnp.stack(u, axis=1))
    u.append(left)
  return jnp.stack(u, axis=1)


def inputs(correlation=0.0, size=1.0):
  """w, k, v, beta and the cotangent. Keys share a part where they are correlated."""
  rng = np.random.default_rng(0)
  w, k, v, du = (rng.standard_normal((B, T, H, n)) for n in (K, K, V, V))
  k = correlation**0.5 * rng.standard_normal(k[:, :1].shape) + (1 - correlation) ** 0.5 * k
  return size * w, k, v, rng.uniform(0, 1.5, (B, T, H)), du


def with_gradients(f, args, du):
  out, pull = jax.vjp(f, *args)
  return out, *pull(jnp.asarray(du, out.dtype))


@functools.cache
def wanted(correlation, size):
  *args, du = inputs(correlation, size)
  f = jax.jit(lambda *a: with_gradients(lambda *b: equation(*b, IDS), a, du))
  with jax.enable_x64(True):
    return jax.tree.map(np.asarray, f(*args))


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("correlation, size", [(0.0, 1.0), (0.9, 1.0), (0.0, 30.0)])
def test_is_the_equation(chunk, correlation, size):
  """Of whole chunks and of part of one, in float64, so rounding alone: 1e-11 of the largest, to which logits of up to
  a hundred add two digits at size 30."""
  *args, du = inputs(correlation, size)
  f = functools.partial(pk.delta_values, segment_ids=jnp.asarray(IDS), chunk_size=chunk)
  with jax.enable_x64(True):
    got = jax.jit(lambda *a: with_gradients(f, a, du))(*args)
  for x, y, name in zip(
    got, wanted(correlation, size), ("u", "dw", "dk", "dv", "dbeta"), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * size * np.abs(y).max(), err_msg=name)


def test_in_bfloat16():
  """Inputs are rounded for both; what remains is u, rounded for each product, 2^-9 of it and twice over: 2 %."""
  *args, du = inputs()
  args = [jnp.asarray(x, jnp.bfloat16) for x in args]
  f = functools.partial(pk.delta_values, segment_ids=jnp.asarray(IDS), chunk_size=4)
  got = jax.jit(lambda *a: with_gradients(f, a, du))(*args)
  exact = [np.asarray(x, np.float64) for x in args]
  with jax.enable_x64(True):
    want = jax.jit(lambda *a: with_gradients(lambda *b: equation(*b, IDS), a, du))(*exact)
  for x, y, name in zip(got, want, ("u", "dw", "dk", "dv", "dbeta"), strict=True):
    assert x.dtype == jnp.bfloat16
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y).ravel()
    assert np.linalg.norm(x - y) < 0.02 * np.linalg.norm(y), name
    assert x @ y > 0.9995 * np.linalg.norm(x) * np.linalg.norm(y), name


@pytest.mark.parametrize("at", [1, 8])
def test_goes_on(at):
  """A call's first tokens, and then its others given what they read of those: the same, gradients included."""
  *args, du = inputs()

  def parts(w, k, v, beta):
    first = [x[:, :at] for x in (w, k, v, beta)]
    u = pk.delta_values(*first, chunk_size=4)
    before = pk.softmax_attention(w[:, at:], k[:, :at], u, query_positions=jnp.full(T - at, at - 1))
    rest = [x[:, at:] for x in (w, k, v, beta)]
    return jnp.concatenate([u, pk.delta_values(*rest, before=before, chunk_size=4)], axis=1)

  # softmax_attention's lse has a derivative too: a backend that lacks it would show here.
  whole = functools.partial(pk.delta_values, chunk_size=4)
  with jax.enable_x64(True):
    for x, y in zip(
      *(jax.jit(functools.partial(with_gradients, f))(args, du) for f in (parts, whole)),
      strict=True,
    ):
      np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * np.abs(y).max())
