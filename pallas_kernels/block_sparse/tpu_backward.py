"""The backward pass of block-sparse attention as a Pallas kernel for TPUs; ``tpu_tiles`` says how it walks.

The gradients of a block's keys and values are in VMEM, and are read and written once for all visitors of an item.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse import tpu_long
from pallas_kernels.block_sparse import tpu_tiles as tiles
from pallas_kernels.block_sparse.reference import Blocks

# Rows of ``facts``.
_LAST, _LSE, _DELTA = 0, 1, 2


def gradients(q, k, v, do, lse, delta, blocks: Blocks, scale: float, vmem: int, interpret=False):
  """Of q, k and v, float32.

  Args:
    do: gradient of the outputs.
    lse: logarithms of the softmax's denominators, finite.
    delta: what the softmax subtracts: the product of outputs and their gradients, less the gradient of lse.
    vmem: bytes that there are.
  """
  p = tiles.Plan.of(q, k, v, blocks, vmem, backward=True)
  dtype, G = jnp.result_type(q, k, v), blocks.indices.shape[1]
  (B, Tk, Hkv), (D, V) = k.shape[:3], (k.shape[3], v.shape[3])
  call = tiles.Call.of(p, blocks, Tk, None if interpret else vmem)
  last = blocks.last_seen(q.shape[1])[:, :, None]
  last = jnp.broadcast_to(last, q.shape[:3])
  by_query = [p.units(x.astype(dtype), G) for x in (q, do)]
  by_query += [p.row(x, G) for x in (last, lse, delta)]
  float32 = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)  # noqa: E731
  scratch = [tiles.facts_memory(p), *([tpu_long.sums_memory(p, D)] if p.long else [])]

  def run(dq, at):
    low, k, v = at
    kernel = functools.partial(_kernel, p, scale)
    queries = (*by_query, *dq)  # in whose place come the sums with what this range adds
    aliases = [(len(by_query), 0)] if dq else []
    sums, outs = [float32(k), float32(v)], [float32(by_query[0])]
    products, name = 3 * D + 2 * V, "block_sparse_backward"
    new, *dkv = call(kernel, name, queries, (k, v), outs, sums, scratch, products, low, aliases)
    return (new,), dkv

  k, v = (p.in_ranges(x.astype(dtype)) for x in (k, v))
  if p.ranges == 1:
    (dq,), dkv = run((), (0, k[0], v[0]))
    dkv = [x[None] for x in dkv]
  else:
    lows = jnp.arange(p.ranges, dtype=jnp.int32) * p.keys
    zero = jnp.zeros(by_query[0].shape, jnp.float32)
    (dq,), dkv = jax.lax.scan(run, (zero,), (lows, k, v))

  def whole(x):
    # What is after a range is the beginning of the next. After the last there are no keys.
    out, after = x[:, :, : p.keys], x[:-1, :, p.keys :]
    out = out.at[1:, :, : p.span].add(after)
    out = jnp.moveaxis(out, 0, 1).reshape(B, Hkv, -1, x.shape[3])
    return jnp.moveaxis(out, 1, 2)[:, :Tk]

  dk, dv = map(whole, dkv)
  return p.from_units(dq, q, G) * scale, dk * scale, dv


def _kernel(p: tiles.Plan, scale, walk, q_ref, do_ref, last_ref, lse_ref, delta_ref, *refs):
  sums_ref = refs[-1:] if p.long else ()
  *before, k_ref, v_ref, dq_ref, dk_ref, dv_ref, facts_ref = refs[: len(refs) - len(sums_ref)]

  @pl.when(pl.program_id(1) == 0)
  def _():
    dk_ref[...] = jnp.zeros_like(dk_ref)
    dv_ref[...] = jnp.zeros_like(dv_ref)

  dq_ref[...] = before[0][...] if before else jnp.zeros_like(dq_ref)
  tiles.gather_facts(facts_ref, [last_ref, lse_ref, delta_ref])

  if p.long:
    tpu_long.add_gradients(
      p, scale, walk, _LSE, _DELTA, facts_ref, q_ref, do_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref, *sums_ref
    )  # fmt: skip
    return

  def add(numbers):
    found = []
    for number in numbers:
      item = walk.item(number, facts_ref)
      q, do, facts = item.by.rows(q_ref), item.by.rows(do_ref), item.by.facts
      k, v = k_ref[0, item.keys, :], v_ref[0, item.keys, :]
      lse, delta = facts[_LSE : _LSE + 1], facts[_DELTA : _DELTA + 1]
      logits = scale * tiles.dot(k, q, (1, 1)) - lse
      weights = jnp.exp(jnp.where(item.seen, logits, tiles.NOTHING))
      dlogits = (weights * (tiles.dot(v, do, (1, 1)) - delta)).astype(k.dtype)
      dv = tiles.dot(weights.astype(do.dtype), do, (1, 0))
      found.append((item, tiles.dot(dlogits, k, (0, 0)), tiles.dot(dlogits, q, (1, 0)), dv))
    for item, dq, dk, dv in found:
      dk_ref[0, item.keys, :] += dk
      dv_ref[0, item.keys, :] += dv
      for i, u in enumerate(item.by.units):
        dq_ref[0, u] += dq[i * p.rows : (i + 1) * p.rows]

  walk.over(add)
