"""Block-sparse attention on TPUs, kernels of long blocks (MoBA's); ``tpu_tiles`` says how they walk.

A block's visitors are gathered once, and meet its keys a piece at a time. What is summed up by channel is
[channels, rows]: what scales a row is a row of numbers, and it is the keys and values that are transposed for the
matrix unit, not the larger logits.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse import tpu_tiles as tiles


def sums_memory(p: tiles.Plan, channels: int):
  """Scratch memory for what is summed up of an item's rows."""
  return pltpu.VMEM((channels, p.most * p.rows), jnp.float32)


def _over(walk, facts_ref, begin, piece, end) -> None:
  """Of each item: ``begin(visitors)``, ``piece(visitors, item, carry)`` of each piece, ``end(visitors, carry)``."""
  p = walk.p

  def one(number, nothing):
    by = walk.visitors(number, facts_ref)

    def some(i, carry):
      item = by.item(i)
      return jax.lax.cond(
        by.start + i * p.piece <= walk.last, lambda c: piece(by, item, c), lambda c: c, carry
      )

    end(by, jax.lax.fori_loop(0, p.span // p.piece, some, begin(by)))
    return nothing

  jax.lax.fori_loop(0, walk.count, one, 0)


def attend(p, scale, walk, top, total, facts_ref, q_ref, k_ref, v_ref, acc_ref, sums_ref) -> None:
  """Adds a tile's blocks to what it has seen: the greatest logit and the denominator of each row, rows ``top`` and
  ``total`` of its facts, and the sums of values [units, rows, V]."""

  def begin(by):
    acc = jnp.concatenate([acc_ref[u] for u in by.units], axis=0)
    sums_ref[...] = acc.T
    return by.facts[top : top + 1], by.facts[total : total + 1]

  def piece(by, item, carry):
    old, denominator = carry
    x = scale * tiles.dot(k_ref[0, item.keys, :], by.rows(q_ref), (1, 1))
    x = jnp.where(item.seen, x, tiles.NOTHING)
    new = jnp.maximum(old, jnp.max(x, axis=0, keepdims=True))
    left, x = jnp.exp(old - new), jnp.exp(x - new)
    v = v_ref[0, item.keys, :]
    sums_ref[...] = sums_ref[...] * left + tiles.dot(v, x.astype(v.dtype), (0, 0))
    return new, denominator * left + jnp.sum(x, axis=0, keepdims=True)

  def end(by, carry):
    acc = sums_ref[...].T
    tops, totals = (walk.again(x, jnp.maximum, tiles.NOTHING) for x in carry)
    # Backwards: what lies beyond the visitors are others, or some of them as they were.
    for i, u in reversed(list(enumerate(by.units))):
      facts_ref[u, top : top + 1, :] = tops[i]
      facts_ref[u, total : total + 1, :] = totals[i]
      acc_ref[u] = acc[i * p.rows : (i + 1) * p.rows]

  _over(walk, facts_ref, begin, piece, end)


def add_gradients(
  p, scale, walk, lse, delta, facts_ref, q_ref, do_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref, sums_ref
) -> None:  # fmt: skip
  """Adds a tile's gradients. ``lse`` and ``delta`` are rows of its facts."""

  def begin(by):
    del by
    sums_ref[...] = jnp.zeros_like(sums_ref)
    return 0

  def piece(by, item, carry):
    q, do = by.rows(q_ref), by.rows(do_ref)
    k, v = k_ref[0, item.keys, :], v_ref[0, item.keys, :]
    logits = scale * tiles.dot(k, q, (1, 1)) - by.facts[lse : lse + 1]
    weights = jnp.exp(jnp.where(item.seen, logits, tiles.NOTHING))
    dlogits = weights * (tiles.dot(v, do, (1, 1)) - by.facts[delta : delta + 1])
    dlogits = dlogits.astype(k.dtype)
    dv_ref[0, item.keys, :] += tiles.dot(weights.astype(do.dtype), do, (1, 0))
    dk_ref[0, item.keys, :] += tiles.dot(dlogits, q, (1, 0))
    sums_ref[...] += tiles.dot(k, dlogits, (0, 0))
    return carry

  def end(by, carry):
    del carry
    dq = sums_ref[...].T
    for i, u in enumerate(by.units):
      dq_ref[0, u] += dq[i * p.rows : (i + 1) * p.rows]

  _over(walk, facts_ref, begin, piece, end)
