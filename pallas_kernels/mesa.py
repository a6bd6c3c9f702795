"""The mesa layer (MesaNet, arXiv:2506.05233): values that a linear model, fitted to all tokens so far, has for a query.

Where linear attention reads a sum ``G_t`` of values under keys with the query itself, this reads it with the query in
the metric of the keys, which makes ``G_t x_t`` the prediction of the ridge regression from keys to values:

  H_t = exp(g_t) H_{t-1} + beta_t k_t k_t^T        G_t = exp(g_t) G_{t-1} + beta_t k_t v_t^T
  (H_t + diag(lam)) x_t = q_t                      o_t = G_t^T x_t

The systems, one a token, are solved by conjugate gradients. A step needs ``H_t p_t`` of every token, which is the
linear recurrence with p for queries and keys for values: no H_t is ever written down, but those at the ends of chunks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_recurrence import Recurrence, linear_recurrence

# Steps of conjugate gradients, in training and decoding, as the authors have it.
ITERATIONS = 30

State = tuple[Float[Array, "B Hv K K"], Float[Array, "B Hv K V"]]


def mesa(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T Hv V"],
  g: Float[Array, "B T Hv"],
  beta: Float[Array, "B T Hv"],
  lam: Float[Array, "Hv K"],
  *,
  initial_state: State | None = None,
  return_state: bool = False,
  segment_ids: Int[Array, "B T"] | None = None,
  **options,
) -> tuple[Float[Array, "B T Hv V"], State | None]:
  """The layer of all tokens; q is not scaled.

  The systems are solved, and H and G kept, in float32 (float64 for float64 inputs). The gradients are those of exact
  solutions (the transposed systems are solved the same way), so the backward pass keeps the inputs and x alone.

  Args:
    g: log decay, <= 0.
    beta: the weight of a token, > 0.
    lam: the regularisation of each channel of the key, > 0. The ratio of the greatest eigenvalue of ``H + diag(lam)``
      to the least bounds how far the steps come.
    initial_state: (H, G) before the first token; H symmetric, with no eigenvalue below zero.
    segment_ids, return_state, options: as in ``linear_recurrence``.

  Returns:
    The outputs in v's dtype, and (H, G) after the last token, or None.
  """
  B, T, H, K = k.shape
  Hv, V = v.shape[2:]
  dtype = jnp.promote_types(v.dtype, jnp.float32)
  q, k = (jnp.repeat(x.astype(dtype), Hv // H, axis=2) for x in (q, k))
  weight = beta[..., None].astype(dtype)
  if initial_state is None:
    initial_state = jnp.zeros((B, Hv, K, K), dtype), jnp.zeros((B, Hv, K, V), dtype)
  S_k, S_v = initial_state
  x = _solve(tuple(options.items()), q, k, weight * k, g, lam, S_k, segment_ids)

  written, S = weight * v, S_v
  if return_state:  # both states from one run
    written, S = (jnp.concatenate(pair, axis=-1) for pair in ((written, weight * k), (S_v, S_k)))
  r = Recurrence(x, k, written, log_decay=g[..., None])
  o, S = linear_recurrence(r, S, segment_ids=segment_ids, return_state=return_state, **options)
  return o[..., :V].astype(v.dtype), (S[..., V:], S[..., :V]) if return_state else None


def _matrices(options, k, written, g, lam, S, segment_ids) -> Callable[[Array], Array]:
  """``(H_t + diag(lam)) p_t`` as a function of p [B, T, Hv, K]."""
  whole = dict(options).get("axis_name") is None
  if k.shape[1] == 1 and whole:  # H itself, once for all steps
    H = jnp.exp(g[:, 0, :, None, None]) * S + k[:, 0, ..., None] * written[:, 0, :, None]
    einsum = functools.partial(jnp.einsum, precision="highest")
    return lambda p: einsum("bhij,bthi->bthj", H, p) + lam * p

  def product(p):
    r = Recurrence(p, k, written, log_decay=g[..., None])
    return linear_recurrence(r, S, segment_ids=segment_ids, **dict(options))[0] + lam * p

  return product


def _conjugate_gradients(product: Callable[[Array], Array], q: Array) -> Array:
  """x of ``product(x) = q``, for each vector of q by itself, from x = 0."""

  def step(_, carry):
    x, r, p, square = carry
    image = product(p)
    curvature = jnp.sum(p * image, axis=-1, keepdims=True)
    # What is solved to the last bit has no direction left.
    length = jnp.where(curvature > 0, square / curvature, 0)
    x, r = x + length * p, r - length * image
    after = jnp.sum(r * r, axis=-1, keepdims=True)
    return x, r, r + jnp.where(square > 0, after / square, 0) * p, after

  first = jnp.zeros_like(q), q, q, jnp.sum(q * q, axis=-1, keepdims=True)
  return jax.lax.fori_loop(0, ITERATIONS, step, first)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(options, q, k, written, g, lam, S, segment_ids):
  return _conjugate_gradients(_matrices(options, k, written, g, lam, S, segment_ids), q)


def _solve_forward(options, q, *rest):
  x = _solve(options, q, *rest)
  return x, (x, *rest)


def _solve_backward(options, residuals, dx):
  x, *inputs, segment_ids = residuals
  # Of M x = q with M symmetric: M dq = dx, and M's own gradient is -dq x^T.
  dq = _conjugate_gradients(_matrices(options, *inputs, segment_ids), dx)
  _, pull = jax.vjp(lambda *inputs: _matrices(options, *inputs, segment_ids)(x), *inputs)
  return dq, *pull(-dq), None


_solve.defvjp(_solve_forward, _solve_backward)
