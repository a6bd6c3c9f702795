"""What the TPU's backward kernel visits: of a tile of queries each block that some of them chose, with those."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.block_sparse.reference import Blocks

_NEVER = jnp.iinfo(jnp.int32).max
_UNITS = 1 << 12  # more than a tile has


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Items:
  """The blocks of each tile of neighbouring queries in the order of keys, each with a few of its visitors.

  A visitor is a unit of neighbouring queries, of which a bit each says whether it chose the block.

  Attributes:
    first: the first key of an item's block, ascending; the greatest number after the last item.
    begin: where the item's visitors begin in ``visits``.
    count: how many they are.
    visits: units, and in the bits above theirs which of their queries. What lies beyond the last one may be read.
  """

  first: Int[Array, "B G tiles items"]
  begin: Int[Array, "B G tiles items"]
  count: Int[Array, "B G tiles items"]
  visits: Int[Array, "B G tiles visits"]

  def below(self, key) -> Int[Array, "B G tiles"]:
    """How many items there are whose blocks begin before a key."""
    return jnp.sum(self.first < key, axis=-1, dtype=jnp.int32)


def split(visit):
  """(unit, bits) of an entry of ``visits``."""
  return visit & (_UNITS - 1), jax.lax.shift_right_logical(visit, _UNITS.bit_length() - 1)


def items(blocks: Blocks, tile: int, unit: int, most: int, Tk: int) -> Items:
  """The items of tiles of so many queries, in units of so many; at most ``most`` visitors each.

  It is sorts and sums along rows, neither gathers nor scatters. ``unit`` divides ``tile``.
  """
  Tq = blocks.layout.positions.shape[0]
  tiles = -(-Tq // tile)
  indices = jnp.repeat(blocks.indices, blocks.query_block, axis=2)[:, :, :Tq]
  B, G, _, S = indices.shape
  N = tile * S
  first = (blocks.layout.starts[:, None, :, None] + indices * blocks.size).astype(jnp.int32)
  seen = (indices >= 0) & (first <= blocks.last_seen(Tq)[:, None, :, None])
  query = (jnp.arange(Tq, dtype=jnp.int32) % tile)[:, None]
  # Blocks before queries: what visits a block, and the queries of a unit, become neighbours.
  key = jnp.where(seen, first * tile + query, _NEVER)
  key = jnp.pad(key, ((0, 0), (0, 0), (0, tiles * tile - Tq), (0, 0)), constant_values=_NEVER)
  key = jnp.sort(key.reshape(B, G, tiles, N), axis=-1)
  key, bits = _by_unit(key, unit)
  there = key < _NEVER
  first = jnp.where(there, key // tile, _NEVER)
  number = jnp.arange(N, dtype=jnp.int32)
  new = _differs(first)
  start = jax.lax.cummax(jnp.where(new, number, 0), axis=3)
  # The next block's first visit; the last block's visits end where there are none.
  after = jnp.pad(jnp.where(new, number, N)[..., 1:], ((0, 0),) * 3 + ((0, 1),), constant_values=N)
  end = jax.lax.cummin(after, axis=3, reverse=True)
  begins = there & ((number - start) % most == 0)
  begin = jnp.where(begins, number, _NEVER)
  first, count = jnp.where(begins, first, _NEVER), jnp.minimum(end - number, most)
  sorted_items = jax.lax.sort((begin, first, count), dimension=3, num_keys=1)
  n = N
  if blocks.layout.aligned:  # so many blocks there are, and some have more than one item
    n = min(N, -(-Tk // blocks.size) + N // most)
  begin, first, count = (x[..., :n] for x in sorted_items)
  begin, count = (jnp.where(first < _NEVER, x, 0) for x in (begin, count))
  visits = jnp.where(there, key % tile // unit + (bits * _UNITS if unit > 1 else 0), 0)
  return Items(first, begin, count, jnp.pad(visits, ((0, 0),) * 3 + ((0, most),)))


def _by_unit(key, unit: int):
  """Visits of queries, sorted -> those of units, sorted, and the bits of their queries."""
  if unit == 1:
    return key, jnp.ones_like(key)
  bits, same = jnp.left_shift(1, key % unit), key // unit
  both = bits
  for d in range(1, unit):  # no more of a unit chose one block
    ahead = lambda x, d=d: jnp.pad(x[..., d:], ((0, 0),) * 3 + ((0, d),), constant_values=-1)  # noqa: E731
    both += jnp.where(ahead(same) == same, ahead(bits), 0)
  first = _differs(same) & (key < _NEVER)
  return jax.lax.sort((jnp.where(first, key, _NEVER), both), dimension=3, num_keys=1)


def _differs(x):
  """Where a row's value is not the one before it; its first is not."""
  return jnp.pad(x[..., 1:] != x[..., :-1], ((0, 0),) * 3 + ((1, 0),), constant_values=True)
