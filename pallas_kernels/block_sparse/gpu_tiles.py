"""What the block-sparse GPU kernels share: tiles of neighbouring queries, and the walk over the blocks they visit."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.block_sparse.reference import Blocks

# Rows of a warpgroup's matrices, and keys of a step.
ROWS = 64
# Logits of what is hidden, and the least that the softmax's maximum is: exp2 of the difference is zero.
HIDDEN, LEAST = -1e30, -1e20
_NEVER = jnp.iinfo(jnp.int32).max
LOG2E = math.log2(math.e)
MATRIX = plgpu.Layout.WGMMA
COLUMN, ROW = MATRIX.reduce(1), MATRIX.reduce(0)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static facts of a call.

  Attributes:
    B, heads, groups: batch, key heads, groups of query heads.
    rows: heads of a group, with what pads them to a power of two; tokens: queries of a tile; tiles: of a sequence.
    Tk: keys, with what pads them.
    size: tokens of a block; steps: copies of 64 keys in which one is loaded.
  """

  B: int
  heads: int
  groups: int
  rows: int
  tokens: int
  tiles: int
  Tk: int
  D: int
  V: int
  size: int
  steps: int

  @classmethod
  def of(cls, q, k, v, blocks: Blocks) -> "Plan":
    (B, T, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    G = blocks.indices.shape[1]
    # 32 bits say which of a tile's queries chose a block.
    rows = max(2, 1 << (H // G - 1).bit_length())
    tokens = ROWS // rows
    # A block may reach past the last key.
    reach = 0 if blocks.layout.aligned and Tk % blocks.size == 0 else blocks.size + ROWS
    Tk = -(-(Tk + reach) // ROWS) * ROWS
    # Bulk copies begin at multiples of 8 rows; documents may begin anywhere.
    steps = blocks.size // ROWS + (not blocks.layout.aligned)
    return cls(B, Hkv, G, rows, tokens, -(-T // tokens), Tk, D, v.shape[3], blocks.size, steps)

  @property
  def unit(self) -> int:
    """Rows of a tile that lie together, and are copied at once: a query's heads, or all if they are fewer than 8."""
    return self.rows if self.rows >= 8 else ROWS

  @property
  def copies(self) -> int:
    return ROWS // self.unit

  def by_group(self, x: Array) -> Array:
    """[B, T, H, ...] -> [B, tiles tokens, G, rows, ...], padded with zeros."""
    B, T, H = x.shape[:3]
    x = x.reshape(B, T, self.groups, H // self.groups, *x.shape[3:])
    pad = [(0, 0)] * x.ndim
    pad[1], pad[3] = (0, self.tiles * self.tokens - T), (0, self.rows - x.shape[3])
    return jnp.pad(x, pad)

  def by_unit(self, x: Array) -> Array:
    """[B, T, H, width] -> [B tiles 64/unit, G unit, width]: as it lies, where a group's heads are a unit."""
    x, width = self.by_group(x), x.shape[3]
    x = x.reshape(-1, self.unit // self.rows, self.groups, self.rows, width)
    return jnp.moveaxis(x, 1, 2).reshape(-1, self.groups * self.unit, width)

  def from_units(self, x: Array, like: Array) -> Array:
    """The inverse of ``by_unit``, for queries and heads of ``like``."""
    (B, T, H), width = like.shape[:3], x.shape[2]
    x = x.reshape(-1, self.groups, self.unit // self.rows, self.rows, width)
    x = jnp.moveaxis(x, 1, 2).reshape(B, -1, self.groups, self.rows, width)
    return x[:, :T, :, : H // self.groups].reshape(B, T, H, width)

  def by_tile(self, x: Array) -> Array:
    """[B, T, H] -> [B, G, tiles 64], padded with zeros."""
    return jnp.moveaxis(self.by_group(x), 2, 1).reshape(self.B, self.groups, -1)

  def from_tiles(self, x: Array, like: Array) -> Array:
    """The inverse of ``by_tile``, for queries and heads of ``like``."""
    B, T, H = like.shape[:3]
    x = x.reshape(B, self.groups, self.tiles * self.tokens, self.rows)
    return jnp.moveaxis(x[:, :, :T, : H // self.groups], 1, 2).reshape(B, T, H)

  def of_rows(self, last: Array, *more: Array) -> Array:
    """[B, G, tiles, 2 + n, 64] int32 of each row: its query's bit and last key, and the bits of floats of it."""
    shape = (self.B, self.groups, self.tiles, ROWS)
    bit = jnp.left_shift(1, jnp.arange(ROWS, dtype=jnp.int32) // self.rows)
    last = jnp.repeat(last, self.rows, axis=1).reshape(self.B, 1, self.tiles, ROWS)
    more = (jax.lax.bitcast_convert_type(x, jnp.int32).reshape(shape) for x in more)
    return jnp.stack([jnp.broadcast_to(x, shape) for x in (bit, last, *more)], axis=3)

  def of_visits(self, rows: Array, *numbers: Array) -> Array:
    """The facts of those who visit keys: of a tile as ``of_rows`` has them, or [B, G, T, n, 64] int32 of a query.

    A query's rows may be any of a matrix: its numbers are repeated.
    """
    if self.copies == 1:
      return rows
    shape = (self.B, self.groups, self.tiles * self.tokens, 1, self.rows)
    numbers = (jax.lax.bitcast_convert_type(x, jnp.int32).reshape(shape) for x in numbers)
    return jnp.tile(jnp.concatenate(list(numbers), axis=3), self.copies)

  def least(self, last: Array) -> Array:
    """[B, tiles] int32: the last key that all queries of a tile see, of those that see any."""
    last = jnp.where(last < 0, _NEVER, last)
    return jnp.min(last.reshape(self.B, self.tiles, self.tokens), axis=2)

  def matrix(self, width: int, *count: int):
    """Shared memory of 64 rows, as the tensor cores and bulk copies want it; ``count`` of them."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM((*count, ROWS, width), jnp.bfloat16, transforms=transforms)


def product(a, b):
  """a b in float32, of 64 rows."""

  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(run, plgpu.ACC((ROWS, b.shape[1]), jnp.float32))


def add(total, a, b, spare):
  """total + a b, for a and a total that are in registers; the sum has the total's.

  Pallas's interpreter multiplies only what is in shared memory: there, and only there, is some of it to spare. Nor does
  it know sums that are not of zeros.
  """
  if spare is None:
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(total))
  return total + product(_put(a, spare.at[0]), b)


def _put(x, spare):
  spare = spare.at[jax.lax.axis_index("warpgroup"), :, pl.ds(0, x.shape[1])]
  spare[...] = x
  plgpu.commit_smem()
  return spare


def units(p: Plan, batch, group, tile):
  """(where in an array that lies ``by_unit``, the rows of a matrix) of each copy that a tile takes."""
  for i in range(p.copies):
    at = (batch * p.tiles + tile) * p.copies + i
    yield (at, pl.ds(group * p.unit, p.unit)), pl.ds(i * p.unit, p.unit)


def load(p: Plan, x, x_s, ready, *place):
  """A tile's matrix: ``p.copies`` arrivals."""
  for at, rows in units(p, *place):
    plgpu.copy_gmem_to_smem(x.at[at], x_s.at[rows], ready)


def store(p: Plan, x_s, x, *place):
  """The inverse of ``load``; wait for it."""
  plgpu.commit_smem()
  for at, rows in units(p, *place):
    plgpu.copy_smem_to_gmem(x_s.at[rows], x.at[at])


def operand(x_s, spare):
  """A matrix that is multiplied often, in registers: that leaves shared memory and its bandwidth to others."""
  x = plgpu.load(x_s, (), layout=MATRIX)
  return x if spare is None else _put(x, spare.at[1])


def spread(x, axis: int, columns: int = ROWS):
  """A vector along one axis of a matrix of 64 rows."""
  return jax.lax.broadcast_in_dim(x, (ROWS, columns), (axis,))


def zeros(width: int):
  return plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), MATRIX)


def folded(scale: float) -> tuple[float, float]:
  """(a, b), b positive: of a product, a is multiplied at once and b where a row's number is subtracted."""
  unit = scale * LOG2E
  return (1, unit) if unit > 0 else (unit, 1)


def program():
  batch, group = jax.lax.axis_index("batch"), jax.lax.axis_index("group")
  return batch, group, jax.lax.axis_index("tile")


class Step(NamedTuple):
  """64 keys of a walk: their block's first key, their own, who chose the block; keys, values, and that they are there.

  ``free_k`` and ``free_v`` are called when both were read for the last time: their memory is filled again.
  """

  begin: Array
  start: Array
  chosen: Array
  k_s: Array
  k_ready: Array
  v_s: Array
  v_ready: Array
  free_k: Callable[[], None]
  free_v: Callable[[], None]


def walk(p: Plan, k, v, first, chosen, count, k_s, v_s, k_ready, v_ready):
  """Begins to copy the blocks that a tile visits; but the last memory of keys, and that of values, is yet free.

  Returns:
    Of a function of ``Step`` and a carry, and of a carry, the last one.
  """
  batch, group, _ = place = program()
  head = jax.lax.div(group, jnp.int32(p.groups // p.heads))
  steps = count[place] * p.steps

  def facts(i):
    block = jax.lax.div(i, jnp.int32(p.steps))
    begin = first[*place, block]
    start = jax.lax.div(begin, jnp.int32(8)) * 8 + jax.lax.rem(i, jnp.int32(p.steps)) * ROWS
    return begin, pl.multiple_of(start, 8), chosen[*place, block]

  def fetch(x, x_s, ready, i, start):
    slot = jax.lax.rem(i, jnp.int32(x_s.shape[0]))
    plgpu.copy_gmem_to_smem(x.at[batch, pl.ds(start, ROWS), head], x_s.at[slot], ready.at[slot])

  streams = (k, k_s, k_ready), (v, v_s, v_ready)

  def begin(stream, i):
    i = jnp.int32(i)
    pl.when(i < steps)(lambda: fetch(*stream, i, facts(i)[1]))

  for i in range(max(k_s.shape[0], v_s.shape[0]) - 1):
    for stream in streams:
      if i < stream[1].shape[0] - 1:
        begin(stream, i)

  def run(step, carry):
    for stream in streams:
      begin(stream, stream[1].shape[0] - 1)

    def body(i, carry):
      slots, frees = [], []
      for stream in streams:
        _, x_s, ready = stream
        stages = x_s.shape[0]
        # Where to copy from is read long before it is needed.
        later = i + stages
        start = facts(jnp.minimum(later, steps - 1))[1]
        copy = functools.partial(fetch, *stream, later, start)
        frees.append(functools.partial(pl.when(later < steps), copy))
        slot = jax.lax.rem(i, jnp.int32(stages))
        slots += x_s.at[slot], ready.at[slot]
      return step(Step(*facts(i), *slots, *frees), carry)

    return jax.lax.fori_loop(0, steps, body, carry)

  return run


def seen(p: Plan, logits, x: Step, last, least):
  """The logits of what the rows see of a block that they chose: all, but at its ends and near their own place."""

  def some():
    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1, layout=MATRIX) + x.start
    seen = column <= spread(jnp.minimum(last, x.begin + (p.size - 1)), 0)
    if p.steps * ROWS > p.size:
      seen &= column >= x.begin
    return jnp.where(seen, logits, HIDDEN)

  end = jnp.minimum(least + 1, x.begin + p.size)
  return jax.lax.cond((x.start >= x.begin) & (x.start + ROWS <= end), lambda: logits, some)


def row_facts(rows_s, layout):
  """The query's bit and last key of each row, and the numbers that follow."""
  facts = [plgpu.load(rows_s.at[i], (), layout=layout) for i in range(rows_s.shape[0])]
  return *facts[:2], *(jax.lax.bitcast_convert_type(x, jnp.float32) for x in facts[2:])


def call(p: Plan, kernel, name, operands, outs, scratch, grid, interpret, warpgroups=1):
  if interpret:
    scratch = scratch | dict(spare=plgpu.SMEM((2, warpgroups, ROWS, max(p.D, p.V)), jnp.bfloat16))
  return plgpu.kernel(
    kernel,
    out_type=outs,
    grid=(p.B, *grid),
    grid_names=("batch", "group", "tile"),
    num_threads=warpgroups,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name=name,
    interpret=interpret,
  )(*operands)


def padded(p: Plan, x: Array) -> Array:
  return jnp.pad(x, ((0, 0), (0, p.Tk - x.shape[1]), (0, 0), (0, 0)))
