"""The backward pass of block-sparse attention as a Pallas kernel for TPUs.

A program walks tiles of queries of a key head, and in each the blocks that its queries chose. A block meets some of its
visitors at once: their queries, gathered from the tile in VMEM, are the rows of one matrix, so that the matrix unit is
full however few heads a group has, and the gradients of the block's keys and values, in VMEM too, are read and written
once for all of them. Logits are [keys, queries]: what is one number a query (lse, delta, the last key seen) is a row,
which costs nothing to broadcast.

Where keys, values and their gradients are more than VMEM holds, they are taken in ranges, one after the other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.block_sparse import tpu_tables as tables
from pallas_kernels.block_sparse.reference import Blocks

_LANES, _ROWS = 128, 16  # of a tile of bfloat16
_NOTHING = -1e30
# Rows of an item, keys that it takes at once, items that are under way together.
_WIDTH, _KEYS, _TOGETHER = 256, 128, 2
# Queries and visits of a tile at the most: VMEM and SMEM are shared with keys and tables.
_QUERIES, _VISITS = 512, 16384
# What is left for the compiler's own.
_REST = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static facts of a call.

  Attributes:
    unit: neighbouring queries that are gathered together, and ``rows``: of them and all their heads, padded.
    tile: queries of a step.
    most: visitors of an item.
    span: keys of a slice around a block; ``piece``: those of them at once.
    keys: of a range.
    ranges: how many there are.
  """

  unit: int
  rows: int
  tile: int
  most: int
  span: int
  piece: int
  keys: int
  ranges: int

  @classmethod
  def of(cls, q, k, v, blocks: Blocks, vmem: int) -> "Plan":
    """Raises NotImplementedError, saying why, where there is none."""
    (_, Tq, H, D), Tk, V = q.shape, k.shape[1], v.shape[3]
    G, S = blocks.indices.shape[1], blocks.indices.shape[3]
    heads = H // G
    unit = max(1, _ROWS // heads)
    rows = next((n for n in (16, 32, 64, 128) if n >= unit * heads), None)
    if rows is None:
      raise NotImplementedError(f"the Pallas kernel has up to 128 heads a group; got {heads}")
    span = blocks.size if blocks.layout.aligned else blocks.size + _ROWS
    piece = span if span <= _KEYS else next(n for n in range(_KEYS, 0, -_ROWS) if span % n == 0)
    tile = _QUERIES
    # A visit's key and query are one number.
    while tile > unit and (tile * S > _VISITS or tile >= 2 * Tq or tile * Tk >= 2**31):
      tile //= 2
    itemsize = jnp.result_type(q, k, v).itemsize
    lanes = [-(-d // _LANES) * _LANES for d in (D, V)]
    # Twice what goes in and out, and the gradient once more.
    a_query = rows // unit * (2 * sum(lanes) * itemsize + 3 * lanes[0] * 4) + 6 * _LANES * 4 // unit
    left = vmem - _REST - tile * a_query
    keys = left // (sum(lanes) * (itemsize + 4)) - span
    step = -(-span // _LANES) * _LANES  # a block may end in the next range, no farther
    keys = min(-(-Tk // step), keys // step) * step
    if keys <= 0:
      raise NotImplementedError(
        f"a block of {blocks.size} keys does not fit {vmem >> 20} MiB of VMEM"
      )
    return cls(unit, rows, tile, _WIDTH // rows, span, piece, keys, -(-Tk // keys))


def _units(p: Plan, x: Array, G: int) -> Array:
  """[B, T, H, ...] -> [B G tiles, units, rows, ...], padded."""
  B, T, H = x.shape[:3]
  tiles = -(-T // p.tile)
  x = jnp.pad(x, ((0, 0), (0, tiles * p.tile - T)) + ((0, 0),) * (x.ndim - 2))
  x = x.reshape(B, tiles, p.tile // p.unit, p.unit, G, H // G, *x.shape[3:])
  x = jnp.moveaxis(x, 4, 1)
  x = x.reshape(B * G * tiles, p.tile // p.unit, -1, *x.shape[6:])
  return jnp.pad(x, ((0, 0), (0, 0), (0, p.rows - x.shape[2])) + ((0, 0),) * (x.ndim - 3))


def _from_units(p: Plan, x: Array, B: int, T: int, H: int, G: int) -> Array:
  """The inverse of ``_units``."""
  x = x[:, :, : p.unit * H // G]
  x = x.reshape(B, G, -1, p.tile // p.unit, p.unit, H // G, *x.shape[3:])
  return jnp.moveaxis(x, 1, 4).reshape(B, -1, H, *x.shape[6:])[:, :T]


def _row(p: Plan, x: Array, G: int) -> Array:
  """[B, T, H] -> [B G tiles, units, lanes]: the numbers of a unit's rows, again and again."""
  return jnp.tile(_units(p, x, G), (1, 1, _LANES // p.rows))


def gradients(q, k, v, do, lse, delta, blocks: Blocks, scale: float, vmem: int, interpret=False):
  """Of q, k and v, float32.

  Args:
    do: gradient of the outputs.
    lse: logarithms of the softmax's denominators, finite.
    delta: what the softmax subtracts: the product of outputs and their gradients, less the gradient of lse.
    vmem: bytes.
  """
  p = Plan.of(q, k, v, blocks, vmem)
  dtype = jnp.result_type(q, k, v)
  (B, T, H), (Tk, Hkv), G = q.shape[:3], k.shape[1:3], blocks.indices.shape[1]
  last = jnp.broadcast_to(tables.last_seen(blocks, T)[:, :, None], (B, T, H))
  by_query = [_units(p, x.astype(dtype), G) for x in (q, do)]
  by_query += [_row(p, x.astype(jnp.float32), G) for x in (lse, delta, last)]
  items = tables.items(blocks, p.tile, p.unit, p.most, Tk)
  flat = lambda x: x.reshape(by_query[0].shape[0], 1, -1)  # noqa: E731
  places = [flat(x) for x in (items.first, items.begin, items.count, items.visits)]

  def keys(x):  # [ranges, B Hkv, keys + span, D]: a block that begins in a range may end after it
    x = jnp.moveaxis(x.astype(dtype), 2, 1).reshape(B * Hkv, Tk, -1)
    x = jnp.pad(x, ((0, 0), (0, p.ranges * p.keys + p.span - Tk), (0, 0)))
    return jnp.stack([x[:, r * p.keys : (r + 1) * p.keys + p.span] for r in range(p.ranges)])

  call = functools.partial(_call, p, blocks, G // Hkv, scale, places, by_query, interpret)

  def one(dq, at):
    r, k, v = at
    ends = jnp.stack([items.below(r * p.keys), items.below((r + 1) * p.keys)], axis=-1)
    new, dk, dv = call(flat(ends), jnp.full((1, 1), r * p.keys, jnp.int32), k, v)
    return dq + new, (dk, dv)

  parts = jnp.arange(p.ranges, dtype=jnp.int32), keys(k), keys(v)
  if p.ranges == 1:
    dq, dkv = one(0, jax.tree.map(lambda x: x[0], parts))
    dkv = jax.tree.map(lambda x: x[None], dkv)
  else:
    dq, dkv = jax.lax.scan(one, jnp.zeros(by_query[0].shape, jnp.float32), parts)

  def whole(x):  # what is after a range is the beginning of the next
    out = jnp.pad(x[:, :, : p.keys], ((0, 1), (0, 0), (0, 0), (0, 0)))
    out = out.at[1:, :, : p.span].add(x[:, :, p.keys :])
    out = jnp.moveaxis(out, 0, 1).reshape(B, Hkv, -1, x.shape[3])
    return jnp.moveaxis(out, 1, 2)[:, :Tk]

  dk, dv = map(whole, dkv)
  return _from_units(p, dq, B, T, H, G) * scale, dk * scale, dv


def _call(p: Plan, blocks, groups, scale, places, by_query, interpret, ends, base, k, v):
  heads, steps = k.shape[0], by_query[0].shape[0] // k.shape[0]

  def at_query(x, **space):
    zeros = (0,) * (x.ndim - 1)
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, i: (b * steps + i, *zeros), **space)

  def at_keys(x):
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, i: (b, 0, 0), pipeline_mode=pl.Buffered(1))

  smem = pltpu.SMEM
  q = by_query[0]
  outs = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, v)]
  pairs = q.shape[0] * places[3].shape[2] * p.rows * p.span
  specs = [pl.BlockSpec((1, 1), lambda b, i: (0, 0), memory_space=smem)]
  specs += [at_query(x, memory_space=smem) for x in (ends, *places)]
  specs += [at_query(x) for x in by_query] + [at_keys(x) for x in (k, v)]
  moved = sum(x.size * x.dtype.itemsize for x in (*by_query, *places, k, v, *outs))
  return pl.pallas_call(
    functools.partial(_kernel, p, blocks.size, blocks.layout.aligned, scale),
    name="block_sparse_backward",
    grid=(heads, steps),
    in_specs=specs,
    out_specs=[at_query(outs[0]), at_keys(outs[1]), at_keys(outs[2])],
    out_shape=outs,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=None if interpret else _limit(),
      disable_bounds_checks=True,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * pairs * (3 * q.shape[3] + 2 * v.shape[2]),
      transcendentals=pairs,
      bytes_accessed=moved,
    ),
    scratch_shapes=[pltpu.VMEM((q.shape[1], 8, _LANES), jnp.float32)],
    interpret=interpret,
  )(base, ends, *places, *by_query, k, v)


def _limit() -> int | None:
  try:
    return pltpu.get_tpu_info().vmem_capacity_bytes
  except ValueError:
    return None


def _dot(x, y, contract):
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
  )


def _kernel(
  p: Plan, size, aligned, scale, base, ends, firsts, begins, counts, visits, q_ref, do_ref, lse_ref, delta_ref,
  last_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref, facts_ref,
):  # fmt: skip
  @pl.when(pl.program_id(1) == 0)
  def _():
    dk_ref[...] = jnp.zeros_like(dk_ref)
    dv_ref[...] = jnp.zeros_like(dv_ref)

  dq_ref[...] = jnp.zeros_like(dq_ref)
  # A unit's three rows in one register.
  for u in range(facts_ref.shape[0]):
    for i, ref in enumerate((lse_ref, delta_ref, last_ref)):
      facts_ref[u, i : i + 1, :] = ref[0, u : u + 1, :]
  low, high = ends[0, 0, 0], ends[0, 0, 1]
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
  share = _LANES // p.rows  # visitors whose rows are the lanes of a register
  pieces = p.span // p.piece
  visitor = jax.lax.broadcasted_iota(jnp.int32, (1, p.most * p.rows), 1) // p.rows
  query = lane % p.rows // (p.rows // p.unit)

  def row(values):
    """Of each visitor a row of its numbers, again and again -> [1, rows of all]."""
    out = []
    for i in range(0, p.most, share):
      x = values[i]
      for j in range(1, share):
        x = jnp.where(lane >= j * p.rows, values[i + j], x)
      out.append(x)
    return jnp.concatenate(out, axis=1)

  def item(number):
    """What an item adds, and where."""
    there = number < high * pieces
    n = jnp.minimum(number // pieces, high - 1)
    first, begin, count = firsts[0, 0, n], begins[0, 0, n], counts[0, 0, n]
    count = jnp.where(there, count, 0)
    start = first - base[0, 0]
    start = start if aligned else start // _ROWS * _ROWS
    start = start + number % pieces * p.piece
    start = pl.multiple_of(start, _ROWS)
    units = [visits[0, 0, begin + i] for i in range(p.most)]
    # What is beyond the item's visitors belongs to other blocks.
    chose = visitor < count
    if p.unit > 1:
      units, bits = zip(*map(tables.split, units), strict=True)
      chose &= row([jnp.right_shift(b, query) & 1 for b in bits]) > 0
    q = jnp.concatenate([q_ref[0, u] for u in units], axis=0)
    do = jnp.concatenate([do_ref[0, u] for u in units], axis=0)
    facts = row([facts_ref[u] for u in units])
    lse, delta = facts[0:1], facts[1:2]
    last = jnp.where(chose, facts[2:3].astype(jnp.int32), -1) - base[0, 0]
    rows = pl.ds(start, p.piece)
    k, v = k_ref[0, rows, :], v_ref[0, rows, :]
    key = start + jax.lax.broadcasted_iota(jnp.int32, (p.piece, 1), 0)
    seen = key <= last
    if not aligned:
      seen &= (key >= first - base[0, 0]) & (key < first - base[0, 0] + size)
    logits = _dot(k, q, ((1,), (1,)))
    weights = jnp.exp(jnp.where(seen, scale * logits - lse, _NOTHING))
    dlogits = (weights * (_dot(v, do, ((1,), (1,))) - delta)).astype(k.dtype)
    dv = _dot(weights.astype(do.dtype), do, ((1,), (0,)))
    dk = _dot(dlogits, q, ((1,), (0,)))
    dq = _dot(dlogits, k, ((0,), (0,)))
    return units, rows, dq, dk, dv

  def some(step, carry):
    found = [item(low * pieces + step * _TOGETHER + i) for i in range(_TOGETHER)]
    for units, rows, dq, dk, dv in found:
      dk_ref[0, rows, :] += dk
      dv_ref[0, rows, :] += dv
      for i, u in enumerate(units):
        dq_ref[0, u] += dq[i * p.rows : (i + 1) * p.rows]
    return carry

  jax.lax.fori_loop(0, pl.cdiv((high - low) * pieces, _TOGETHER), some, 0)
