"""Block-sparse attention as Pallas Mosaic GPU kernels for Hopper: neighbouring queries visit their blocks together.

A warpgroup's matrices have 64 rows: some neighbouring queries times the heads of their group. Each block that one of
the queries chose is loaded once for all of them, and hidden from those that did not choose it. What neighbours share,
and with trained indexers they share most, is neither read nor multiplied twice.

The backward pass (``gpu_backward.py``) has three kernels. One walks the same blocks again for the gradients of queries.
For those of keys and values the table is inverted: each tile of keys walks the queries that chose it, a matrix of them
at a time (tiles of queries, where a query has fewer than 8 rows, which bulk copies do not take alone). Some keys (a
document's first, say) are visited by all queries; the walks are cut in parts of equal length, each with sums of its
own, which the third kernel adds. (XLA's ``segment_sum`` took longer for that than all else together.)

Not served: blocks of single tokens (DSA). A Hopper GPU's bulk copies take rows that lie together; chosen tokens would
be copied row by row, the bytes that XLA's gather reads. Nor the window: that is plain attention, merged by ``api.py``.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.block_sparse import gpu_backward, gpu_tables
from pallas_kernels.block_sparse.gpu_tiles import (
  COLUMN,
  HIDDEN,
  LEAST,
  LOG2E,
  ROWS,
  Plan,
  add,
  call,
  folded,
  load,
  operand,
  padded,
  product,
  program,
  row_facts,
  seen,
  spread,
  store,
  walk,
  zeros,
)
from pallas_kernels.block_sparse.reference import Blocks, values_of


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
  if blocks.size % ROWS:
    raise NotImplementedError(f"the GPU kernel has blocks of multiples of {ROWS} tokens")
  D, V, heads = q.shape[3], v.shape[3], q.shape[2] // blocks.indices.shape[1]
  if D % 64 or V % 64 or D > 192 or V > 192:
    raise NotImplementedError(
      f"the GPU kernel has keys and values of 64, 128 or 192; got {D} and {V}"
    )
  if heads > ROWS:
    raise NotImplementedError(f"a group has {heads} heads; the GPU kernel takes up to {ROWS}")


def _forward_kernel(
  p: Plan, scale, q, k, v, rows, least, first, chosen, count, o, lse, k_s, v_s, rows_s, ready, k_ready,
  v_ready, spare=None,
):  # fmt: skip
  batch, group, tile = place = program()
  q_s = k_s.at[k_s.shape[0] - 1]
  load(p, q, q_s, ready, *place)
  plgpu.copy_gmem_to_smem(rows.at[place], rows_s, ready)
  over_keys = walk(p, k, v, first, chosen, count, k_s, v_s, k_ready, v_ready)
  plgpu.barrier_wait(ready)
  (bits, last), least = row_facts(rows_s, COLUMN), least[batch, tile]
  at_once, unit = folded(scale)
  queries = operand(q_s, spare)

  def step(x, carry):
    top, total, acc = carry
    plgpu.barrier_wait(x.k_ready)
    logits = product(queries, x.k_s.T) * at_once
    x.free_k()
    logits, mine = seen(p, logits, x, last, least), (bits & x.chosen) != 0
    new = jnp.where(mine, jnp.maximum(top, jnp.max(logits, axis=1) * unit), top)
    weights = jnp.exp2(logits * unit - spread(jnp.where(mine, new, -HIDDEN), 0))
    before = jnp.exp2(top - new)
    total = total * before + jnp.sum(weights, axis=1)
    plgpu.barrier_wait(x.v_ready)
    acc = add(acc * spread(before, 0, p.V), weights.astype(x.v_s.dtype), x.v_s, spare)
    x.free_v()
    return new, total, acc

  def vector(x):
    return plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), COLUMN)

  top, total, acc = over_keys(step, (vector(LEAST), vector(0.0), zeros(p.V)))
  some = total > 0
  share = jnp.where(some, 1 / jnp.where(some, total, 1), 0)
  # The outputs leave through memory of values: two programs fit an SM, and hide each other's waits.
  o_s = v_s.at[0]
  o_s[...] = (acc * spread(share, 0, p.V)).astype(o_s.dtype)
  store(p, o_s, o, *place)
  nothing = vector(-jnp.inf)
  logs = (top + jnp.log2(jnp.where(some, total, 1))) * (1 / LOG2E)
  lse[batch, group, pl.ds(tile * ROWS, ROWS)] = jnp.where(some, logs, nothing)
  plgpu.wait_smem_to_gmem(0)


def forward(q, k, v, blocks: Blocks, scale: float, interpret=None):
  """As ``reference.forward``, without sinks and the keys of the window."""
  return _attend(q, k, values_of(k, v), blocks, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, blocks, scale, interpret):
  return _attend_forward(q, k, v, blocks, scale, interpret)[0]


def _attend_forward(q, k, v, blocks, scale, interpret):
  p = Plan.of(q, k, v, blocks)
  visits = gpu_tables.visits(blocks, p.tokens, k.shape[1])
  last = blocks.last_seen(p.tiles * p.tokens)
  queries, rows = p.by_unit(q), p.of_rows(last)
  tables = p.least(last), visits.first, visits.chosen, visits.count
  operands = queries, padded(p, k), padded(p, v), rows, *tables
  outs = (
    jax.ShapeDtypeStruct((*queries.shape[:2], p.V), q.dtype),
    jax.ShapeDtypeStruct((p.B, p.groups, p.tiles * ROWS), jnp.float32),
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
  o, lse = call(p, kernel, name, operands, outs, scratch, grid, interpret)
  o, lse = p.from_units(o, q), p.from_tiles(lse, q)
  return (o, lse), (q, k, v, blocks, o, lse)


_attend.defvjp(_attend_forward, gpu_backward.backward)
