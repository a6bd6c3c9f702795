"""What the TPU kernels that go block by block share: tiles of queries, and the items of a tile.

A program walks tiles of queries of a key head, and in each the blocks that its queries chose. A block meets some of its
visitors at once, an item: their queries, gathered from the tile in VMEM, are the rows of one matrix, so that the matrix
unit is full however few heads a group has. Keys and values are in VMEM: HBM is read once a key head, whatever is
chosen. Logits are [keys, queries]: what is one number a query (lse, say, or the last key seen) is a row, which costs
nothing to broadcast.

A document may begin anywhere, a slice of VMEM must not: a slice begins at or before its block, at a multiple of a
tile's rows, and what lies around the block is masked. Where keys and values are more than VMEM holds, they are taken in
ranges, one after the other.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.block_sparse import tpu_tables as tables
from pallas_kernels.block_sparse.reference import Blocks

# Lanes and sublanes of a register; rows of a tile of bfloat16, where slices may begin.
LANES, SUBLANES, TILE = 128, 8, 16
# Logits of what is hidden.
NOTHING = -1e30
# The greatest logit of a row that has seen nothing: more than any hidden one, so that nothing of these is left.
EMPTY = NOTHING / 2
# Rows of an item, keys that it takes at once, items that are under way together.
_WIDTH, _KEYS, TOGETHER = 256, 128, 2
# Keys of long blocks that an item takes at once: one item is then work enough.
_LONG = 512
# Queries and visits of a tile at the most: VMEM and SMEM are shared with keys and tables.
_QUERIES, _VISITS = 512, 16384
# What is left for the compiler's own: so much, but of a small VMEM a quarter.
_REST = 8 * 2**20


def ranges_of(Tk: int, span: int, room: int, a_key: int) -> tuple[int, int]:
  """(keys of a range, ranges): as many as VMEM holds.

  Args:
    Tk: keys.
    span: of a slice around a block, which may end in the next range, no farther.
    room: bytes for keys; a_key: bytes of one.

  Raises:
    NotImplementedError: one slice is too large.
  """
  step = -(-span // LANES) * LANES
  keys = min(-(-Tk // step), (room // a_key - span) // step) * step
  if keys <= 0:
    raise NotImplementedError(
      f"a block with {span} keys around it does not fit the {max(room, 0) >> 20} MiB of VMEM that there are for keys"
    )
  return keys, -(-Tk // keys)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static facts of a call.

  Attributes:
    unit: neighbouring queries that are gathered together, a power of two, and ``rows``: of them and all their heads,
      of which each query has as many, padded.
    tile: queries of a step.
    most: visitors of an item.
    size: of a block; span: keys of a slice around it; ``piece``: those of them at once.
    long: whether an item's pieces are taken one after the other (``tpu_long``), or as items of their own.
    aligned: every slice begins where its block does.
    keys: of a range.
    ranges: how many there are.
  """

  unit: int
  rows: int
  tile: int
  most: int
  size: int
  span: int
  piece: int
  long: bool
  aligned: bool
  keys: int
  ranges: int

  @classmethod
  def of(cls, q, k, v, blocks: Blocks, vmem: int, backward: bool) -> "Plan":
    """Raises NotImplementedError, saying why, where there is none.

    Args:
      vmem: bytes that there are.
      backward: whether gradients are there too.
    """
    (_, Tq, H, D), Tk, V = q.shape, k.shape[1], v.shape[3]
    G, S = blocks.indices.shape[1], blocks.indices.shape[3]
    heads = H // G
    unit = 1 << (max(1, TILE // heads).bit_length() - 1)
    rows = next((n for n in (16, 32, 64, 128) if n >= unit * heads), None)
    if rows is None:
      raise NotImplementedError(f"the Pallas kernel has up to 128 heads a group; got {heads}")
    long, aligned = blocks.size >= _LONG, blocks.layout.aligned
    span = blocks.size if aligned else blocks.size + TILE
    if long:
      piece, span = _LONG, -(-span // _LONG) * _LONG
    else:
      piece = span if span <= _KEYS else next(n for n in range(_KEYS, 0, -TILE) if span % n == 0)
    itemsize = jnp.result_type(q, k, v).itemsize
    dl, vl = (-(-d // LANES) * LANES for d in (D, V))
    # Twice what goes in and out, and what is summed up.
    if backward:
      a_row, a_key = 2 * (dl + vl) * itemsize + 3 * dl * 4, (dl + vl) * (itemsize + 4)
    else:
      a_row, a_key = 2 * (dl + vl) * itemsize + vl * 4, (dl + vl) * itemsize
    a_query = rows // unit * a_row + (6 + SUBLANES) * LANES * 4 // unit
    room, tile = vmem - min(_REST, vmem // 4), _QUERIES
    # A visit's key and query are one number; keys have half of the room, or more.
    while tile > unit and (
      tile * S > _VISITS or tile >= 2 * Tq or tile * Tk >= 2**31 or tile * a_query > room // 2
    ):
      tile //= 2
    keys, ranges = ranges_of(Tk, span, room - tile * a_query, a_key)
    facts = (
      unit,
      rows,
      tile,
      _WIDTH // rows,
      blocks.size,
      span,
      piece,
      long,
      aligned,
      keys,
      ranges,
    )
    return cls(*facts)

  # --- operands ---

  def units(self, x: Array, G: int) -> Array:
    """[B, T, H, ...] -> [B G tiles, units, rows, ...], padded."""
    B, T, H = x.shape[:3]
    tiles = -(-T // self.tile)
    x = jnp.pad(x, ((0, 0), (0, tiles * self.tile - T)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(B, tiles, self.tile // self.unit, self.unit, G, H // G, *x.shape[3:])
    x = jnp.moveaxis(x, 4, 1)
    pad = (0, self.rows // self.unit - H // G)
    x = jnp.pad(x, ((0, 0),) * 5 + (pad,) + ((0, 0),) * (x.ndim - 6))
    return x.reshape(B * G * tiles, self.tile // self.unit, self.rows, *x.shape[6:])

  def from_units(self, x: Array, like: Array, G: int) -> Array:
    """The inverse of ``units``, for an array of the first axes of another."""
    B, T, H = like.shape[:3]
    each = self.rows // self.unit
    x = x.reshape(B, G, -1, self.tile // self.unit, self.unit, each, *x.shape[3:])
    x = jnp.moveaxis(x[:, :, :, :, :, : H // G], 1, 4)
    return x.reshape(B, -1, H, *x.shape[6:])[:, :T]

  def row(self, x: Array, G: int) -> Array:
    """[B, T, H] -> [B G tiles, units, lanes]: the numbers of a unit's rows, again and again."""
    return jnp.tile(self.units(x.astype(jnp.float32), G), (1, 1, LANES // self.rows))

  def in_ranges(self, x: Array) -> Array:
    """[B, Tk, Hkv, D] -> [ranges, B Hkv, keys + span, D]: a block that begins in a range may end after it."""
    x = jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], x.shape[3])
    x = jnp.pad(x, ((0, 0), (0, self.ranges * self.keys + self.span - x.shape[1]), (0, 0)))
    starts = range(0, self.ranges * self.keys, self.keys)
    return jnp.stack([x[:, r : r + self.keys + self.span] for r in starts])


@dataclasses.dataclass(frozen=True)
class Call:
  """A kernel over the tiles of each key head, for one range of keys after the other.

  Attributes:
    p: the plan.
    items: of the tiles.
    lasts: the last key that any query of a tile sees.
    limit: bytes of VMEM; None: in the interpreter.
  """

  p: Plan
  items: tables.Items
  lasts: Int[Array, "B G tiles"]
  limit: int | None

  @classmethod
  def of(cls, p: Plan, blocks: Blocks, Tk: int, limit: int | None) -> "Call":
    items = tables.items(blocks, p.tile, p.unit, p.most, Tk)
    shape = items.first.shape[:3]
    last = blocks.last_seen(blocks.layout.positions.shape[0])
    last = jnp.pad(last, ((0, 0), (0, shape[2] * p.tile - last.shape[1])), constant_values=-1)
    lasts = jnp.max(last.reshape(shape[0], 1, shape[2], p.tile), axis=-1)
    return cls(p, items, jnp.broadcast_to(lasts, shape).astype(jnp.int32), limit)

  def __call__(
    self, kernel, name, by_query, by_key, outs, sums, scratch, products, low, aliases=()
  ):
    """Runs a kernel for the keys from ``low``.

    Args:
      kernel: gets ``Items``, and the references of the operands, results and scratch memory.
      by_query: operands [tiles of all heads, units, ...], by_key: [heads, keys, ...].
      outs: shapes and dtypes of the results by query, sums: of those by key.
      scratch: shapes of scratch memory.
      products: channels of the matrix products.
      aliases: (operand by query, result) pairs that share memory.
    """
    p = self.p
    heads, tiles = by_key[0].shape[0], by_query[0].shape[0]
    steps = tiles // heads

    def at_query(x, **space):
      zeros = (0,) * (len(x.shape) - 1)
      return pl.BlockSpec((1, *x.shape[1:]), lambda b, i: (b * steps + i, *zeros), **space)

    def at_key(x):
      once = pl.Buffered(1)
      return pl.BlockSpec((1, *x.shape[1:]), lambda b, i: (b, 0, 0), pipeline_mode=once)

    smem = pltpu.SMEM
    flat = lambda x: x.reshape(tiles, 1, -1)  # noqa: E731
    items = self.items
    ends = jnp.stack([items.below(low), items.below(low + p.keys), self.lasts], axis=-1)
    places = [flat(x) for x in (ends, items.first, items.begin, items.count, items.visits)]
    base = jnp.full((1, 1), low, jnp.int32)
    specs = [pl.BlockSpec((1, 1), lambda b, i: (0, 0), memory_space=smem)]
    specs += [at_query(x, memory_space=smem) for x in places]
    specs += [at_query(x) for x in by_query] + [at_key(x) for x in by_key]
    pairs = tiles * items.visits.shape[-1] * p.rows * p.span
    moved = sum(x.size * x.dtype.itemsize for x in (*places, *by_query, *by_key, *outs, *sums))

    def body(base, ends, firsts, begins, counts, visits, *refs):
      kernel(_Walk(p, base, ends, firsts, begins, counts, visits), *refs)

    return pl.pallas_call(
      body,
      name=name,
      grid=(heads, steps),
      in_specs=specs,
      out_specs=[*map(at_query, outs), *map(at_key, sums)],
      out_shape=[*outs, *sums],
      scratch_shapes=scratch,
      input_output_aliases={1 + len(places) + i: o for i, o in aliases},
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=self.limit,
        disable_bounds_checks=True,  # the tables are made here, of what is in range
      ),
      cost_estimate=pl.CostEstimate(
        flops=2 * pairs * products, transcendentals=pairs, bytes_accessed=moved
      ),
      interpret=self.limit is None,
    )(base, *places, *by_query, *by_key)


# --- in a kernel ---


@dataclasses.dataclass(frozen=True)
class Item:
  """Some visitors of some keys.

  Attributes:
    by: the visitors.
    keys: where the keys are.
    seen: [keys, rows]: which rows see which of them.
  """

  by: "Visitors"
  keys: pl.Slice
  seen: Array


@dataclasses.dataclass(frozen=True)
class Visitors:
  """Of a block.

  Attributes:
    p: the plan.
    units: their numbers; beyond ``count`` any.
    facts: of their rows, [8, rows]; the first is the last key that a row sees.
    last: that key [1, rows], counted from the range's first; negative where a row has not chosen the block.
    first: the block's first key, counted so.
  """

  p: Plan
  units: Sequence[Array]
  count: Array
  facts: Array
  last: Array
  first: Array

  def rows(self, ref) -> Array:
    """Of an array [1, units, rows, D] the rows, one matrix."""
    return jnp.concatenate([ref[0, u] for u in self.units], axis=0)

  @property
  def start(self):
    """Where the block's slice begins."""
    return self.first if self.p.aligned else jax.lax.bitwise_and(self.first, -TILE)

  def item(self, piece) -> Item:
    """With a piece of the block."""
    p = self.p
    start = pl.multiple_of(self.start + piece * p.piece, TILE)
    key = start + jax.lax.broadcasted_iota(jnp.int32, (p.piece, 1), 0)
    seen = key <= self.last
    if p.span != p.size:
      seen &= (key >= self.first) & (key < self.first + p.size)
    return Item(self, pl.ds(start, p.piece), seen)


@dataclasses.dataclass(frozen=True)
class _Walk:
  """The items of a tile, and the tables that they are in."""

  p: Plan
  base: jax.Ref
  ends: jax.Ref
  firsts: jax.Ref
  begins: jax.Ref
  counts: jax.Ref
  visits: jax.Ref

  def row(self, values: Sequence[Array]) -> Array:
    """Of each visitor a row of numbers, again and again -> the numbers of all rows [n, rows of all]."""
    p, out = self.p, []
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    share = LANES // p.rows  # visitors whose rows are the lanes of a register
    for i in range(0, p.most, share):
      x = values[i]
      for j in range(1, share):
        x = jnp.where(lane >= j * p.rows, values[i + j], x)
      out.append(x)
    return jnp.concatenate(out, axis=1)

  def again(self, x: Array, combine: Callable, empty: float) -> list[Array]:
    """The inverse: numbers of all rows [1, rows of all] -> of each visitor its own, again and again.

    Args:
      combine, empty: a function of two numbers of which one is ``empty``, that is the other: maximum, or a sum.
    """
    p, out = self.p, []
    share = LANES // p.rows
    own, visitor = (
      jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), axis) // by
      for axis, by in ((1, p.rows), (0, 1))
    )
    for i in range(0, p.most, share):
      piece = x[:, i * p.rows : i * p.rows + LANES]
      grid = jnp.where(own == visitor, piece, empty)
      shift = p.rows
      while shift < LANES:
        grid = combine(grid, pltpu.roll(grid, shift, 1))
        shift *= 2
      out += [grid[j : j + 1] for j in range(share)]
    return out

  def visitors(self, number, facts_ref) -> "Visitors":
    """Those of an item of the tile; none beyond its last item."""
    p, base = self.p, self.base[0, 0]
    low, high = self.ends[0, 0, 0], self.ends[0, 0, 1]
    n = jnp.minimum(low + number, high - 1)
    first, begin, count = (ref[0, 0, n] for ref in (self.firsts, self.begins, self.counts))
    count = jnp.where(low + number < high, count, 0)
    units = [self.visits[0, 0, begin + i] for i in range(p.most)]
    # What is beyond the item's visitors belongs to other blocks.
    chose = jax.lax.broadcasted_iota(jnp.int32, (1, p.most * p.rows), 1) // p.rows < count
    if p.unit > 1:
      query = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) % p.rows // (p.rows // p.unit)
      units, bits = zip(*map(tables.split, units), strict=True)
      chose &= self.row([jnp.right_shift(b, query) & 1 for b in bits]) > 0
    facts = self.row([facts_ref[u] for u in units])
    last = jnp.where(chose, facts[:1].astype(jnp.int32), -1) - base
    return Visitors(p, units, count, facts, last, first - base)

  def item(self, number, facts_ref) -> "Item":
    """A piece of an item, which takes turns with the others."""
    pieces = self.p.span // self.p.piece
    return self.visitors(number // pieces, facts_ref).item(number % pieces)

  @property
  def count(self):
    """Of the tile's items in this range of keys."""
    return self.ends[0, 0, 1] - self.ends[0, 0, 0]

  @property
  def last(self):
    """The last key that any query of the tile sees, counted from the range's first."""
    return self.ends[0, 0, 2] - self.base[0, 0]

  def over(self, body: Callable) -> None:
    """``body`` of the numbers of some pieces of items at a time."""
    n = self.count * (self.p.span // self.p.piece)

    def some(step, carry):
      body([step * TOGETHER + i for i in range(TOGETHER)])
      return carry

    jax.lax.fori_loop(0, pl.cdiv(n, TOGETHER), some, 0)


def over_units(units: int, body: Callable) -> None:
  """``body(first, count)`` of some units at a time."""
  count = min(units, SUBLANES)
  jax.lax.fori_loop(0, units // count, lambda i, carry: body(i * count, count) or carry, 0)


def gather_facts(facts_ref, refs) -> None:
  """One register a unit, [units, 8, lanes], of one array a fact, [1, units, lanes]."""

  def some(first, count):
    rows = [ref[0, pl.ds(first, count), :] for ref in refs]
    for i in range(count):
      for fact, x in enumerate(rows):
        facts_ref[first + i, fact : fact + 1, :] = x[i : i + 1]

  over_units(facts_ref.shape[0], some)


def facts_memory(p: Plan):
  """Scratch memory for ``gather_facts``."""
  return pltpu.VMEM((p.tile // p.unit, SUBLANES, LANES), jnp.float32)


def dot(x, y, contract):
  """A matrix product in float32."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  contract = tuple((axis,) for axis in contract)
  return jax.lax.dot_general(
    x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
  )


def transposed(x):
  """A small matrix of float32, by the matrix unit, exactly."""
  n = x.shape[0]
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (n, n), i) for i in (0, 1))
  eye = (row == column).astype(jnp.float32)
  return jax.lax.dot_general(x, eye, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
