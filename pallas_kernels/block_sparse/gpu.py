"""Block-sparse attention as Pallas Mosaic GPU kernels for Hopper: neighbouring queries visit their blocks together.

A warpgroup's matrices have 64 rows: some neighbouring queries times the heads of their group. Each block that one of
the queries chose is loaded once for all of them, and hidden from those that did not choose it. What neighbours share,
and with trained indexers they share most, is neither read nor multiplied twice.

The backward pass has three kernels. One walks the same blocks again for the gradients of queries. For those of keys and
values the table is inverted: each tile of keys walks the queries that chose it, a matrix of them at a time (tiles of
queries, where a query has fewer than 8 rows, which bulk copies do not take alone). Some keys (a document's first,
say) are visited by all queries; the walks are cut in parts of equal length, each with sums of its own, which the third
kernel adds. (XLA's ``segment_sum`` took longer for that than all else together.)

Not served: blocks of single tokens (DSA). A Hopper GPU's bulk copies take rows that lie together; chosen tokens would
be copied row by row, the bytes that XLA's gather reads. Nor the window: that is plain attention, merged by ``api.py``.
"""

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

from pallas_kernels import dispatch
from pallas_kernels.block_sparse import gpu_tables
from pallas_kernels.block_sparse.reference import Blocks, values_of

# Rows of a warpgroup's matrices, and keys of a step.
_ROWS = 64
# Logits of what is hidden, and the least that the softmax's maximum is: exp2 of the difference is zero.
_HIDDEN, _LEAST = -1e30, -1e20
_NEVER = jnp.iinfo(jnp.int32).max
# Visits of a part of a walk over queries.
_PART = 1024
_LOG2E = math.log2(math.e)
_MATRIX = plgpu.Layout.WGMMA
_COLUMN, _ROW = _MATRIX.reduce(1), _MATRIX.reduce(0)


def check(q, k, v, blocks: Blocks) -> None:
  """Raises NotImplementedError, saying why, where the kernels cannot serve the call on this machine."""
  dispatch.needs_hopper()
  limitations(q, k, v, blocks)


def limitations(q, k, v, blocks: Blocks) -> None:
  """The part of ``check`` that does not ask where it runs."""
  if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
    raise NotImplementedError(
      f"the GPU kernel takes bfloat16; got {q.dtype}, {k.dtype} and {v.dtype}"
    )
  if blocks.size % _ROWS:
    raise NotImplementedError(f"the GPU kernel has blocks of multiples of {_ROWS} tokens")
  D, V, heads = q.shape[3], v.shape[3], q.shape[2] // blocks.indices.shape[1]
  if D % 64 or V % 64 or D > 192 or V > 192:
    raise NotImplementedError(
      f"the GPU kernel has keys and values of 64, 128 or 192; got {D} and {V}"
    )
  if heads > _ROWS:
    raise NotImplementedError(f"a group has {heads} heads; the GPU kernel takes up to {_ROWS}")


@dataclasses.dataclass(frozen=True)
class _Plan:
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
  def of(cls, q, k, v, blocks: Blocks) -> "_Plan":
    (B, T, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    G = blocks.indices.shape[1]
    # 32 bits say which of a tile's queries chose a block.
    rows = max(2, 1 << (H // G - 1).bit_length())
    tokens = _ROWS // rows
    # A block may reach past the last key.
    reach = 0 if blocks.layout.aligned and Tk % blocks.size == 0 else blocks.size + _ROWS
    Tk = -(-(Tk + reach) // _ROWS) * _ROWS
    # Bulk copies begin at multiples of 8 rows; documents may begin anywhere.
    steps = blocks.size // _ROWS + (not blocks.layout.aligned)
    return cls(B, Hkv, G, rows, tokens, -(-T // tokens), Tk, D, v.shape[3], blocks.size, steps)

  @property
  def unit(self) -> int:
    """Rows of a tile that lie together, and are copied at once: a query's heads, or all if they are fewer than 8."""
    return self.rows if self.rows >= 8 else _ROWS

  @property
  def copies(self) -> int:
    return _ROWS // self.unit

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
    shape = (self.B, self.groups, self.tiles, _ROWS)
    bit = jnp.left_shift(1, jnp.arange(_ROWS, dtype=jnp.int32) // self.rows)
    last = jnp.repeat(last, self.rows, axis=1).reshape(self.B, 1, self.tiles, _ROWS)
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
    return plgpu.SMEM((*count, _ROWS, width), jnp.bfloat16, transforms=transforms)


def _product(a, b):
  """a b in float32, of 64 rows."""

  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(run, plgpu.ACC((_ROWS, b.shape[1]), jnp.float32))


def _add(total, a, b, spare):
  """total + a b, for a and a total that are in registers; the sum has the total's.

  Pallas's interpreter multiplies only what is in shared memory: there, and only there, is some of it to spare. Nor does
  it know sums that are not of zeros.
  """
  if spare is None:
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(total))
  return total + _product(_put(a, spare.at[0]), b)


def _put(x, spare):
  spare = spare.at[jax.lax.axis_index("warpgroup"), :, pl.ds(0, x.shape[1])]
  spare[...] = x
  plgpu.commit_smem()
  return spare


def _units(p: _Plan, batch, group, tile):
  """(where in an array that lies ``by_unit``, the rows of a matrix) of each copy that a tile takes."""
  for i in range(p.copies):
    at = (batch * p.tiles + tile) * p.copies + i
    yield (at, pl.ds(group * p.unit, p.unit)), pl.ds(i * p.unit, p.unit)


def _load(p: _Plan, x, x_s, ready, *place):
  """A tile's matrix: ``p.copies`` arrivals."""
  for at, rows in _units(p, *place):
    plgpu.copy_gmem_to_smem(x.at[at], x_s.at[rows], ready)


def _store(p: _Plan, x_s, x, *place):
  """The inverse of ``_load``; wait for it."""
  plgpu.commit_smem()
  for at, rows in _units(p, *place):
    plgpu.copy_smem_to_gmem(x_s.at[rows], x.at[at])


def _operand(x_s, spare):
  """A matrix that is multiplied often, in registers: that leaves shared memory and its bandwidth to others."""
  x = plgpu.load(x_s, (), layout=_MATRIX)
  return x if spare is None else _put(x, spare.at[1])


def _spread(x, axis: int, columns: int = _ROWS):
  """A vector along one axis of a matrix of 64 rows."""
  return jax.lax.broadcast_in_dim(x, (_ROWS, columns), (axis,))


def _zeros(width: int):
  return plgpu.layout_cast(jnp.zeros((_ROWS, width), jnp.float32), _MATRIX)


def _folded(scale: float) -> tuple[float, float]:
  """(a, b), b positive: of a product, a is multiplied at once and b where a row's number is subtracted."""
  unit = scale * _LOG2E
  return (1, unit) if unit > 0 else (unit, 1)


def _place():
  batch, group = jax.lax.axis_index("batch"), jax.lax.axis_index("group")
  return batch, group, jax.lax.axis_index("tile")


class _Step(NamedTuple):
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


def _walk(p: _Plan, k, v, first, chosen, count, k_s, v_s, k_ready, v_ready):
  """Begins to copy the blocks that a tile visits; but the last memory of keys, and that of values, is yet free.

  Returns:
    Of a function of ``_Step`` and a carry, and of a carry, the last one.
  """
  batch, group, _ = place = _place()
  head = jax.lax.div(group, jnp.int32(p.groups // p.heads))
  steps = count[place] * p.steps

  def facts(i):
    block = jax.lax.div(i, jnp.int32(p.steps))
    begin = first[*place, block]
    start = jax.lax.div(begin, jnp.int32(8)) * 8 + jax.lax.rem(i, jnp.int32(p.steps)) * _ROWS
    return begin, pl.multiple_of(start, 8), chosen[*place, block]

  def fetch(x, x_s, ready, i, start):
    slot = jax.lax.rem(i, jnp.int32(x_s.shape[0]))
    plgpu.copy_gmem_to_smem(x.at[batch, pl.ds(start, _ROWS), head], x_s.at[slot], ready.at[slot])

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
      return step(_Step(*facts(i), *slots, *frees), carry)

    return jax.lax.fori_loop(0, steps, body, carry)

  return run


def _seen(p: _Plan, logits, x: _Step, last, least):
  """The logits of what the rows see of a block that they chose: all, but at its ends and near their own place."""

  def some():
    column = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _ROWS), 1, layout=_MATRIX) + x.start
    seen = column <= _spread(jnp.minimum(last, x.begin + (p.size - 1)), 0)
    if p.steps * _ROWS > p.size:
      seen &= column >= x.begin
    return jnp.where(seen, logits, _HIDDEN)

  end = jnp.minimum(least + 1, x.begin + p.size)
  return jax.lax.cond((x.start >= x.begin) & (x.start + _ROWS <= end), lambda: logits, some)


def _row_facts(rows_s, layout):
  """The query's bit and last key of each row, and the numbers that follow."""
  facts = [plgpu.load(rows_s.at[i], (), layout=layout) for i in range(rows_s.shape[0])]
  return *facts[:2], *(jax.lax.bitcast_convert_type(x, jnp.float32) for x in facts[2:])


def _forward_kernel(
  p: _Plan, scale, q, k, v, rows, least, first, chosen, count, o, lse, k_s, v_s, rows_s, ready, k_ready,
  v_ready, spare=None,
):  # fmt: skip
  batch, group, tile = place = _place()
  q_s = k_s.at[k_s.shape[0] - 1]
  _load(p, q, q_s, ready, *place)
  plgpu.copy_gmem_to_smem(rows.at[place], rows_s, ready)
  walk = _walk(p, k, v, first, chosen, count, k_s, v_s, k_ready, v_ready)
  plgpu.barrier_wait(ready)
  (bits, last), least = _row_facts(rows_s, _COLUMN), least[batch, tile]
  at_once, unit = _folded(scale)
  queries = _operand(q_s, spare)

  def step(x, carry):
    top, total, acc = carry
    plgpu.barrier_wait(x.k_ready)
    logits = _product(queries, x.k_s.T) * at_once
    x.free_k()
    logits, mine = _seen(p, logits, x, last, least), (bits & x.chosen) != 0
    new = jnp.where(mine, jnp.maximum(top, jnp.max(logits, axis=1) * unit), top)
    weights = jnp.exp2(logits * unit - _spread(jnp.where(mine, new, -_HIDDEN), 0))
    before = jnp.exp2(top - new)
    total = total * before + jnp.sum(weights, axis=1)
    plgpu.barrier_wait(x.v_ready)
    acc = _add(acc * _spread(before, 0, p.V), weights.astype(x.v_s.dtype), x.v_s, spare)
    x.free_v()
    return new, total, acc

  def vector(x):
    return plgpu.layout_cast(jnp.full((_ROWS,), x, jnp.float32), _COLUMN)

  top, total, acc = walk(step, (vector(_LEAST), vector(0.0), _zeros(p.V)))
  some = total > 0
  share = jnp.where(some, 1 / jnp.where(some, total, 1), 0)
  # The outputs leave through memory of values: two programs fit an SM, and hide each other's waits.
  o_s = v_s.at[0]
  o_s[...] = (acc * _spread(share, 0, p.V)).astype(o_s.dtype)
  _store(p, o_s, o, *place)
  nothing = vector(-jnp.inf)
  logs = (top + jnp.log2(jnp.where(some, total, 1))) * (1 / _LOG2E)
  lse[batch, group, pl.ds(tile * _ROWS, _ROWS)] = jnp.where(some, logs, nothing)
  plgpu.wait_smem_to_gmem(0)


def _queries_kernel(
  p: _Plan, scale, q, k, v, do, rows, least, first, chosen, count, dq, q_s, k_s, v_s, rows_s, ready,
  k_ready, v_ready, spare=None,
):  # fmt: skip
  batch, _, tile = place = _place()
  _load(p, q, q_s, ready, *place)
  do_s = v_s.at[v_s.shape[0] - 1]
  _load(p, do, do_s, ready, *place)
  plgpu.copy_gmem_to_smem(rows.at[place], rows_s, ready)
  walk = _walk(p, k, v, first, chosen, count, k_s, v_s, k_ready, v_ready)
  plgpu.barrier_wait(ready)
  (bits, last, lse, delta), least = _row_facts(rows_s, _COLUMN), least[batch, tile]
  at_once, unit = _folded(scale)
  cotangents = _operand(do_s, spare)

  def step(x, dq):
    plgpu.barrier_wait(x.k_ready)
    logits = _product(q_s, x.k_s.T) * at_once
    logits, mine = _seen(p, logits, x, last, least), (bits & x.chosen) != 0
    weights = jnp.exp2(logits * unit - _spread(jnp.where(mine, lse, -_HIDDEN), 0))
    plgpu.barrier_wait(x.v_ready)
    dweights = _product(cotangents, x.v_s.T)
    x.free_v()
    dlogits = weights * (dweights * scale - _spread(delta, 0))
    dq = _add(dq, dlogits.astype(x.k_s.dtype), x.k_s, spare)
    x.free_k()
    return dq

  q_s[...] = walk(step, _zeros(p.D)).astype(q_s.dtype)
  _store(p, q_s, dq, *place)
  plgpu.wait_smem_to_gmem(0)


def _keys_kernel(
  p: _Plan, scale, q, k, v, do, rows, first, stop, chosen, who, keys, begins, ends, dk, dv, k_s,
  v_s, q_s, do_s, rows_s, kv_ready, q_ready, do_ready, done, spare=None,
):  # fmt: skip
  """A step has 64 rows of those who visit the keys, whether they are neighbours or not.

  One warpgroup has the sums of keys, one those of values: together they are more than a warpgroup's registers.
  """
  batch, group, part = _place()
  head = jax.lax.div(group, jnp.int32(p.groups // p.heads))
  start = keys[batch, group, part] * _ROWS
  begin, end = begins[batch, group, part], ends[batch, group, part]
  steps = jax.lax.div(end - begin + (p.copies - 1), jnp.int32(p.copies))
  stages, of_keys = q_s.shape[0], jax.lax.axis_index("warpgroup") == 0
  at_once, unit = _folded(scale)

  def of_visits(x, step):
    """Numbers of a step's visits; the part's last again for those that there are not."""
    at = (jnp.minimum(begin + step * p.copies + i, end - 1) for i in range(p.copies))
    return [x[batch, group, i] for i in at]

  def fetch(step, units):
    slot = jax.lax.rem(step, jnp.int32(stages))
    for i, number in enumerate(units):
      own = slot, pl.ds(i * p.unit, p.unit)
      at = batch * (p.tiles * p.copies) + number, pl.ds(group * p.unit, p.unit)
      plgpu.copy_gmem_to_smem(q.at[at], q_s.at[own], q_ready.at[slot])
      plgpu.copy_gmem_to_smem(rows.at[batch, group, number], rows_s.at[slot, i], q_ready.at[slot])
      plgpu.copy_gmem_to_smem(do.at[at], do_s.at[own], do_ready.at[slot])

  # That of values has less to multiply.
  @pl.when(jnp.logical_not(of_keys))
  def _():
    at = batch, pl.ds(start, _ROWS), head
    plgpu.copy_gmem_to_smem(k.at[at], k_s, kv_ready)
    plgpu.copy_gmem_to_smem(v.at[at], v_s, kv_ready)
    for i in map(jnp.int32, range(stages)):
      pl.when(i < steps)(lambda i=i: fetch(i, of_visits(who, i)))

  plgpu.barrier_wait(kv_ready)
  if p.copies > 1:
    # Of columns. (Mosaic's search for layouts did not end where nothing reads it.)
    unit_of = plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=_ROW) // p.unit

  def columns(numbers):
    """Of a number or a vector of each visit: the one of each column's visit."""
    return functools.reduce(
      lambda total, x: jnp.where(unit_of == x[0], x[1], total),
      enumerate(numbers[1:], 1),
      plgpu.layout_cast(jnp.broadcast_to(numbers[0], (_ROWS,)), _ROW),
    )

  def weights_of(step):
    slot = jax.lax.rem(step, jnp.int32(stages))
    origins, stops = of_visits(first, step), of_visits(stop, step)
    plgpu.barrier_wait(q_ready.at[slot])
    # Turned: keys are rows, and a query's rows are columns.
    if p.copies == 1:
      mine, last, lse, delta = _row_facts(rows_s.at[slot, 0], _ROW)
    else:
      facts = (
        [plgpu.load(rows_s.at[slot, i, j], (), layout=_ROW) for i in range(p.copies)]
        for j in range(2)
      )
      lse, delta = (jax.lax.bitcast_convert_type(columns(x), jnp.float32) for x in facts)
    logits = _product(k_s, q_s.at[slot].T) * at_once

    def some():
      row = plgpu.broadcasted_iota(jnp.int32, (_ROWS, _ROWS), 0, layout=_MATRIX) + start
      if p.copies == 1:
        seen = (row >= origins[0]) & (
          row <= _spread(jnp.minimum(last, origins[0] + (p.size - 1)), 1)
        )
      else:
        seen = (row >= _spread(columns(origins), 1)) & (row < _spread(columns(stops), 1))
      return jnp.where(seen, logits, _HIDDEN)

    # In the order of keys, the last begins last.
    whole = (start >= origins[-1]) & (start + _ROWS <= functools.reduce(jnp.minimum, stops))
    logits = jax.lax.cond(whole, lambda: logits, some)
    if p.copies == 1:
      there = (mine & of_visits(chosen, step)[0]) != 0
    else:
      there = unit_of < end - begin - step * p.copies
    weights = jnp.exp2(logits * unit - _spread(jnp.where(there, lse, -_HIDDEN), 1))
    plgpu.barrier_wait(do_ready.at[slot])
    return slot, weights, delta

  def keys_step(step, sums):
    slot, weights, delta = weights_of(step)
    dweights = _product(v_s, do_s.at[slot].T)
    dlogits = weights * (dweights * scale - _spread(delta, 1))
    sums = _add(sums, dlogits.astype(k_s.dtype), q_s.at[slot], spare)
    plgpu.barrier_arrive(done.at[slot])
    return sums

  def values_step(step, sums):
    # Read long before they are needed.
    later = of_visits(who, step + stages)
    slot, weights, _ = weights_of(step)
    sums = _add(sums, weights.astype(k_s.dtype), do_s.at[slot], spare)
    plgpu.barrier_arrive(done.at[slot])
    plgpu.barrier_wait(done.at[slot])
    pl.when(step + stages < steps)(lambda: fetch(step + stages, later))
    return sums

  def walk(step, out, width):
    out[batch, group, part] = jax.lax.fori_loop(0, steps, step, _zeros(width))

  # Nobody reads a part that is of nothing.
  some = begin < end
  pl.when(some & of_keys)(lambda: walk(keys_step, dk, p.D))
  pl.when(some & jnp.logical_not(of_keys))(lambda: walk(values_step, dv, p.V))


def _sums_kernel(p: _Plan, dk_parts, dv_parts, parts, dk, dv, dk_s, dv_s, **_):
  """Adds the parts of a tile of keys, of all groups of its head."""
  batch, head, tile = _place()
  each = p.groups // p.heads

  def write(x, out_s, out):
    def of_group(group, total):
      def add(part, total):
        return total + plgpu.load(x.at[batch, group, part], (), layout=_MATRIX, optimized=False)

      return jax.lax.fori_loop(parts[batch, group, tile], parts[batch, group, tile + 1], add, total)

    total = jax.lax.fori_loop(head * each, (head + 1) * each, of_group, _zeros(x.shape[-1]))
    out_s[...] = total.astype(out_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out.at[batch, pl.ds(tile * _ROWS, _ROWS), head])

  write(dk_parts, dk_s, dk)
  write(dv_parts, dv_s, dv)
  plgpu.wait_smem_to_gmem(0)


def _call(p: _Plan, kernel, name, operands, outs, scratch, grid, interpret, warpgroups=1):
  if interpret:
    scratch = scratch | dict(spare=plgpu.SMEM((2, warpgroups, _ROWS, max(p.D, p.V)), jnp.bfloat16))
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


def _padded(p: _Plan, x: Array) -> Array:
  return jnp.pad(x, ((0, 0), (0, p.Tk - x.shape[1]), (0, 0), (0, 0)))


def forward(q, k, v, blocks: Blocks, scale: float, interpret=None):
  """As ``reference.forward``, without sinks and the keys of the window."""
  return _attend(q, k, values_of(k, v), blocks, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, blocks, scale, interpret):
  return _attend_forward(q, k, v, blocks, scale, interpret)[0]


def _attend_forward(q, k, v, blocks, scale, interpret):
  p = _Plan.of(q, k, v, blocks)
  visits = gpu_tables.visits(blocks, p.tokens, k.shape[1])
  last = blocks.last_seen(p.tiles * p.tokens)
  queries, rows = p.by_unit(q), p.of_rows(last)
  tables = p.least(last), visits.first, visits.chosen, visits.count
  operands = queries, _padded(p, k), _padded(p, v), rows, *tables
  outs = (
    jax.ShapeDtypeStruct((*queries.shape[:2], p.V), q.dtype),
    jax.ShapeDtypeStruct((p.B, p.groups, p.tiles * _ROWS), jnp.float32),
  )
  scratch = dict(
    k_s=p.matrix(p.D, 3),
    v_s=p.matrix(p.V, 2),
    rows_s=plgpu.SMEM(rows.shape[3:], rows.dtype),
    ready=plgpu.Barrier(num_arrivals=p.copies + 1),
    k_ready=plgpu.Barrier(num_barriers=3),
    v_ready=plgpu.Barrier(num_barriers=2),
  )
  kernel = functools.partial(_forward_kernel, p, scale)
  grid, name = (p.groups, p.tiles), "block_sparse_forward"
  o, lse = _call(p, kernel, name, operands, outs, scratch, grid, interpret)
  o, lse = p.from_units(o, q), p.from_tiles(lse, q)
  return (o, lse), (q, k, v, blocks, o, lse)


def _attend_backward(scale, interpret, residuals, cotangents):
  q, k, v, blocks, o, lse = residuals
  do, dlse = cotangents
  p = _Plan.of(q, k, v, blocks)
  # The softmax's derivative: dlogits = p (do . v - delta).
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
  # Along rows: in the order of tiles XLA would take four times as long to read them.
  delta = jax.lax.optimization_barrier(delta) - dlse
  finite = jnp.where(lse == -jnp.inf, 0, lse) * _LOG2E
  visits = gpu_tables.visits(blocks, p.tokens, k.shape[1])
  last = blocks.last_seen(p.tiles * p.tokens)
  numbers = p.by_tile(finite), p.by_tile(delta * scale)
  rows = p.of_rows(last, *numbers)
  arrays = p.by_unit(q), _padded(p, k), _padded(p, v), p.by_unit(do.astype(q.dtype))
  dq = _queries(p, scale, (*arrays, rows, p.least(last)), visits, interpret)
  if p.copies == 1:
    by = visits.first, visits.chosen, p.least(last)
  else:
    by = gpu_tables.firsts(blocks, p.tiles * p.tokens), None, last
  table = gpu_tables.visitors(*by, blocks, _ROWS, p.Tk, _PART)
  dk, dv = _keys(p, scale, (*arrays, p.of_visits(rows, *numbers)), table, interpret)
  return p.from_units(dq, q), dk[:, : k.shape[1]], dv[:, : k.shape[1]], None


def _queries(p: _Plan, scale, arrays, visits, interpret):
  q, rows = arrays[0], arrays[-2]
  scratch = dict(
    q_s=p.matrix(p.D),
    k_s=p.matrix(p.D, 2),
    v_s=p.matrix(p.V, 2),
    rows_s=plgpu.SMEM(rows.shape[3:], rows.dtype),
    ready=plgpu.Barrier(num_arrivals=2 * p.copies + 1),
    k_ready=plgpu.Barrier(num_barriers=2),
    v_ready=plgpu.Barrier(num_barriers=2),
  )
  kernel = functools.partial(_queries_kernel, p, scale)
  operands = *arrays, visits.first, visits.chosen, visits.count
  out = jax.ShapeDtypeStruct(q.shape, q.dtype)
  grid, name = (p.groups, p.tiles), "block_sparse_queries"
  return _call(p, kernel, name, operands, out, scratch, grid, interpret)


def _keys(p: _Plan, scale, arrays, table, interpret):
  """The gradients of keys and values, [B, Tk, heads, ...] bfloat16, padded as they are."""
  parts, rows = table.keys.shape[2], arrays[-1]
  outs = tuple(
    jax.ShapeDtypeStruct((p.B, p.groups, parts, _ROWS, d), jnp.float32) for d in (p.D, p.V)
  )
  scratch = dict(
    k_s=p.matrix(p.D),
    v_s=p.matrix(p.V),
    q_s=p.matrix(p.D, 2),
    do_s=p.matrix(p.V, 2),
    rows_s=plgpu.SMEM((2, p.copies, *rows.shape[3:]), rows.dtype),
    kv_ready=plgpu.Barrier(num_arrivals=2),
    q_ready=plgpu.Barrier(num_arrivals=2 * p.copies, num_barriers=2),
    do_ready=plgpu.Barrier(num_arrivals=p.copies, num_barriers=2),
    done=plgpu.Barrier(num_arrivals=2, num_barriers=2),
  )
  kernel = functools.partial(_keys_kernel, p, scale)
  tables = table.first, table.stop, table.chosen, table.who, table.keys, table.begin, table.end
  operands = *arrays, *tables
  grid, name = (p.groups, parts), "block_sparse_keys"
  sums = _call(p, kernel, name, operands, outs, scratch, grid, interpret, warpgroups=2)
  return _sums(p, *sums, table.parts, interpret)


def _sums(p: _Plan, dk, dv, parts, interpret):
  """The sums of parts, [B, G, parts, 64, ...] float32, of each tile of keys; as ``_keys`` returns them."""
  outs = tuple(jax.ShapeDtypeStruct((p.B, p.Tk, p.heads, d), jnp.bfloat16) for d in (p.D, p.V))
  kernel, scratch = functools.partial(_sums_kernel, p), dict(dk_s=p.matrix(p.D), dv_s=p.matrix(p.V))
  grid, name = (p.heads, p.Tk // _ROWS), "block_sparse_sums"
  return _call(p, kernel, name, (dk, dv, parts), outs, scratch, grid, interpret)


_attend.defvjp(_attend_forward, _attend_backward)
