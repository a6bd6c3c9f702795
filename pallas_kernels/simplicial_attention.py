"""2-simplicial attention: a query weighs pairs of tokens. In XLA, of softmax attention's kernels."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.block_sparse import merge_attention
from pallas_kernels.softmax_attention import softmax_attention


def simplicial_attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B S Hkv K"],
  v: Float[Array, "B S Hkv V"],
  k2: Float[Array, "B N Hkv K"],
  v2: Float[Array, "B N Hkv V"],
  seen: Bool[Array, "B T w2"],
  *,
  scale: float | None = None,
  **where,
) -> Float[Array, "B T H V"]:
  """``o_i = sum_jm softmax_jm(scale sum_c q_ic k_jc k2_mc) (v_j * v2_m)`` (arXiv:2507.02754, section 4).

  To the second token of a pair at one distance this is softmax attention of the queries ``q * k2``, its outputs times
  v2: so it is as many calls of it as there are distances, merged by their lse. Memory is linear in T, gradients
  included: the backward pass computes each distance again.

  Args:
    q: queries.
    k, v: of the pairs' first tokens, as ``softmax_attention`` takes them; head h of q reads head ``h // (H / Hkv)``.
    k2, v2: of the second ones: those of the queries' own tokens and, in front, of the w2 - 1 before, N = w2 - 1 + T.
    seen: whether the queries see the token d before their own as second, d from 0.
    scale: of the logits; ``None`` is K ** -0.5.
    where: what else ``softmax_attention`` takes: window, segments and positions.

  Returns:
    The outputs in q's dtype, zero where a query sees no pair.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  window = where.pop("window", None)
  return _attend(scale, window, q, k, v, k2, v2, seen, where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, window, q, k, v, k2, v2, seen, where):
  return _forward(scale, window, q, k, v, k2, v2, seen, where)[0]


def _at(scale, window, where, seen, d, q, k, v, k2, v2):
  """(o, lse) of the pairs whose second token is d before the query's."""
  B, T, H = q.shape[:3]
  start = seen.shape[2] - 1 - d
  k2, v2 = (
    jnp.repeat(jax.lax.dynamic_slice_in_dim(x, start, T, axis=1), H // x.shape[2], axis=2)
    for x in (k2, v2)
  )
  where = dict(where, scale=scale, window=window, with_lse=True)
  o, lse = softmax_attention(q * k2, k, v, **where)
  here = jax.lax.dynamic_index_in_dim(seen, d, axis=2)
  return (o * v2).astype(lse.dtype), jnp.where(here, lse, -jnp.inf)


def _forward(scale, window, q, k, v, k2, v2, seen, where):
  tokens = q, k, v, k2, v2
  part = functools.partial(_at, scale, window, where, seen)

  def add(merged, d):
    return merge_attention(merged, part(d, *tokens)), None

  o, lse = (jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(part, jnp.int32(0), *tokens))
  nothing = o, jnp.full_like(lse, -jnp.inf)
  (o, lse), _ = jax.lax.scan(add, nothing, jnp.arange(seen.shape[2]))
  o = o.astype(q.dtype)
  return o, (tokens, seen, where, o, lse)


def _backward(scale, window, residuals, do):
  tokens, seen, where, o, lse = residuals
  do = do.astype(lse.dtype)
  mean = jnp.sum(do * o, axis=-1)

  def add(sums, d):
    """Of a softmax over distances, whose weights are ``exp(lse_d - lse)``."""
    (o_d, lse_d), pull = jax.vjp(functools.partial(_at, scale, window, where, seen, d), *tokens)
    share = jnp.where(lse_d > -jnp.inf, jnp.exp(lse_d - lse), 0)
    more = pull((share[..., None] * do, share * (jnp.sum(do * o_d, axis=-1) - mean)))
    return jax.tree.map(lambda total, x: total + x, sums, more), None

  zeros = tuple(jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in tokens)
  sums, _ = jax.lax.scan(add, zeros, jnp.arange(seen.shape[2]))
  return (*(x.astype(y.dtype) for x, y in zip(sums, tokens, strict=True)), None, None)


_attend.defvjp(_forward, _backward)
