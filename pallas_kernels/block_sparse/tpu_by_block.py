"""Block-sparse attention on TPUs, block by block: for groups of few heads; ``tpu_tiles`` says how it walks.

A tile's blocks are walked twice: for the greatest logit of each row, and then for the sums, which need not be scaled
anew from block to block. Long blocks are walked once (``tpu_long``). Results of ranges of keys are merged by their
denominators.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse import tpu_long
from pallas_kernels.block_sparse import tpu_tiles as tiles
from pallas_kernels.block_sparse.reference import Blocks

# Rows of ``facts``.
_LAST, _TOP, _TOTAL = 0, 1, 2


def forward(q, k, v, blocks: Blocks, scale: float, vmem: int, interpret=False):
  """The outputs and lse, -inf where a query sees nothing.

  Args:
    vmem: bytes that there are.
  """
  p = tiles.Plan.of(q, k, v, blocks, vmem, backward=False)
  dtype, G = jnp.result_type(q, k, v), blocks.indices.shape[1]
  call = tiles.Call.of(p, blocks, k.shape[1], None if interpret else vmem)
  last = blocks.last_seen(q.shape[1])[:, :, None]
  queries = p.units(q.astype(dtype), G)
  last = p.row(jnp.broadcast_to(last, q.shape[:3]), G)
  parts = [p.in_ranges(x.astype(dtype)) for x in (k, v)]
  shape = (*queries.shape[:3], v.shape[3])
  one = p.ranges == 1
  outs = [
    jax.ShapeDtypeStruct(shape, q.dtype if one else jnp.float32),
    jax.ShapeDtypeStruct(last.shape, jnp.float32),
  ]
  scratch = [tiles.facts_memory(p), pltpu.VMEM(shape[1:], jnp.float32)]
  scratch += [tpu_long.sums_memory(p, v.shape[3])] if p.long else []
  products = 2 * q.shape[3] + v.shape[3]

  def run(low, k, v):
    kernel = functools.partial(_kernel, p, scale)
    by_query, by_key = (queries, last), (k, v)
    name = "block_sparse_forward"
    o, lse = call(kernel, name, by_query, by_key, outs, [], scratch, products, low)
    return o, lse[:, :, : p.rows]

  if one:
    o, lse = run(0, *(x[0] for x in parts))
  else:

    def merge(before, at):
      (o, lse), (new, new_lse) = before, run(*at)
      both = jnp.logaddexp(lse, new_lse)
      share, new_share = (jnp.exp(x - both)[..., None] for x in (lse, new_lse))
      return (o * share + new * new_share, both), None

    nothing = jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], tiles.NOTHING, jnp.float32)
    lows = jnp.arange(p.ranges, dtype=jnp.int32) * p.keys
    (o, lse), _ = jax.lax.scan(merge, nothing, (lows, *parts))
  lse = jnp.where(lse > tiles.NOTHING / 2, lse, -jnp.inf)
  return p.from_units(o, q, G).astype(q.dtype), p.from_units(lse, q, G)


def _kernel(
  p: tiles.Plan, scale, walk, q_ref, last_ref, k_ref, v_ref, o_ref, lse_ref, facts_ref, acc_ref, *sums_ref
):  # fmt: skip
  acc_ref[...] = jnp.zeros_like(acc_ref)
  tiles.gather_facts(facts_ref, [last_ref])

  def empty(first, count):
    for i in range(count):
      facts_ref[first + i, _TOP : _TOP + 1, :] = jnp.full((1, tiles.LANES), tiles.EMPTY)
      facts_ref[first + i, _TOTAL : _TOTAL + 1, :] = jnp.zeros((1, tiles.LANES))

  tiles.over_units(facts_ref.shape[0], empty)

  if p.long:
    tpu_long.attend(
      p, scale, walk, _TOP, _TOTAL, facts_ref, q_ref, k_ref, v_ref, acc_ref, *sums_ref
    )
  else:
    _attend_twice(p, scale, walk, facts_ref, q_ref, k_ref, v_ref, acc_ref)

  def finish(first, count):
    facts = [facts_ref[first + i] for i in range(count)]
    top, total = (
      jnp.concatenate([x[fact : fact + 1] for x in facts], axis=0) for fact in (_TOP, _TOTAL)
    )
    some = total > 0
    total = jnp.where(some, total, 1)
    lse_ref[0, pl.ds(first, count), :] = jnp.where(some, top + jnp.log(total), tiles.NOTHING)
    columns = tiles.transposed(1 / total)
    for i in range(count):
      o_ref[0, first + i] = (acc_ref[first + i] * columns[: p.rows, i : i + 1]).astype(o_ref.dtype)

  tiles.over_units(facts_ref.shape[0], finish)


def _attend_twice(p: tiles.Plan, scale, walk, facts_ref, q_ref, k_ref, v_ref, acc_ref):
  def logits(number):
    item = walk.item(number, facts_ref)
    x = scale * tiles.dot(k_ref[0, item.keys, :], item.by.rows(q_ref), (1, 1))
    return item, x

  def greatest(numbers):
    found = []
    for item, x in map(logits, numbers):
      x = jnp.max(jnp.where(item.seen, x, tiles.NOTHING), axis=0, keepdims=True)
      found.append((item, walk.again(x, jnp.maximum, tiles.NOTHING)))
    for item, tops in found:
      for u, top in zip(item.by.units, tops, strict=True):
        old = facts_ref[u, _TOP : _TOP + 1, :]
        facts_ref[u, _TOP : _TOP + 1, :] = jnp.maximum(old, top)

  walk.over(greatest)

  def sums(numbers):
    found = []
    for item, x in map(logits, numbers):
      x = jnp.exp(jnp.where(item.seen, x - item.by.facts[_TOP : _TOP + 1], tiles.NOTHING))
      totals = walk.again(jnp.sum(x, axis=0, keepdims=True), jnp.add, 0.0)
      v = v_ref[0, item.keys, :]
      found.append((item, totals, tiles.dot(x.astype(v.dtype), v, (0, 0))))
    for item, totals, o in found:
      for i, (u, total) in enumerate(zip(item.by.units, totals, strict=True)):
        facts_ref[u, _TOTAL : _TOTAL + 1, :] += total
        acc_ref[u] += o[i * p.rows : (i + 1) * p.rows]

  walk.over(sums)
