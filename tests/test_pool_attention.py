"""Attention to pools against its definition in numpy, float64, one query at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.cost.kernels import pallas_calls
from pallas_kernels.pool_attention import pool_attention, pool_weights, tpu

B, T, H, G, K, V, N = 2, 37, 4, 2, 6, 5, 140
SCALE = 0.4


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def small_tiles(monkeypatch):
  """Several tiles of queries and of pools, the last ones not whole; some of XLA's queries at a time."""
  monkeypatch.setattr(tpu, "_ROWS", 32)
  monkeypatch.setattr(tpu, "_POOLS", 128)
  monkeypatch.setattr(dispatch, "_CPU", 1 << 15)


def inputs(dtype=np.float64, heads=H, groups=G):
  rng = np.random.default_rng(0)
  shapes = (B, T, heads, K), (B, N, groups, K), (B, N, groups, V)
  return [rng.normal(size=s).astype(dtype) for s in shapes]


def places(documents: bool):
  """First pools and how many: none for some queries; of one document, or of several in the second row."""
  first, complete = np.zeros((B, T), np.int32), np.tile(np.arange(T) * 4 - 4, (B, 1)).clip(0, N)
  if documents:
    begins = np.repeat([0, 11, 12], [11, 1, T - 12])
    first[1] = begins * 3
    complete[1] = np.minimum((np.arange(T) - begins) * 3, N - first[1])
  return first, complete.astype(np.int32)


def definition(q, k, v, first, complete):
  heads, groups = q.shape[2], k.shape[2]
  o, lse = np.zeros((*q.shape[:3], V)), np.full(q.shape[:3], -np.inf)
  weights = np.zeros((B, groups, T, N))
  for b, t, h in np.ndindex(*q.shape[:3]):
    g = h // (heads // groups)
    seen = slice(first[b, t], first[b, t] + complete[b, t])
    if complete[b, t]:
      logits = SCALE * k[b, seen, g] @ q[b, t, h]
      lse[b, t, h] = np.log(np.exp(logits).sum())
      p = np.exp(logits - lse[b, t, h])
      o[b, t, h] = p @ v[b, seen, g]
      weights[b, g, t, seen] += p
  return o, lse, weights, weights


def with_gradients(args, where, backend):
  """Results, weights, and every gradient of a number of both results."""
  rng = np.random.default_rng(4)
  a, b = rng.normal(size=(*args[0].shape[:3], V)), rng.normal(size=args[0].shape[:3])

  def run(q, k, v):
    o, lse = pool_attention(q, k, v, *where, scale=SCALE, backend=backend)
    p = pool_weights(q, k, *where, scale=SCALE, lse=lse, backend=backend)
    own = pool_weights(q, k, *where, scale=SCALE, backend=backend)
    seen = lse > -jnp.inf
    number = (o * a).sum() + jnp.where(seen, jnp.where(seen, lse, 0) * b, 0).sum()
    return number, (o, lse, p, own)

  gradients, out = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(*map(jnp.asarray, args))
  return out, gradients


@pytest.mark.parametrize("documents", [False, True])
def test_matches_the_definition(float64, small_tiles, documents):
  """Gradients against those of everything at once, which JAX derives."""
  args, where = inputs(), places(documents)
  out, gradients = with_gradients(args, where, "xla")
  for got, want in zip(out, definition(*args, *where), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)

  def dense(q, k, v):
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(*q.shape[:3], V)), rng.normal(size=q.shape[:3])
    x = SCALE * jnp.einsum("bthk,bnhk->bhtn", q, jnp.repeat(k, H // G, axis=2))
    number = jnp.arange(N) - where[0][..., None]
    seen = ((number >= 0) & (number < where[1][..., None]))[:, None]
    some = seen.any(-1, keepdims=True)
    x = jnp.where(some, jnp.where(seen, x, -jnp.inf), 0)
    p = jnp.where(some, jax.nn.softmax(x), 0)
    o = jnp.einsum("bhtn,bnhv->bthv", p, jnp.repeat(v, H // G, axis=2))
    lse = jnp.where(some[..., 0], jax.nn.logsumexp(x, axis=-1), 0).swapaxes(1, 2)
    return (o * a).sum() + (lse * b).sum()

  for got, want in zip(gradients, jax.grad(dense, argnums=(0, 1, 2))(*args), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
  "heads, groups, documents", [(4, 2, False), (4, 2, True), (3, 3, False), (5, 1, True)]
)
def test_pallas_kernels(small_tiles, heads, groups, documents):
  """In Pallas's interpreter: float32 sums of some dozens of terms in another order."""
  args, where = inputs(np.float32, heads, groups), places(documents)
  got = with_gradients(args, where, "interpret")
  want = with_gradients(args, where, "xla")
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_pallas_kernels_in_bfloat16(small_tiles):
  """Weights and their gradients are rounded to 2^-9 before products with values, queries and keys, outputs too."""
  args, where = [jnp.asarray(x, jnp.bfloat16) for x in inputs()], places(True)
  got = with_gradients(args, where, "interpret")
  with jax.enable_x64(True):
    want = with_gradients([x.astype(jnp.float64) for x in args], where, "xla")
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    g, w = (np.where(x == -np.inf, 0, x) for x in (np.asarray(g, np.float64), np.asarray(w)))
    assert np.linalg.norm(g - w) < 1e-2 * np.linalg.norm(w)


def test_tiles_are_as_large_as_vmem_holds(monkeypatch):
  """On a v4 (16 MiB): NSA's whole, smaller ones in float32 and of DeepSeek-V4's channels, and of 128 heads none."""
  monkeypatch.setattr(dispatch, "vmem", lambda: dispatch.SMALL_VMEM)
  monkeypatch.setattr(dispatch, "platform", lambda: "tpu")

  def tiles(heads, groups, D, V, dtype):
    array = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.dtype(dtype))  # noqa: E731
    q, k, v = array(2048, heads, D), array(1024, groups, D), array(1024, groups, V)
    place = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    run = functools.partial(pool_attention, scale=1.0)
    kernels = pallas_calls(jax.make_jaxpr(run)(q, k, v, place, place).jaxpr)
    try:
      tpu.supports(q, k, v)
    except NotImplementedError as error:
      assert "do not fit" in str(error) and not kernels
      return None
    p = tpu._Plan.of(q, k, v)
    assert kernels and tpu._taken(p.R, p.queries, p.pools, D, V, q.dtype.itemsize) <= 12 * 2**20
    return p.rows, p.pools

  assert tiles(64, 4, 192, 128, "bfloat16") == (1024, 512)
  assert tiles(32, 1, 512, 512, "bfloat16") == (1024, 256)
  assert tiles(64, 4, 192, 128, "float32") == (1024, 256)
  assert tiles(16, 4, 512, 512, "float32") == (512, 128)
  assert tiles(128, 1, 576, 512, "float32") is None


def test_tiles_that_vmem_makes_small(monkeypatch):
  """As ``test_pallas_kernels``, of the least tiles."""
  monkeypatch.setattr(tpu, "_ROWS", 128)
  args, where = inputs(np.float32), places(True)
  least = tpu._taken(H // G, 16, 128, K, V, 4)
  monkeypatch.setattr(tpu, "_VMEM", least)
  p = tpu._Plan.of(*args)
  assert (p.queries, p.pools) == (16, 128)
  got = with_gradients(args, where, "interpret")
  want = with_gradients(args, where, "xla")
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
  monkeypatch.setattr(tpu, "_VMEM", least - 1)
  with pytest.raises(NotImplementedError, match="2 heads a group of 6 and 5 channels"):
    with_gradients(args, where, "interpret")


def test_weights_have_no_gradient():
  args, where = inputs(np.float32), places(False)
  lse = jnp.zeros((B, T, H))
  gradient = jax.grad(lambda q: pool_weights(q, args[1], *where, scale=SCALE, lse=lse).sum())(
    args[0]
  )
  assert not np.any(gradient)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (dict(k=np.zeros((B, N, 3, K))), "multiple of the 3 groups"),
    (dict(v=np.zeros((B, N + 1, G, V))), "k and v must be"),
    (dict(first=np.zeros((B, T + 1), int)), "first must be"),
    (dict(backend="cuda"), "unknown backend"),
  ],
)
def test_bad_arguments_are_named(change, words):
  q, k, v = inputs(np.float32)
  first, complete = places(False)
  given = dict(q=q, k=k, v=v, first=first, complete=complete, backend="auto") | change
  if "k" in change:
    given["v"] = np.zeros((*given["k"].shape[:3], V))
  with pytest.raises(ValueError, match=words):
    pool_attention(**given, scale=1.0)


def test_a_named_backend_says_why_it_cannot():
  q, k, v = inputs(np.float32)
  with pytest.raises(NotImplementedError, match="needs a TPU"):
    pool_attention(q, k, v, *places(False), scale=1.0, backend="tpu")
