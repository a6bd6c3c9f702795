"""Log-linear attention against its matrix, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from attnlab.errors import UserError
from attnlab.mixers import Layer, configure, mixer

B, H, K, V = 2, 2, 4, 3


def buckets(t):
  """Level and tokens of what a Fenwick tree makes of token t's past (section 3.1): b_0 = t, and each next one lacks the
  least power of two that is in it."""
  out, b = [(0, [t])], t
  while b:
    least = b & -b
    out.append((least.bit_length(), list(range(b - least, b))))
    b -= least
  return out


def test_is_the_matrix():
  """``(Q K^T * M^S * M^H) V`` (eq. 5) of documents of 1, 37 and 62 tokens; float64, so rounding alone: 1e-12."""
  lengths = (1, 37, 62)
  T = sum(lengths)
  ids = np.repeat([3, 1, 2], lengths)
  position = np.concatenate([np.arange(n) for n in lengths])
  rng = np.random.default_rng(0)
  x, C, Bs = (rng.standard_normal((B, T, H, n)) for n in (V, K, K))
  dt, weights = rng.uniform(0, 0.2, (B, T, H)), rng.standard_normal((B, T, H, 8))
  A = np.array([-0.5, -2.0])
  want = np.zeros_like(x)
  for b in range(B):
    for h in range(H):
      total = np.cumsum(dt[b, :, h] * A[h])
      for t in range(T):
        for level, tokens in buckets(int(position[t])):
          for s in t - position[t] + np.array(tokens):
            a = weights[b, t, h, level] * np.exp(total[t] - total[s]) * (C[b, t, h] @ Bs[b, s, h])
            want[b, t, h] += a * dt[b, s, h] * x[b, s, h]
  with jax.enable_x64(True):
    at = np.broadcast_to(position[None, :, None], (B, T, H)).astype(np.float64)
    segment_ids = jnp.asarray(np.broadcast_to(ids, (B, T)))
    args = x, dt, A, Bs, C, weights, at
    got, _ = jax.jit(pk.log_linear_ssd)(*args, segment_ids=segment_ids)
  np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_equal_weights_are_the_mechanism():
  """With weights of 1 the levels are Gated DeltaNet's state, in parts."""
  rng, T = np.random.default_rng(1), 45
  with jax.enable_x64(True):
    q, k, v = (rng.standard_normal((B, T, H, n)) for n in (K, K, V))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g, beta = -rng.uniform(0, 0.3, (B, T, H)), rng.uniform(0, 2, (B, T, H))
    at = np.broadcast_to(np.arange(T)[None, :, None], (B, T, H)).astype(np.float64)
    want, state = pk.gated_delta_rule(q, k, v, g, beta, return_state=True)
    args = q, k, v, g, beta, np.ones((B, T, H, 7)), at
    got, states = jax.jit(lambda *args: pk.log_linear_gated_delta_rule(*args, return_state=True))(
      *args
    )
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
  np.testing.assert_allclose(np.asarray(states).sum(axis=2), state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["log_linear_mamba2", "log_linear_gated_deltanet"])
def test_longer_than_its_levels(name):
  cls = mixer(name)
  layer = cls(configure(cls, dict(num_heads=2, head_dim=8, levels=4)), Layer(32), jax.random.key(0))
  assert layer.init_cache(1, 8)["state"].shape[2] == 4
  assert layer.init_cache(1, 3)["state"].shape[2] == 3
  with pytest.raises(UserError, match="9 tokens need levels=5; got 4"):
    layer.init_cache(1, 9)


@pytest.mark.parametrize("mechanism", ["log_linear_ssd", "log_linear_gated_delta_rule"])
def test_parts_of_rows_are_refused(mechanism):
  """A part would count its tokens' blocks from its own first one."""
  x, g = jnp.zeros((1, 4, H, K)), jnp.zeros((1, 4, H))
  args = (x, g, jnp.ones(H), x, x) if mechanism == "log_linear_ssd" else (x, x, x, g, g)
  with pytest.raises(NotImplementedError, match="rows that are whole"):
    getattr(pk, mechanism)(*args, jnp.ones((1, 4, H, 3)), g, axis_name="context")
