"""InfLLM-V2's LSE approximation against its equation, written out token by token in numpy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.mixers import Context, Layer, configure, mixer

D, H, HKV, K, T = 16, 4, 2, 8, 27
SETTINGS = dict(
  num_heads=H, num_kv_heads=HKV, head_dim=K, rope_fraction=0.0,
  block_size=4, top_k=4, pool_size=4, pool_stride=2, initial=1, local=1,
)  # fmt: skip


def make(coarse_size=None):
  cls = mixer("infllm2")
  config = configure(cls, SETTINGS | {"coarse_size": coarse_size})
  layer = cls(config, Layer(D), jax.random.key(0))
  # Keys far enough from each other that means of more tokens are others.
  layer.k_proj.kernel[...] = 4 * layer.k_proj.kernel[...]
  return layer


def read(layer, x, pieces):
  """Outputs of x in pieces, from an empty cache; in one, without."""
  step = jax.jit(lambda layer, x, ctx, cache: layer(x, ctx, cache))
  cache, at, out = (layer.init_cache(1, T) if len(pieces) > 1 else None), 0, []
  for n in pieces:
    got = step(layer, x[:, at : at + n], Context(at + jnp.arange(n)[None]), cache)
    cache, at = got.cache, at + n
    out.append(np.asarray(got.y))
  return np.concatenate(out, axis=1)


def equation(layer, x, coarse_size):
  """arXiv:2509.24663, section 3.2; the normaliser from means over ``coarse_size`` tokens, one each half of it."""
  kernel = lambda name: np.asarray(getattr(layer, name).kernel[...], np.float64)  # noqa: E731
  q, k, v = ((x @ kernel(f"{n}_proj")).reshape(T, -1, K) for n in "qkv")
  o, half = np.zeros((T, H, K)), (coarse_size or 0) // 2
  for t, g in np.ndindex(T, HKV):
    now, group = t // 4, range(g * (H // HKV), (g + 1) * (H // HKV))
    starts = range(0, t + 1 - 3, 2)
    fine = np.array([k[i : i + 4, g].mean(axis=0) for i in starts]).reshape(-1, K)
    ends = range(coarse_size, t + 2, half) if half else ()
    coarse = np.array([k[e - coarse_size : e, g].mean(axis=0) for e in ends]).reshape(-1, K)
    exp = lambda keys, h, t=t: np.exp(keys @ q[t, h] / np.sqrt(K))  # noqa: E731
    weight = sum(exp(fine, h) / exp(coarse if len(coarse) else fine, h).sum() for h in group)
    score = {}
    for j in range(1, now):
      score[j] = max(
        w for i, w in zip(starts, weight, strict=True) if i < 4 * j + 4 and i + 4 > 4 * j
      )
    best = sorted(score, key=lambda j: (-score[j], j))[:2]
    seen = [s for j in sorted({0, now, *best}) for s in range(4 * j, 4 * j + 4) if s <= t]
    for h in group:
      p = np.exp(k[seen, g] @ q[t, h] / np.sqrt(K))
      o[t, h] = p @ v[seen, g] / p.sum()
  return o.reshape(T, -1) @ kernel("out_proj")


@pytest.mark.parametrize("coarse_size", [None, 8])
def test_equation(coarse_size):
  """Whole and in pieces, behind a cache (float32 sums of dozens of terms: 2e-5)."""
  layer = make(coarse_size)
  x = np.random.default_rng(1).normal(size=(1, T, D)).astype(np.float32)
  want = equation(layer, x[0].astype(np.float64), coarse_size)
  for pieces in ([T], [7, 1, 7, 1, 11]):
    np.testing.assert_allclose(read(layer, x, pieces)[0], want, rtol=2e-5, atol=2e-5)
  if coarse_size:  # some query chooses other blocks than without
    assert np.abs(want - equation(layer, x[0].astype(np.float64), None)).max() > 1e-3


def test_a_coarse_size_that_does_not_fit():
  with pytest.raises(UserError, match="coarse_size=6"):
    make(6)
