"""2-simplicial attention against its equation, pair by pair, and where it is softmax attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from attnlab.mixers import configure, mixer
from attnlab.mixers.base import Layer

B, T, H, G, K, V = 2, 19, 4, 2, 6, 5
W1, W2 = 7, 4
IDS = np.array([[4] * 8 + [2] * 1 + [4] * 10, [1] * 19])
AT = np.arange(T)


def same_run(ids):
  """[B, T, T]: no change of ids between two tokens."""
  runs = np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)
  return runs[:, :, None] == runs[:, None]


def near(window):
  """[B, T, T]: the keys of a token's document in its window."""
  apart = AT[:, None] - AT
  return same_run(IDS) & (apart >= 0) & (apart < window)


def equation(q, k, v, k2, v2):
  """All logits [B, T, T, T] of a head at once."""
  out = []
  for h in range(H):
    g = h // (H // G)
    logits = jnp.einsum("btc,bjc,bmc->btjm", q[:, :, h], k[:, :, g], k2[:, :, g]) * K**-0.5
    logits = jnp.where(near(W1)[..., None] & near(W2)[:, :, None], logits, -jnp.inf)
    p = jax.nn.softmax(logits.reshape(B, T, -1), axis=-1).reshape(logits.shape)
    out.append(jnp.einsum("btjm,bjc,bmc->btc", p, v[:, :, g], v2[:, :, g]))
  return jnp.stack(out, axis=2)


def ours(q, k, v, k2, v2):
  apart = AT[:, None] - np.arange(W2)
  seen = np.take_along_axis(same_run(IDS), np.maximum(apart, 0)[None].repeat(B, 0), axis=2)
  seen = jnp.asarray(seen & (apart >= 0))
  k2, v2 = (jnp.pad(x, ((0, 0), (W2 - 1, 0), (0, 0), (0, 0))) for x in (k2, v2))
  return pk.simplicial_attention(q, k, v, k2, v2, seen, window=W1, segment_ids=jnp.asarray(IDS))


def inputs(size=1.0):
  rng = np.random.default_rng(0)
  shapes = (H, K), (G, K), (G, V), (G, K), (G, V), (H, V)
  q, *rest = (rng.standard_normal((B, T, *s)) for s in shapes)
  return size * q, *rest


def with_gradients(f, args, do):
  out, pull = jax.vjp(f, *args)
  return out, *pull(jnp.asarray(do, out.dtype))


NAMES = ("o", "dq", "dk", "dv", "dk2", "dv2")


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_is_the_equation(size):
  """In float64, so rounding alone: 1e-11 of the largest, and logits of some hundreds at size 30 add two digits."""
  *args, do = inputs(size)
  with jax.enable_x64(True):
    got, want = (jax.jit(lambda *a: with_gradients(f, a, do))(*args) for f in (ours, equation))  # noqa: B023
  for x, y, name in zip(got, want, NAMES, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * size * np.abs(y).max(), err_msg=name)


def test_in_bfloat16():
  """Inputs are rounded for both; what remains is q * k2, a part's output and its gradient, 2^-9 of each: 2 %."""
  *args, do = inputs()
  args = [jnp.asarray(x, jnp.bfloat16) for x in args]
  got = jax.jit(lambda *a: with_gradients(ours, a, do))(*args)
  exact = [np.asarray(x, np.float64) for x in args]
  with jax.enable_x64(True):
    want = jax.jit(lambda *a: with_gradients(equation, a, do))(*exact)
  for x, y, name in zip(got, want, NAMES, strict=True):
    assert x.dtype == jnp.bfloat16
    x, y = np.asarray(x, np.float64).ravel(), np.asarray(y).ravel()
    assert np.linalg.norm(x - y) < 0.02 * np.linalg.norm(y), name
    assert x @ y > 0.9995 * np.linalg.norm(x) * np.linalg.norm(y), name


def test_with_one_second_it_is_softmax_attention():
  """The query's own token, whose key and value are ones."""
  q, k, v, *_ = inputs()
  k2, v2 = np.ones_like(k), np.ones_like(v)
  want, _ = pk.softmax_attention(q, k, v, window=W1)
  got = pk.simplicial_attention(q, k, v, k2, v2, jnp.ones((B, T, 1), bool), window=W1)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [3, 9, 40])
def test_flops_are_of_the_pairs(length):
  cls = mixer("simplicial")
  settings = dict(num_heads=2, head_dim=8, window=7, second_window=4)
  layer = cls(configure(cls, settings), Layer(32), jax.random.key(0))
  pairs = [min(t, 7) * min(t, 4) for t in range(1, length + 1)]
  assert layer.core_flops(length, decode=True) == 4 * 2 * 8 * pairs[-1]
  assert layer.core_flops(length, decode=False) == pytest.approx(4 * 2 * 8 * np.mean(pairs))
