"""Block-sparse attention on TPUs: what the kernels serve, and their derivative."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.block_sparse import tpu_backward, tpu_by_block, tpu_by_query, tpu_rows, xla
from pallas_kernels.block_sparse import tpu_tiles as tiles
from pallas_kernels.block_sparse.reference import Blocks, values_of

# Heads of a group that a query takes the matrix unit for; of fewer, several queries share a block.
_HEADS = 8


def check(q, k, v, blocks: Blocks) -> None:
  """Raises NotImplementedError, saying why, where the kernels cannot serve the call on this machine."""
  dispatch.needs_tpu(jnp.result_type(q, k, v))
  limitations(q, k, v, blocks)


def limitations(q, k, v, blocks: Blocks) -> None:
  """The part of ``check`` that does not ask where it runs."""
  dispatch.needs_float32(jnp.result_type(q, k, v))
  if blocks.size % tiles.TILE:
    return tpu_rows.limitations(q, k, v, blocks, dispatch.vmem())
  if by_query(q, blocks):
    tpu_by_query.Plan.of(q, k, v, blocks, dispatch.vmem())
  else:
    tiles.Plan.of(q, k, v, blocks, dispatch.vmem(), backward=False)
  tiles.Plan.of(q, k, v, blocks, dispatch.vmem(), backward=True)


def by_query(q, blocks: Blocks) -> bool:
  """Whether the forward kernel goes query by query, or block by block."""
  return q.shape[2] // blocks.indices.shape[1] >= _HEADS


def forward(q, k, v, blocks: Blocks, scale: float, interpret=False):
  """As ``reference.forward``, without sinks and the keys of the window."""
  if blocks.size % tiles.TILE:
    return xla.attend(q, k, v, blocks, scale, tpu_rows.Kernels(dispatch.vmem(), interpret))
  return _attend(q, k, values_of(k, v), blocks, scale, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, blocks, scale, interpret):
  forward = (tpu_by_query if by_query(q, blocks) else tpu_by_block).forward
  return forward(q, k, v, blocks, scale, dispatch.vmem(), interpret)


def _attend_forward(q, k, v, blocks, scale, interpret):
  o, lse = _attend(q, k, v, blocks, scale, interpret)
  return (o, lse), (q, k, v, blocks, o, lse)


def _attend_backward(scale, interpret, residuals, cotangents):
  q, k, v, blocks, o, lse = residuals
  do, dlse = cotangents
  # The softmax's derivative: dlogits = p (do . v - delta).
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
  finite = jnp.where(lse == -jnp.inf, 0, lse)
  grads = tpu_backward.gradients(
    q, k, v, do, finite, delta, blocks, scale, dispatch.vmem(), interpret
  )
  return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)
