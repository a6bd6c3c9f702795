"""What the GPU kernels visit: the blocks of some queries together, and the other way round the queries of keys."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.block_sparse.reference import Blocks

_NEVER = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
  """The blocks that the queries of a tile chose, each once, in the order of keys.

  Attributes:
    first: the first key of each block, ascending; none after ``count``.
    chosen: bit i: the tile's query i chose it.
    count: how many there are.
  """

  first: Int[Array, "B G tiles n"]
  chosen: Int[Array, "B G tiles n"]
  count: Int[Array, "B G tiles"]


def firsts(blocks: Blocks, T: int) -> Int[Array, "B G T S"]:
  """The first key of each block that a query chose and sees something of, else a number that is larger than all.

  Padded to T queries.
  """
  Tq = blocks.layout.positions.shape[0]
  indices = jnp.repeat(blocks.indices, blocks.query_block, axis=2)[:, :, :Tq]
  first = (blocks.layout.starts[:, None, :, None] + indices * blocks.size).astype(jnp.int32)
  seen = (indices >= 0) & (first <= blocks.last_seen(Tq)[:, None, :, None])
  pad = ((0, 0), (0, 0), (0, T - Tq), (0, 0))
  return jnp.pad(jnp.where(seen, first, _NEVER), pad, constant_values=_NEVER)


def visits(blocks: Blocks, tokens: int, Tk: int) -> Visits:
  """Of tiles of ``tokens`` neighbouring queries, at most 32."""
  tiles = -(-blocks.layout.positions.shape[0] // tokens)
  first = firsts(blocks, tiles * tokens)
  B, G, T, S = first.shape
  # Blocks first, then queries: the queries of a block become neighbours.
  query = (jnp.arange(T, dtype=jnp.int32) % tokens)[:, None]
  key = jnp.where(first < _NEVER, first * tokens + query, _NEVER)
  key = jnp.sort(key.reshape(B, G, tiles, tokens * S), axis=-1)
  first, bit = key // tokens, jnp.left_shift(1, key % tokens)
  new = jnp.pad(first[..., 1:] != first[..., :-1], ((0, 0),) * 3 + ((1, 0),), constant_values=True)
  seen = key < _NEVER
  slot = jnp.cumsum(new, axis=-1) - 1
  count = jnp.max(jnp.where(seen, slot + 1, 0), axis=-1)
  most = tokens * S
  if blocks.layout.aligned:
    most = min(most, -(-Tk // blocks.size))

  def compact(slot, seen, first, bit):
    at = jnp.where(seen, slot, most)  # out of bounds: dropped
    into = jnp.full(most, _NEVER, jnp.int32).at[at].set(first, mode="drop")
    return into, jnp.zeros(most, jnp.int32).at[at].add(bit, mode="drop")

  for _ in range(3):
    compact = jax.vmap(compact)
  return Visits(*compact(slot, seen, first, bit), count.astype(jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visitors:
  """The queries, or tiles of them, that visit each tile of keys, in parts of bounded length.

  Attributes:
    first, stop: of a visit: the block's first key, and the first key from there on that not all who chose it see; in
      the order of keys.
    chosen: the queries of the tile that chose it; [1, 1, 1] where a query visits alone.
    who: the query or tile.
    keys: the tile of keys that a part is of.
    begin, end: the visits of a part; parts that are of nothing, the last ones, have none.
    parts: the first part of each tile of keys, which the next tile's follow, and where the last tile's end.
  """

  first: Int[Array, "B G N"]
  stop: Int[Array, "B G N"]
  chosen: Int[Array, "B G N"] | Int[Array, "1 1 1"]
  who: Int[Array, "B G N"]
  keys: Int[Array, "B G parts"]
  begin: Int[Array, "B G parts"]
  end: Int[Array, "B G parts"]
  parts: Int[Array, "B G tiles+1"]


def visitors(
  first: Int[Array, "B G units n"],
  chosen: Int[Array, "B G units n"] | None,
  least: Int[Array, "B units"],
  blocks: Blocks,
  rows: int,
  Tk: int,
  part: int,
) -> Visitors:
  """The inverse of ``visits``, or of ``firsts``, for tiles of ``rows`` keys and parts of at most ``part`` visits.

  A block that does not begin with a tile of keys is visited in one more of them.

  Args:
    least: the last key that all queries of a tile see.
  """
  B, G, units, n = first.shape
  who = jnp.broadcast_to(jnp.arange(units, dtype=jnp.int32)[:, None], first.shape)
  given = (first, who) if chosen is None else (first, who, chosen)
  flat = tuple(x.reshape(B, G, -1) for x in given)
  first, who, *bits = jax.lax.sort(flat, dimension=-1, num_keys=1)
  last = jax.vmap(lambda least, who: least[who])(least, who)
  stop = jnp.minimum(last, jnp.where(first < _NEVER, first + (blocks.size - 1), 0)) + 1
  starts = jnp.arange(-(-Tk // rows)) * rows
  over = blocks.size // rows + (not blocks.layout.aligned)
  parts = -(-units * n * over // part) + len(starts)

  def one(first):
    low = jnp.searchsorted(first, starts - blocks.size + 1)
    high = jnp.searchsorted(first, starts + rows)
    bounds = jnp.pad(jnp.cumsum(-(-(high - low) // part)), (1, 0))
    numbers = jnp.arange(parts)
    keys = jnp.minimum(jnp.searchsorted(bounds[1:], numbers, side="right"), len(starts) - 1)
    begin = low[keys] + (numbers - bounds[keys]) * part
    end = jnp.minimum(begin + part, high[keys])
    return tuple(x.astype(jnp.int32) for x in (keys, begin, jnp.maximum(begin, end), bounds))

  bits = bits[0] if bits else jnp.ones((1, 1, 1), jnp.int32)
  return Visitors(first, stop, bits, who, *jax.vmap(jax.vmap(one))(first))
