"""Gradients of block-sparse attention as Pallas Mosaic GPU kernels; see ``gpu.py``."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse import gpu_tables
from pallas_kernels.block_sparse.gpu_tiles import (
  COLUMN,
  HIDDEN,
  LOG2E,
  MATRIX,
  ROW,
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

# Visits of a part of a walk over queries.
_PART = 1024


def _queries_kernel(
  p: Plan, scale, q, k, v, do, rows, least, first, chosen, count, dq, q_s, k_s, v_s, rows_s, ready,
  k_ready, v_ready, spare=None,
):  # fmt: skip
  batch, _, tile = place = program()
  load(p, q, q_s, ready, *place)
  do_s = v_s.at[v_s.shape[0] - 1]
  load(p, do, do_s, ready, *place)
  plgpu.copy_gmem_to_smem(rows.at[place], rows_s, ready)
  over_keys = walk(p, k, v, first, chosen, count, k_s, v_s, k_ready, v_ready)
  plgpu.barrier_wait(ready)
  (bits, last, lse, delta), least = row_facts(rows_s, COLUMN), least[batch, tile]
  at_once, unit = folded(scale)
  cotangents = operand(do_s, spare)

  def step(x, dq):
    plgpu.barrier_wait(x.k_ready)
    logits = product(q_s, x.k_s.T) * at_once
    logits, mine = seen(p, logits, x, last, least), (bits & x.chosen) != 0
    weights = jnp.exp2(logits * unit - spread(jnp.where(mine, lse, -HIDDEN), 0))
    plgpu.barrier_wait(x.v_ready)
    dweights = product(cotangents, x.v_s.T)
    x.free_v()
    dlogits = weights * (dweights * scale - spread(delta, 0))
    dq = add(dq, dlogits.astype(x.k_s.dtype), x.k_s, spare)
    x.free_k()
    return dq

  q_s[...] = over_keys(step, zeros(p.D)).astype(q_s.dtype)
  store(p, q_s, dq, *place)
  plgpu.wait_smem_to_gmem(0)


def _keys_kernel(
  p: Plan, scale, q, k, v, do, rows, first, stop, chosen, who, keys, begins, ends, dk, dv, k_s,
  v_s, q_s, do_s, rows_s, kv_ready, q_ready, do_ready, done, spare=None,
):  # fmt: skip
  """A step has 64 rows of those who visit the keys, whether they are neighbours or not.

  One warpgroup has the sums of keys, one those of values: together they are more than a warpgroup's registers.
  """
  batch, group, part = program()
  head = jax.lax.div(group, jnp.int32(p.groups // p.heads))
  start = keys[batch, group, part] * ROWS
  begin, end = begins[batch, group, part], ends[batch, group, part]
  steps = jax.lax.div(end - begin + (p.copies - 1), jnp.int32(p.copies))
  stages, of_keys = q_s.shape[0], jax.lax.axis_index("warpgroup") == 0
  at_once, unit = folded(scale)

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
    at = batch, pl.ds(start, ROWS), head
    plgpu.copy_gmem_to_smem(k.at[at], k_s, kv_ready)
    plgpu.copy_gmem_to_smem(v.at[at], v_s, kv_ready)
    for i in map(jnp.int32, range(stages)):
      pl.when(i < steps)(lambda i=i: fetch(i, of_visits(who, i)))

  plgpu.barrier_wait(kv_ready)
  if p.copies > 1:
    # Of columns. (Mosaic's search for layouts did not end where nothing reads it.)
    unit_of = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) // p.unit

  def columns(numbers):
    """Of a number or a vector of each visit: the one of each column's visit."""
    return functools.reduce(
      lambda total, x: jnp.where(unit_of == x[0], x[1], total),
      enumerate(numbers[1:], 1),
      plgpu.layout_cast(jnp.broadcast_to(numbers[0], (ROWS,)), ROW),
    )

  def weights_of(step):
    slot = jax.lax.rem(step, jnp.int32(stages))
    origins, stops = of_visits(first, step), of_visits(stop, step)
    plgpu.barrier_wait(q_ready.at[slot])
    # Turned: keys are rows, and a query's rows are columns.
    if p.copies == 1:
      mine, last, lse, delta = row_facts(rows_s.at[slot, 0], ROW)
    else:
      facts = (
        [plgpu.load(rows_s.at[slot, i, j], (), layout=ROW) for i in range(p.copies)]
        for j in range(2)
      )
      lse, delta = (jax.lax.bitcast_convert_type(columns(x), jnp.float32) for x in facts)
    logits = product(k_s, q_s.at[slot].T) * at_once

    def some():
      row = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=MATRIX) + start
      if p.copies == 1:
        seen = (row >= origins[0]) & (
          row <= spread(jnp.minimum(last, origins[0] + (p.size - 1)), 1)
        )
      else:
        seen = (row >= spread(columns(origins), 1)) & (row < spread(columns(stops), 1))
      return jnp.where(seen, logits, HIDDEN)

    # In the order of keys, the last begins last.
    whole = (start >= origins[-1]) & (start + ROWS <= functools.reduce(jnp.minimum, stops))
    logits = jax.lax.cond(whole, lambda: logits, some)
    if p.copies == 1:
      there = (mine & of_visits(chosen, step)[0]) != 0
    else:
      there = unit_of < end - begin - step * p.copies
    weights = jnp.exp2(logits * unit - spread(jnp.where(there, lse, -HIDDEN), 1))
    plgpu.barrier_wait(do_ready.at[slot])
    return slot, weights, delta

  def keys_step(step, sums):
    slot, weights, delta = weights_of(step)
    dweights = product(v_s, do_s.at[slot].T)
    dlogits = weights * (dweights * scale - spread(delta, 1))
    sums = add(sums, dlogits.astype(k_s.dtype), q_s.at[slot], spare)
    plgpu.barrier_arrive(done.at[slot])
    return sums

  def values_step(step, sums):
    # Read long before they are needed.
    later = of_visits(who, step + stages)
    slot, weights, _ = weights_of(step)
    sums = add(sums, weights.astype(k_s.dtype), do_s.at[slot], spare)
    plgpu.barrier_arrive(done.at[slot])
    plgpu.barrier_wait(done.at[slot])
    pl.when(step + stages < steps)(lambda: fetch(step + stages, later))
    return sums

  def write(step, out, width):
    out[batch, group, part] = jax.lax.fori_loop(0, steps, step, zeros(width))

  # Nobody reads a part that is of nothing.
  some = begin < end
  pl.when(some & of_keys)(lambda: write(keys_step, dk, p.D))
  pl.when(some & jnp.logical_not(of_keys))(lambda: write(values_step, dv, p.V))


def _sums_kernel(p: Plan, dk_parts, dv_parts, parts, dk, dv, dk_s, dv_s, **_):
  """Adds the parts of a tile of keys, of all groups of its head."""
  batch, head, tile = program()
  each = p.groups // p.heads

  def write(x, out_s, out):
    def of_group(group, total):
      def add(part, total):
        return total + plgpu.load(x.at[batch, group, part], (), layout=MATRIX, optimized=False)

      return jax.lax.fori_loop(parts[batch, group, tile], parts[batch, group, tile + 1], add, total)

    total = jax.lax.fori_loop(head * each, (head + 1) * each, of_group, zeros(x.shape[-1]))
    out_s[...] = total.astype(out_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out.at[batch, pl.ds(tile * ROWS, ROWS), head])

  write(dk_parts, dk_s, dk)
  write(dv_parts, dv_s, dv)
  plgpu.wait_smem_to_gmem(0)


def backward(scale, interpret, residuals, cotangents):
  """Gradients of queries, keys and values, like them; ``residuals``: what the forward pass took, o and lse."""
  q, k, v, blocks, o, lse = residuals
  do, dlse = cotangents
  p = Plan.of(q, k, v, blocks)
  # The softmax's derivative: dlogits = p (do . v - delta).
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
  # Along rows: in the order of tiles XLA would take four times as long to read them.
  delta = jax.lax.optimization_barrier(delta) - dlse
  finite = jnp.where(lse == -jnp.inf, 0, lse) * LOG2E
  visits = gpu_tables.visits(blocks, p.tokens, k.shape[1])
  last = blocks.last_seen(p.tiles * p.tokens)
  numbers = p.by_tile(finite), p.by_tile(delta * scale)
  rows = p.of_rows(last, *numbers)
  arrays = p.by_unit(q), padded(p, k), padded(p, v), p.by_unit(do.astype(q.dtype))
  dq = _queries(p, scale, (*arrays, rows, p.least(last)), visits, interpret)
  if p.copies == 1:
    by = visits.first, visits.chosen, p.least(last)
  else:
    by = gpu_tables.firsts(blocks, p.tiles * p.tokens), None, last
  table = gpu_tables.visitors(*by, blocks, ROWS, p.Tk, _PART)
  dk, dv = _keys(p, scale, (*arrays, p.of_visits(rows, *numbers)), table, interpret)
  return p.from_units(dq, q), dk[:, : k.shape[1]], dv[:, : k.shape[1]], None


def _queries(p: Plan, scale, arrays, visits, interpret):
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
  return call(p, kernel, name, operands, out, scratch, grid, interpret)


def _keys(p: Plan, scale, arrays, table, interpret):
  """The gradients of keys and values, [B, Tk, heads, ...] bfloat16, padded as they are."""
  parts, rows = table.keys.shape[2], arrays[-1]
  outs = tuple(
    jax.ShapeDtypeStruct((p.B, p.groups, parts, ROWS, d), jnp.float32) for d in (p.D, p.V)
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
  sums = call(p, kernel, name, operands, outs, scratch, grid, interpret, warpgroups=2)
  return sum_parts(p, *sums, table.parts, interpret)


def sum_parts(p: Plan, dk, dv, parts, interpret):
  """The sums of parts, [B, G, parts, 64, ...] float32, of each tile of keys; as ``_keys`` returns them."""
  outs = tuple(jax.ShapeDtypeStruct((p.B, p.Tk, p.heads, d), jnp.bfloat16) for d in (p.D, p.V))
  kernel, scratch = functools.partial(_sums_kernel, p), dict(dk_s=p.matrix(p.D), dv_s=p.matrix(p.V))
  grid, name = (p.heads, p.Tk // ROWS), "block_sparse_sums"
  return call(p, kernel, name, (dk, dv, parts), outs, scratch, grid, interpret)
