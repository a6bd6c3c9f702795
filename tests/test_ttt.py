"""Test-time training beyond the mixers' contract: documents that begin anywhere, chunks of any size, and whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.mixers.ttt import TTTMLP
from pallas_kernels.ttt import ttt

H, K, BATCH = 2, 4, 5
# Documents of one token, of whole mini-batches, and that end and begin within one.
LENGTHS = [1, 5, 7, 10, 2, 3, 12, 1, 1, 3]
T = sum(LENGTHS)


def arguments(hidden=8):
  random = np.random.default_rng(0).standard_normal
  tokens = {name: random((1, T, H, K)) for name in "qkv"}
  place = np.concatenate([np.arange(n) % BATCH for n in LENGTHS])
  return tokens | dict(
    rate=np.abs(random((1, T, H))),
    place=np.broadcast_to(place[None, :, None], (1, T, H)).astype(float),
    step=np.abs(random((H, BATCH))),
    scale=random((H, K)),
    bias=random((H, K)),
    W1=random((H, K, hidden)),
    b1=random((H, hidden)),
    W2=random((H, hidden, K)),
    b2=random((H, K)),
  )


def by_equation(a):
  """Token by token, each document from nothing."""
  layers = (a["W1"], a["b1"]), (a["W2"], a["b2"])
  constant = {n: x for n, x in a.items() if x.shape[:2] != (1, T)}
  tokens = {n: x[0] for n, x in a.items() if n not in constant}
  update = jax.vmap(lambda S, token: TTTMLP.equation(S, **token))
  nothing = tuple((W * 0, b * 0, W * 0, b * 0) for W, b in layers)

  def step(S, token):
    first, token = token
    S = jax.tree.map(lambda x: jnp.where(first, 0, x), S)
    return update(S, token | constant)

  first = np.concatenate([np.arange(n) == 0 for n in LENGTHS])
  S, o = jax.lax.scan(step, nothing, (first, tokens))
  return o[None], S


def gradients(run, a):
  def loss(a):
    leaves = jax.tree.leaves(out := run(a))
    return sum(jnp.sum(jnp.sin(x)) for x in leaves), out

  return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(a))


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@functools.cache
def wanted():
  return gradients(by_equation, arguments())


@pytest.mark.parametrize("chunk", [2, None])
def test_documents_begin_anywhere(chunk):
  """In float64: 1e-9 leaves room for rounding alone."""
  ids = jnp.asarray(np.repeat(np.arange(len(LENGTHS)), LENGTHS))[None]
  run = lambda a: ttt(**a, segment_ids=ids, return_state=True, chunk_size=chunk)  # noqa: E731
  got, want = gradients(run, arguments()), wanted()
  assert not np.any(got[0]["place"])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.squeeze(a), np.squeeze(b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [3, 22])
def test_whole_rows(length):
  """Chunks that are mini-batches take half the products: as those of a document that is named."""
  a = arguments()
  a = {n: x[:, :length] if x.shape[:2] == (1, T) else x for n, x in a.items()}
  a["place"] = np.broadcast_to((np.arange(length) % BATCH)[None, :, None], (1, length, H)) * 1.0
  ids = jnp.ones((1, length), jnp.int32)
  got, want = (
    gradients(lambda a, ids=ids: ttt(**a, segment_ids=ids, return_state=True), a)
    for ids in (None, ids)
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
