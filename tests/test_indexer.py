"""A lightning indexer's scores against their definition, head by head and key by key in numpy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.mixers.dsa import LightningIndexer
from attnlab.mixers.indexer import chosen_weights
from pallas_kernels import dispatch
from pallas_kernels.index_scores import index_scores, tpu

B, t, h, d, N = 2, 5, 3, 4, 300


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=s) for s in ((B, t, h, d), (B, t, h), (B, N, d), (B, t, N))]


def definition(q, w, k, end):
  """Scores, and the gradients of q, w and k for a cotangent of ones times ``g``."""
  out = np.zeros((B, t, N))
  for b, i, j in np.ndindex(B, t, h):
    for s in range(end):
      out[b, i, s] += w[b, i, j] * max(q[b, i, j] @ k[b, s], 0)
  return out


def derivatives(q, w, k, g, end):
  dq, dw, dk = (np.zeros(x.shape) for x in (q, w, k))
  for b, i, j in np.ndindex(B, t, h):
    for s in range(end):
      product = q[b, i, j] @ k[b, s]
      if product > 0:
        dw[b, i, j] += g[b, i, s] * product
        dq[b, i, j] += g[b, i, s] * w[b, i, j] * k[b, s]
        dk[b, s] += g[b, i, s] * w[b, i, j] * q[b, i, j]
  return dq, dw, dk


@pytest.mark.parametrize("end", [0, 129, 256, 300])
def test_scores(monkeypatch, end):
  """In tiles of 128 keys, the last of which reaches back, up to an end anywhere."""
  monkeypatch.setattr(dispatch, "_CPU", 4 * B * t * h * 128)
  *args, g = inputs()
  with jax.enable_x64(True):

    def run(q, w, k, end):
      out = index_scores(q, w, k, end)
      return jnp.vdot(out, g), out

    gradients, out = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(*args, end)
  np.testing.assert_allclose(out, definition(*args, end), rtol=1e-12, atol=1e-12)
  for got, want in zip(gradients, derivatives(*args, g, end), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
  "dtype, bound, end",
  [("float32", 1e-6, 0), ("float32", 1e-6, 129), ("float32", 1e-6, 300), ("bfloat16", 1e-2, 256)],
)
def test_pallas_kernels(monkeypatch, end, dtype, bound):
  """In Pallas's interpreter, several tiles of queries and keys. bfloat16 rounds what is multiplied to 2^-9."""
  monkeypatch.setattr(tpu, "_ROWS", 16)
  monkeypatch.setattr(tpu, "_KEYS", 128)
  rng = np.random.default_rng(0)
  shapes = (B, 19, h, d), (B, 19, h), (B, N, d), (B, 19, N)
  *args, g = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)

  def both(args, backend):
    def run(q, w, k):
      out = index_scores(q, w, k, end, backend=backend)
      return jnp.vdot(out, g.astype(out.dtype)), out

    return jax.grad(run, (0, 1, 2), has_aux=True)(*args)

  got = both(args, "interpret")
  with jax.enable_x64(True):
    want = both([x.astype(jnp.float64) for x in args], "xla")
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y)
    assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y)


def test_bad_arguments_are_named():
  q, w, k, _ = inputs()
  with pytest.raises(ValueError, match="w must be"):
    index_scores(q, w[:, :, :2], k)
  with pytest.raises(NotImplementedError, match="needs a TPU"):
    index_scores(*(x.astype(np.float32) for x in (q, w, k)), backend="tpu")


def test_all_are_seen_where_no_end_is_given():
  *args, _ = inputs()
  np.testing.assert_array_equal(index_scores(*args), index_scores(*args, N))


def test_memory_is_of_a_tile():
  """And of the scores: not of queries by heads by keys."""
  q, w, k = (
    jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 16, 64, 64), (1, 16, 64), (1, 1 << 16, 64))
  )
  loss = lambda *args: index_scores(*args).sum()  # noqa: E731
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, w, k).compile()
  scores = 4 * 16 << 16
  assert (
    compiled.memory_analysis().temp_size_in_bytes < 4 * scores + 5 * dispatch._CPU < 64 * scores / 4
  )


def test_what_indexers_learn_from_is_not_rounded():
  """Of bfloat16 queries and keys, teacher and student are float32 throughout, as they are where all is seen: logits
  rounded to bfloat16 would be wrong by 2^-9 of themselves, and weights by as much of the logits' size."""
  rng = np.random.default_rng(3)
  H, D, S = 4, 16, 6
  q, k = (jnp.asarray(3 * rng.normal(size=s), jnp.bfloat16) for s in ((B, t, H, D), (B, N, 1, D)))
  chosen = jnp.asarray(rng.integers(0, N, (B, t, 1, S)))
  lse, nowhere = jnp.full((B, t, H), 40.0), jnp.zeros((B, t), int)
  p, _ = chosen_weights(q, k, lse, chosen, 1, nowhere, nowhere + N, 1.0)
  own = np.stack([np.asarray(k, np.float64)[b, chosen[b, :, 0], 0] for b in range(B)])
  logits = np.einsum("bthd,btsd->bhts", np.asarray(q, np.float64), own)
  want = np.exp(logits - 40).mean(axis=1)
  np.testing.assert_allclose(p[:, :, 0, :, 0], want, rtol=1e-4)

  w = jnp.asarray(rng.normal(size=(B, t, H)), jnp.float32)
  scores = LightningIndexer.scores_of_own(q, w, jnp.asarray(own, jnp.bfloat16))
  want = np.einsum("bhts,bth->bts", np.maximum(logits, 0), np.asarray(w, np.float64))
  np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)
