"""An indexer's scores in plain jax.numpy.

Heads are summed within a tile of keys, so that an array of queries by heads by keys is only as large as a tile's; what
no query sees is not computed.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

_LANES = 128

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class _Tiles:
  """Keys, some at a time; the last tile reaches back over the one before it."""

  def __init__(self, q, k):
    B, t, h = q.shape[:3]
    self.dtype, self.N = jnp.promote_types(q.dtype, jnp.float32), k.shape[1]
    self.size = min(max(dispatch.at_a_time(4 * B * t * h), _LANES), self.N)

  def count(self, end):
    return -(-jnp.minimum(end, self.N) // self.size)

  def start(self, i):
    return jnp.minimum(i * self.size, self.N - self.size)

  def take(self, x, i, axis):
    return jax.lax.dynamic_slice_in_dim(x, self.start(i), self.size, axis)

  def put(self, x, tile, i, axis):
    return jax.lax.dynamic_update_slice_in_dim(x, tile, self.start(i), axis)

  def seen(self, i, end):
    """Which keys of tile i belong to it and are before the end."""
    key = self.start(i) + jnp.arange(self.size)
    return (key >= i * self.size) & (key < end)

  def products(self, q, k):
    return _einsum("bthd,bnd->bthn", q, k, preferred_element_type=self.dtype)


@jax.custom_vjp
def scores(q, w, k, end):
  """As ``index_scores``."""
  tiles = _Tiles(q, k)

  def body(i, out):
    products = tiles.products(q, tiles.take(k, i, 1))
    # A sum of products, not a matrix product over heads: the compiler takes it into the loop that makes them.
    tile = jnp.sum(jax.nn.relu(products) * w[..., None].astype(tiles.dtype), axis=2)
    # A last tile computes again what the one before it had.
    return tiles.put(out, jnp.where(tiles.start(i) + jnp.arange(tiles.size) < end, tile, 0), i, 2)

  zeros = jnp.zeros((*w.shape[:2], tiles.N), tiles.dtype)
  return jax.lax.fori_loop(0, tiles.count(end), body, zeros)


def _forward(q, w, k, end):
  return scores(q, w, k, end), (q, w, k, end)


def _backward(residuals, dout):
  q, w, k, end = residuals
  tiles = _Tiles(q, k)
  wide = w.astype(tiles.dtype)

  def body(i, sums):
    dq, dw, dk = sums
    keys = tiles.take(k, i, 1)
    d = jnp.where(tiles.seen(i, end), tiles.take(dout, i, 2), 0)[:, :, None]
    products = tiles.products(q, keys)
    dw += jnp.sum(d * jax.nn.relu(products), axis=3)
    d = jnp.where(products > 0, d * wide[..., None], 0).astype(q.dtype)
    dq += _einsum("bthn,bnd->bthd", d, keys, preferred_element_type=tiles.dtype)
    tile = _einsum("bthn,bthd->bnd", d, q, preferred_element_type=tiles.dtype)
    return dq, dw, tiles.put(dk, tiles.take(dk, i, 1) + tile, i, 1)

  zeros = tuple(jnp.zeros(x.shape, tiles.dtype) for x in (q, w, k))
  grads = jax.lax.fori_loop(0, tiles.count(end), body, zeros)
  return *(g.astype(x.dtype) for g, x in zip(grads, (q, w, k), strict=True)), None


scores.defvjp(_forward, _backward)
