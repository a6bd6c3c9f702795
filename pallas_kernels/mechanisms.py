"""The mechanisms by the names that users know, each a mapping onto the linear recurrence.

All take arrays [batch, time, heads, dim] and return the outputs [B, T, Hv, V] and the final state [B, Hv, K, V]
(``None`` unless ``return_state``). ``g`` is always a log decay (<= 0, float32). Keyword arguments common to all:

  scale: multiplies q; ``None`` is K ** -0.5.
  initial_state, return_state, segment_ids, chunk_size, axis_name, backend: as in ``linear_recurrence``.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import context_parallel, heads, segments
from pallas_kernels.linear_recurrence import KeyErase, LowRankErase, Recurrence, linear_recurrence


def _run(q, k, v, scale, options, **fields):
  scale = k.shape[-1] ** -0.5 if scale is None else scale
  return linear_recurrence(Recurrence(q * jnp.asarray(scale, q.dtype), k, v, **fields), **options)


def _at_least_float32(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def linear_attention(q, k, v, *, scale=None, **options):
  """``S <- S + k v^T`` (Katharopoulos et al., arXiv:2006.16236), without a normaliser."""
  return _run(q, k, v, scale, options)


def retention(q, k, v, g: Float[Array, " Hv"] | None = None, *, scale=None, **options):
  """RetNet (arXiv:2307.08621): a constant decay a head, ``g_h = log(1 - 2^(-5-h))`` unless given."""
  if g is None:
    g = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(v.shape[2]))))
  return _run(q, k, v, scale, options, log_decay=g)


def lightning_attention(q, k, v, g: Float[Array, " Hv"], *, scale=None, **options):
  """Lightning Attention (arXiv:2401.04658, 2501.08313): a constant decay ``g`` a head, as retention."""
  return _run(q, k, v, scale, options, log_decay=g)


def ssd(
  x: Float[Array, "B T Hv V"],
  dt: Float[Array, "B T Hv"],
  A: Float[Array, " Hv"],
  B: Float[Array, "B T H K"],
  C: Float[Array, "B T H K"],
  **options,
):
  """Mamba-2's state space duality (arXiv:2405.21060): ``S <- exp(dt A) S + dt B x^T``, ``y = C^T S``; q is not scaled.

  ``dt`` > 0 is the step after softplus, ``A`` < 0 the rate of each head; H groups share B and C.
  """
  dt = _at_least_float32(dt)
  side_by_side = x.reshape(*x.shape[:2], -1)
  v = (heads.expand(dt, x.shape[3]) * side_by_side).astype(x.dtype).reshape(x.shape)
  return _run(C, B, v, 1.0, options, log_decay=(dt * _at_least_float32(A))[..., None])


def gla(q, k, v, g: Float[Array, "B T Hv K"], *, scale=None, **options):
  """Gated linear attention (arXiv:2312.06635): decay a channel. HGRN2 (arXiv:2404.07904) is ``k = 1 - exp(g)``."""
  return _run(q, k, v, scale, options, log_decay=g)


def rwkv6(r, k, v, g: Float[Array, "B T H K"], u: Float[Array, "H K"], **options):
  """RWKV-6 (arXiv:2404.05892): ``o_t = (S_{t-1} + (u * k_t) v_t^T)^T r_t``, then decay and write; r is not scaled."""
  return _run(r, k, v, 1.0, options, log_decay=g, bonus=u)


def delta_rule(q, k, v, beta: Float[Array, "B T Hv"], *, scale=None, **options):
  """DeltaNet (arXiv:2102.11174, 2406.06484): ``S <- S + beta k (v - k^T S)^T``."""
  return _run(q, k, v, scale, options, erase=KeyErase(beta))


def gated_delta_rule(
  q, k, v, g: Float[Array, "B T Hv"], beta: Float[Array, "B T Hv"], *, scale=None, **options
):
  """Gated DeltaNet (arXiv:2412.06464): decay the state by a head's rate, then the delta rule."""
  return _run(q, k, v, scale, options, log_decay=g[..., None], erase=KeyErase(beta))


def kda(
  q, k, v, g: Float[Array, "B T Hv K"], beta: Float[Array, "B T Hv"], *, scale=None, **options
):
  """Kimi Delta Attention (arXiv:2510.26692): decay a channel, then the delta rule."""
  return _run(q, k, v, scale, options, log_decay=g, erase=KeyErase(beta))


def gdn2(
  q,
  k,
  v,
  g: Float[Array, "B T Hv K"],
  b: Float[Array, "B T Hv K"],
  w: Float[Array, "B T Hv V"],
  *,
  scale=None,
  **options,
):
  """Gated DeltaNet-2 (arXiv:2605.22791): erase gate ``b`` a key channel, write gate ``w`` a value channel.

  S <- diag(exp g) S;  S <- S + k (w * v - (b * k)^T S)^T
  """
  wide = jnp.repeat(k, v.shape[2] // k.shape[2], axis=2)
  erase = LowRankErase(-wide, (b * wide).astype(k.dtype))
  return _run(q, k, (w * v).astype(v.dtype), scale, options, log_decay=g, erase=erase)


def comba(
  q,
  k,
  v,
  g: Float[Array, "B T Hv"],
  beta: Float[Array, "B T Hv"],
  c: Float[Array, " Hv"],
  *,
  scale=None,
  **options,
):
  """Comba (arXiv:2506.02475): the erase reads the state before decay, under ``p = c k`` with 0 < c <= 1 a head.

      S <- exp(g) S + beta k (v - c k^T S)^T       (both S on the right are S_{t-1})

  The same as a delta rule of step ``c beta`` towards ``v / c``.
  """
  side_by_side = v.reshape(*v.shape[:2], -1)
  v = (side_by_side / jnp.repeat(c, v.shape[3])).astype(v.dtype).reshape(v.shape)
  fields = dict(log_decay=g[..., None], erase=KeyErase(beta * c), reads="undecayed")
  return _run(q, k, v, scale, options, **fields)


def gated_delta_product(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H n K"],
  v: Float[Array, "B T Hv n V"],
  beta: Float[Array, "B T Hv n"],
  g: Float[Array, "B T Hv"] | None = None,
  *,
  scale=None,
  segment_ids=None,
  **options,
):
  """Gated DeltaProduct (arXiv:2502.10297): decay once, then n delta-rule steps a token, then read.

  Runs as a (gated) delta rule over n T interleaved steps, of which every n-th is read. Without ``g``: DeltaProduct.
  """
  B, T, _, n, _ = k.shape

  def interleave(x):  # [B, T, H, n, ...] -> [B, T n, H, ...]
    return jnp.moveaxis(x, 3, 2).reshape(B, T * n, x.shape[2], *x.shape[4:])

  def at_step(x, j):  # one value a token, 0 at the token's other steps
    x = x[..., None, :] * (jnp.arange(n) == j).astype(x.dtype)[:, None]
    return interleave(x)

  if segment_ids is not None:
    options["segment_ids"] = jnp.repeat(segment_ids, n, axis=1)
  decay = None if g is None else at_step(_at_least_float32(g)[..., None], 0)
  fields = dict(log_decay=decay, erase=KeyErase(interleave(beta)))
  o, state = _run(at_step(q, n - 1), interleave(k), interleave(v), scale, options, **fields)
  return o[:, n - 1 :: n], state


def mixture_of_memories(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H M K"],
  v: Float[Array, "B T H M V"],
  g: Float[Array, "B T H M"],
  beta: Float[Array, "B T H M"],
  route: Float[Array, "B T H M"],
  *,
  scale=None,
  initial_state=None,
  **options,
):
  """Mixture-of-Memories (arXiv:2502.13685): M states a head, each with a gated delta rule of the tokens routed to it.

  A token reads the sum of its states, weighted by ``route``; where that is 0 it neither decays nor writes one. The
  state is [B, H, M, K, V].
  """
  H, M = k.shape[2:4]
  written = route > 0

  def as_heads(x, axis=2):
    return x.reshape(*x.shape[:axis], H * M, *x.shape[axis + 2 :])

  decay, erase = (as_heads(jnp.where(written, x, 0)) for x in (g, beta))
  state = None if initial_state is None else as_heads(initial_state, 1)
  fields = dict(log_decay=decay[..., None], erase=KeyErase(erase))
  q = jnp.repeat(q, M, axis=2)
  o, state = _run(q, as_heads(k), as_heads(v), scale, options | dict(initial_state=state), **fields)
  o = o.reshape(v.shape)
  o = jnp.sum(route[..., None] * _at_least_float32(o), axis=3).astype(o.dtype)
  return o, None if state is None else state.reshape(*state.shape[:1], H, M, *state.shape[2:])


def rwkv7(r, w: Float[Array, "B T H K"], k, v, kappa, a, **options):
  """RWKV-7 (arXiv:2503.14456): ``S <- diag(exp w) S - (a * kappa) kappa^T S + k v^T``, both S being S_{t-1}.

  ``w`` is the log decay, ``kappa`` the unit removal key, ``a`` in (0, 1) the rate in context; r is not scaled.
  """
  erase = LowRankErase(a * kappa, -kappa)
  return _run(r, k, v, 1.0, options, log_decay=w, erase=erase, reads="undecayed")


def mamba3(
  C: Float[Array, "B T H R N"],
  B: Float[Array, "B T H R N"],
  x: Float[Array, "B T H R P"],
  g: Float[Array, "B T H"],
  dt: Float[Array, "B T H"],
  trap: Float[Array, "B T H"],
  *,
  initial_state=None,
  segment_ids=None,
  return_state=False,
  axis_name=None,
  **options,
):
  """Mamba-3's trapezoidal recurrence (arXiv:2603.15569), of MIMO rank R (SISO: R = 1); C and B come rotated.

      S_t = exp(g) S_{t-1} + (1 - trap) dt exp(g) sum_r B_{t-1,r} x_{t-1,r}^T + trap dt sum_r B_{t,r} x_{t,r}^T
      y_{t,r} = S_t^T C_{t,r}

  The two writes of a token, its own at once and the second with the next token, are one write with the sum of their
  weights, made when the next token (and so its ``dt``) is known; the token's own write reaches its own output directly.
  So no output depends on a later token, not even in rounding.

  Args:
    initial_state: (S [B, H, N, P], last B [B, H, R, N], last x [B, H, R, P]); the returned state is of the same form.
    axis_name: as in ``linear_recurrence``.

  Returns:
    y [B, T, H, R, P] and the state.
  """
  batch, T, H, R, N = B.shape
  f32 = jnp.promote_types(x.dtype, jnp.float32)
  g, dt, trap = g.astype(f32), dt.astype(f32), trap.astype(f32)
  own, carried = trap * dt, (1 - trap) * dt
  if initial_state is None:
    S = jnp.zeros((batch, H, N, x.shape[-1]), f32)
    last_B, last_x = jnp.zeros_like(B[:, 0]), jnp.zeros_like(x[:, 0])
  else:
    S, last_B, last_x = initial_state

  def previous(y, first):
    return context_parallel.previous(y, first[:, None], axis_name)

  # S holds the first write of the token before this call already: only the second is missing.
  weight = jnp.exp(g) * (carried + previous(own, jnp.zeros_like(own[:, 0])))
  if segment_ids is not None:
    weight = jnp.where(segments.starts(segment_ids, axis_name)[..., None], 0, weight)
    options["segment_ids"] = jnp.repeat(segment_ids, R, axis=1)
  B_before = previous(B, last_B)
  v = (weight[..., None, None] * previous(x, last_x)).astype(x.dtype)

  def interleave(y):  # [B, T, H, R, D] -> [B, T R, H, D]
    return jnp.moveaxis(y, 3, 2).reshape(batch, T * R, H, y.shape[-1])

  decay = interleave(jnp.where(jnp.arange(R)[:, None] == 0, g[..., None, None], 0.0))
  o, S = _run(
    interleave(C),
    interleave(B_before),
    interleave(v),
    1.0,
    options | dict(initial_state=S, return_state=return_state, axis_name=axis_name),
    log_decay=decay,
  )
  o = jnp.moveaxis(o.reshape(batch, T, R, H, -1), 2, 3).astype(f32)
  # Read r of a token runs before its writes r' > r: those are added here, as is the token's own write.
  later = jnp.triu(jnp.ones((R, R), f32), 1)
  einsum = functools.partial(jnp.einsum, precision="highest", preferred_element_type=f32)
  o += einsum("bthrn,bthsn,rs,bthsp->bthrp", C, B_before, later, v)
  o += einsum("bthrn,bthsn,bth,bthsp->bthrp", C, B, own, x)
  if not return_state:
    return o.astype(x.dtype), None
  last_B, last_own, last_x = (context_parallel.of_last(y[:, -1], axis_name) for y in (B, own, x))
  S += einsum("bhrn,bh,bhrp->bhnp", last_B, last_own, last_x)
  return o.astype(x.dtype), (S, last_B, last_x)
