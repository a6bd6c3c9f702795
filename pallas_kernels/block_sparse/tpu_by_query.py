"""Block-sparse attention on TPUs, a query at a time: for groups of so many heads that they are a matrix by themselves.

A program walks the queries of a key head, some a step. Their blocks' numbers come through SMEM; each block is a slice
of the keys in VMEM, so that HBM is read once a key head, whatever is chosen. Some blocks of a query are one matrix, and
the softmax is online over what is left.

What limits it is how fast the matrix unit takes keys for 16 rows: with four queries under way, 16 heads of 128 channels
and 16 blocks of 128 keys are 457 bundles on v6e, one query at a time 578. Block by block (``tpu_by_block``) they would
be 547, and with blocks of 64 keys 537 instead of 289; but one head, with MoBA's 12 blocks of 4096 keys, is 7029 here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.block_sparse.reference import Blocks
from pallas_kernels.block_sparse.tpu_tiles import LANES, NOTHING, TILE, dot, ranges_of, transposed

# Queries a step, the rows of a tile of float32; of them, those that are under way together.
_QUERIES, TOGETHER = 8, 4
# Keys of a query that are one matrix.
_KEYS = 1024
# What is left for all that is not keys and values.
_REST = 6 * 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static facts of a call.

  Attributes:
    B, heads, groups, rows: batch, key heads, groups of a key head, query heads of a group.
    T: queries, with what pads them.
    slots, width: blocks of a query, with what pads them, and those that are one matrix.
    size, span: tokens of a block, and of the slice around it.
    keys, ranges: keys of a range, and how many ranges there are.
  """

  B: int
  heads: int
  groups: int
  rows: int
  T: int
  D: int
  V: int
  slots: int
  width: int
  size: int
  span: int
  aligned: bool
  keys: int
  ranges: int
  dtype: jnp.dtype

  @classmethod
  def of(cls, q, k, v, blocks: Blocks, vmem: int) -> "Plan":
    """Raises NotImplementedError, saying why, where there is none."""
    (B, T, H, D), (Tk, Hkv), V = q.shape, k.shape[1:3], v.shape[3]
    G, S = blocks.indices.shape[1], blocks.indices.shape[3]
    aligned = blocks.layout.aligned
    # Slices fill registers' lanes: several one, or one several.
    span = blocks.size if aligned else blocks.size + TILE
    span = next((n for n in (16, 32, 64) if n >= span), -(-span // LANES) * LANES)
    dtype = jnp.result_type(q, k, v)
    lanes = sum(-(-d // LANES) * LANES for d in (D, V))
    keys, ranges = ranges_of(Tk, span, vmem - _REST, lanes * dtype.itemsize)
    # Of a range there are few blocks, and what pads them costs as much.
    most = _KEYS if ranges == 1 else _KEYS // 2
    width = max(1, min(-(-S * span // LANES) * LANES, most) // span)
    S = -(-S // width) * width
    T = -(-T // _QUERIES) * _QUERIES
    return cls(
      B, Hkv, G // Hkv, H // G, T, D, V, S, width, blocks.size, span, aligned, keys, ranges, dtype
    )

  @property
  def cost(self) -> pl.CostEstimate:
    queries = self.B * self.heads * self.groups * self.T
    pairs = queries * self.slots * self.rows * self.span
    moved = self.B * self.heads * self.keys + queries * self.rows
    return pl.CostEstimate(
      flops=2 * pairs * (self.D + self.V),
      transcendentals=pairs,
      bytes_accessed=moved * (self.D + self.V) * self.dtype.itemsize + 8 * queries * self.slots,
    )


def _places(p: Plan, blocks: Blocks, T: int):
  """Of each block of a query, [B G, T, slots]: its first key, and its first and last seen row in the slice around it.

  A block that is not there has no row that is seen.
  """
  layout = blocks.layout
  indices = jnp.repeat(blocks.indices, blocks.query_block, axis=2)[:, :, :T]
  begin = layout.starts[:, None, :, None] + indices * p.size
  last = layout.positions[:, None] - blocks.window
  end = jnp.minimum(begin + p.size, last + 1)
  seen = (indices >= 0) & (layout.positions >= 0)[:, None] & (begin < end)
  begin, count = jnp.where(seen, begin, 0), jnp.where(seen, end - begin, 0)
  pad = lambda x: _pad(_pad(x, 2, p.T), 3, p.slots).reshape(-1, p.T, p.slots).astype(jnp.int32)  # noqa: E731
  return pad(begin), pad(count)


def _pad(x: Array, axis: int, size: int) -> Array:
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, pad)


def _seen(p: Plan, first, counts):
  """[1, width span]: whether a query sees the rows of its slices.

  Args:
    first: rows of the slices before their blocks begin; None: there are none.
    counts: rows of the blocks that are seen.
  """
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  each = max(LANES // p.span, 1)  # slices that share lanes
  row = lane % p.span if each > 1 else lane

  def scalar(values, i):
    x = values[i]
    for j in range(1, each):
      x = jnp.where(lane >= j * p.span, values[i + j], x)
    return x

  out = []
  for lanes in range(p.width * p.span // LANES):
    i = lanes * LANES // p.span
    at = row + lanes * LANES % p.span if each == 1 else row
    at = at if first is None else at - scalar(first, i)
    seen = at < scalar(counts, i)
    out.append(seen if first is None else seen & (at >= 0))
  return jnp.concatenate(out, axis=1)


def _kernel(p: Plan, scale, groups, begins, counts, q_ref, k_ref, v_ref, o_ref, lse_ref):
  lse = []
  for first in range(0, _QUERIES, TOGETHER):
    queries = range(first, first + TOGETHER)

    def step(group, carry, queries=queries):
      slots = [group * p.width + i for i in range(p.width)]
      seen, at = [], []
      for c in queries:
        begin = [begins[0, c, i] for i in slots]
        count = [counts[0, c, i] for i in slots]
        start = begin if p.aligned else [jax.lax.bitwise_and(x, -TILE) for x in begin]
        off = None if p.aligned else [x - y for x, y in zip(begin, start, strict=True)]
        seen.append(_seen(p, off, count))
        at.append([pl.ds(pl.multiple_of(x, TILE), p.span) for x in start])
      rows = lambda ref, c: jnp.concatenate([ref[0, i, :] for i in at[c - queries[0]]], axis=0)  # noqa: E731
      logits = [dot(q_ref[0, c], rows(k_ref, c), (1, 1)) for c in queries]
      logits = [jnp.where(s, scale * x, NOTHING) for s, x in zip(seen, logits, strict=True)]
      top = [
        jnp.maximum(old[0], jnp.max(x, axis=1, keepdims=True))
        for old, x in zip(carry, logits, strict=True)
      ]
      # Of a query that has seen nothing yet, all are e^0.
      weights = [jnp.where(s, jnp.exp(x - m), 0) for s, x, m in zip(seen, logits, top, strict=True)]
      sums = [
        dot(w.astype(p.dtype), rows(v_ref, c), (1, 0))
        for w, c in zip(weights, queries, strict=True)
      ]
      out = []
      for (m, total, acc), new, w, x in zip(carry, top, weights, sums, strict=True):
        before = jnp.exp(m - new)
        out.append((new, total * before + jnp.sum(w, axis=1, keepdims=True), acc * before + x))
      return tuple(out)

    column = lambda x: jnp.full((p.rows, 1), x, jnp.float32)  # noqa: E731
    empty = column(NOTHING), column(0.0), jnp.zeros((p.rows, p.V), jnp.float32)
    carry = (empty,) * TOGETHER
    if p.ranges == 1:
      n = p.slots // p.width
      carry = step(0, carry) if n == 1 else jax.lax.fori_loop(0, n, step, carry)
    else:
      carry = jax.lax.fori_loop(0, groups[0, 0, 0, first // TOGETHER], step, carry)
    for c, (top, total, acc) in zip(queries, carry, strict=True):
      some = total > 0
      total = jnp.where(some, total, 1)
      o_ref[0, c] = (acc / total).astype(o_ref.dtype)
      lse.append(jnp.where(some, top + jnp.log(total), NOTHING))
  lse_ref[0] = transposed(jnp.concatenate(lse, axis=1))


def _call(p: Plan, scale, vmem, interpret, groups, begins, counts, q, k, v):
  steps = p.T // _QUERIES

  def by_query(x, rows=_QUERIES, **space):
    shape = (1, rows, *x.shape[2:])
    zeros = (0,) * (len(shape) - 2)
    return pl.BlockSpec(shape, lambda b, i: (b * p.groups + i // steps, i % steps, *zeros), **space)

  def by_key(x):
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, i: (b, 0, 0), pipeline_mode=pl.Buffered(1))

  smem = pltpu.SMEM
  G = q.shape[0]
  dtype = q.dtype if p.ranges == 1 else jnp.float32
  outs = [
    jax.ShapeDtypeStruct((G, p.T, p.rows, p.V), dtype),
    jax.ShapeDtypeStruct((G, p.T, p.rows), jnp.float32),
  ]
  specs = [
    by_query(groups, 1, memory_space=smem),
    *(by_query(x, memory_space=smem) for x in (begins, counts)),
  ]
  return pl.pallas_call(
    functools.partial(_kernel, p, scale),
    name="block_sparse_forward",
    grid=(p.B * p.heads, p.groups * steps),
    in_specs=[*specs, by_query(q), by_key(k), by_key(v)],
    out_specs=[by_query(x) for x in outs],
    out_shape=outs,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=None if interpret else vmem,
      disable_bounds_checks=True,  # the tables are made here, of what is in range
    ),
    cost_estimate=p.cost,
    interpret=interpret,
  )(groups, begins, counts, q, k, v)


def forward(q, k, v, blocks: Blocks, scale: float, vmem: int, interpret=False):
  """The outputs and lse, -inf where a query sees nothing.

  Args:
    vmem: bytes that there are.
  """
  p = Plan.of(q, k, v, blocks, vmem)
  T, Tk = q.shape[1], k.shape[1]
  begins, counts = _places(p, blocks, T)
  queries = _by_group(p, q.astype(p.dtype))
  keys = [jnp.moveaxis(x.astype(p.dtype), 2, 1).reshape(-1, Tk, x.shape[3]) for x in (k, v)]
  padded = [jnp.pad(x, ((0, 0), (0, p.ranges * p.keys + p.span - Tk), (0, 0))) for x in keys]
  call = functools.partial(_call, p, scale, vmem, interpret)
  if p.ranges == 1:
    o, lse = call(
      jnp.zeros((queries.shape[0], p.T // _QUERIES, 1, 1), jnp.int32),
      begins,
      counts,
      queries,
      *padded,
    )
  else:
    o, lse = _in_ranges(p, call, begins, counts, queries, padded)
  lse = jnp.where(lse > NOTHING / 2, lse, -jnp.inf)
  return _from_groups(p, o.astype(q.dtype), T), _from_groups(p, lse, T)


def _in_ranges(p: Plan, call, begins, counts, queries, padded):
  """One range of keys after the other, each query with its blocks there."""

  def one(carry, at):
    low, k, v = at
    here = (begins >= low) & (begins < low + p.keys) & (counts > 0)
    # Those first that are here.
    first = jnp.where(here, begins - low, jnp.iinfo(jnp.int32).max)
    first, count = jax.lax.sort((first, jnp.where(here, counts, 0)), dimension=2, num_keys=1)
    first = jnp.where(count > 0, first, 0)
    n = jnp.max(
      jnp.sum(here, axis=2, dtype=jnp.int32).reshape(*begins.shape[:1], -1, TOGETHER), axis=2
    )
    n = -(-n // p.width)
    new, new_lse = call(
      n.reshape(n.shape[0], -1, 1, _QUERIES // TOGETHER), first, count, queries, k, v
    )
    o, lse = carry
    both = jnp.logaddexp(lse, new_lse)
    return (
      o * jnp.exp(lse - both)[..., None] + new * jnp.exp(new_lse - both)[..., None],
      both,
    ), None

  low = jnp.arange(p.ranges, dtype=jnp.int32) * p.keys
  parts = [
    jnp.stack([x[:, r * p.keys : (r + 1) * p.keys + p.span] for r in range(p.ranges)])
    for x in padded
  ]
  shape = (*queries.shape[:3], p.V)
  nothing = jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], NOTHING, jnp.float32)
  return jax.lax.scan(one, nothing, (low, *parts))[0]


def _by_group(p: Plan, x: Array) -> Array:
  """[B, T, H, ...] -> [B Hkv groups, T, rows, ...], padded."""
  x = x.reshape(*x.shape[:2], p.heads * p.groups, p.rows, *x.shape[3:])
  x = jnp.moveaxis(_pad(x, 1, p.T), 2, 1)
  return x.reshape(-1, *x.shape[2:])


def _from_groups(p: Plan, x: Array, T: int) -> Array:
  """The inverse of ``_by_group``."""
  x = x.reshape(p.B, p.heads * p.groups, *x.shape[1:])
  x = jnp.moveaxis(x, 1, 2)[:, :T]
  return x.reshape(p.B, T, -1, *x.shape[4:])
