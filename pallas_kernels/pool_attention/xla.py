"""Attention to pools in plain jax.numpy: all pools of some queries at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.select import over_queries
from pallas_kernels.dispatch import at_a_time


def attend(q, k, v, first, complete, scale):
  """As ``pool_attention``."""
  (B, N), V, dtype = k.shape[:2], v.shape[3], jnp.result_type(q, k, v)

  def some(q, first, complete):
    logits, seen = _logits(q, k, first, complete, scale)
    p, top, total = _exponentials(logits, seen)
    some = total > 0
    total = jnp.where(some, total, 1)
    p = (p / total).astype(dtype)
    o = jnp.einsum("bgrtn,bngv->btgrv", p, v.astype(dtype), precision="highest").astype(q.dtype)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    return o.reshape(*q.shape[:3], V), jnp.moveaxis(lse, 3, 1).reshape(q.shape[:3])

  return over_queries(some, at_a_time(4 * B * q.shape[2] * N), q, first, complete)


def weights(q, k, first, complete, scale, lse):
  """As ``pool_weights``."""
  logits, seen = _logits(q, k, first, complete, scale)
  B, T, G = *q.shape[:2], k.shape[2]
  if lse is None:
    _, top, total = _exponentials(logits, seen)
    lse = top + jnp.log(jnp.where(total > 0, total, 1))
  else:
    lse = jnp.moveaxis(lse.reshape(B, T, G, -1), 1, 3)[..., None]
  return jnp.exp(jnp.where(seen, logits - lse, -jnp.inf)).sum(axis=2)


def _exponentials(logits, seen):
  """Of what is seen, less the greatest; that, and their sum, [..., 1]."""
  top = jnp.max(jnp.where(seen, logits, -jnp.inf), axis=-1, keepdims=True)
  top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
  p = jnp.where(seen, jnp.exp(jnp.where(seen, logits - top, 0)), 0)
  return p, top, jnp.sum(p, axis=-1, keepdims=True)


def _logits(q, k, first, complete, scale):
  """[B, G, R, T, N], in float32 (float64 for float64 inputs), and whether they are seen."""
  (B, T), (N, G) = q.shape[:2], k.shape[1:3]
  inputs = jnp.result_type(q, k)
  logits = jnp.einsum(
    "btgrk,bngk->bgrtn",
    q.reshape(B, T, G, -1, q.shape[3]).astype(inputs),
    k.astype(inputs),
    precision="highest",
    preferred_element_type=jnp.promote_types(inputs, jnp.float32),
  )
  number = jnp.arange(N) - first[..., None]
  seen = (number >= 0) & (number < complete[..., None])
  return scale * logits, seen[:, None, None]
