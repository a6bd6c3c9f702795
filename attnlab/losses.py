"""Cross-entropy against a large vocabulary without the [tokens, vocabulary] array."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab import sharding

# Logits at a time: 2^26 float32 are 256 MiB.
_LOGITS = 1 << 26


def cross_entropy(
  x: Float[Array, "B T D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B T"],
  chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
  """``-log softmax(x head^T)[target]``, in float32, over chunks of the vocabulary in both directions.

  Tokens are split over all devices, and each has the whole head.

  Args:
    x: what the model ends with, in any dtype; the products are computed in it and summed in float32.
    head: the rows of the vocabulary.
    targets: ids below V.
    chunk: rows of the head at a time; None: as many as give 2^26 logits, at least 256.

  Returns:
    The loss and the log normaliser of each token, in nats, both differentiable; and 1.0 where the
    target has the largest logit.
  """
  B, T = targets.shape
  tokens = sharding.flatten_tokens(x)
  run = sharding.local(
    functools.partial(_cross_entropy, chunk),
    (("tokens", None), (None, None), ("tokens",)),
    (("tokens",),) * 3,
  )
  out = run(tokens, head.astype(x.dtype), sharding.flatten_tokens(targets))
  nll, lse, correct = (sharding.unflatten_tokens(y, B, T) for y in out)
  return nll, lse, correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(chunk, x, head, targets):
  return _forward(chunk, x, head, targets)[0]


def _chunks(chunk: int | None, tokens: int, head: Array):
  """The head as [n, rows, D], zero rows at the end, and the first id of each chunk."""
  V, D = head.shape
  rows = min(chunk or max(_LOGITS // max(tokens, 1), 256), V)
  n = -(-V // rows)
  padded = jnp.pad(head, ((0, n * rows - V), (0, 0)))
  return padded.reshape(n, rows, D), jnp.arange(n) * rows


def _logits(x, rows, first, V):
  logits = jnp.einsum("nd,vd->nv", x, rows, preferred_element_type=jnp.float32)
  ids = first + jnp.arange(rows.shape[0])
  return jnp.where(ids < V, logits, -jnp.inf), ids


def _forward(chunk, x, head, targets):
  V, N = head.shape[0], x.shape[0]

  def body(carry, block):
    top, total, at_target = carry
    logits, ids = _logits(x, *block, V)
    new = jnp.maximum(top, logits.max(axis=1))
    total = total * jnp.exp(top - new) + jnp.exp(logits - new[:, None]).sum(axis=1)
    at_target += jnp.where(ids == targets[:, None], logits, 0).sum(axis=1)
    return (new, total, at_target), None

  zero = jnp.zeros(N, jnp.float32)
  start = (jnp.full(N, -jnp.inf), zero, zero)
  (top, total, at_target), _ = jax.lax.scan(body, start, _chunks(chunk, N, head))
  lse = top + jnp.log(total)
  correct = (at_target >= top).astype(jnp.float32)
  return (lse - at_target, lse, correct), (x, head, targets, lse)


def _backward(chunk, residuals, cotangents):
  x, head, targets, lse = residuals
  dnll, dlse, _ = cotangents
  V, N = head.shape[0], x.shape[0]

  def body(dx, block):
    logits, ids = _logits(x, *block, V)
    p = jnp.exp(logits - lse[:, None]) * (dnll + dlse)[:, None]
    dlogits = (p - jnp.where(ids == targets[:, None], dnll[:, None], 0)).astype(x.dtype)
    dx += jnp.einsum("nv,vd->nd", dlogits, block[0], preferred_element_type=jnp.float32)
    drows = jnp.einsum("nv,nd->vd", dlogits, x, preferred_element_type=jnp.float32)
    return dx, drows.astype(head.dtype)

  dx, dhead = jax.lax.scan(body, jnp.zeros(x.shape, jnp.float32), _chunks(chunk, N, head))
  return dx.astype(x.dtype), dhead.reshape(-1, x.shape[1])[:V], None


_cross_entropy.defvjp(_forward, _backward)
