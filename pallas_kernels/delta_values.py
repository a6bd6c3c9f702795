"""Values that say what is new: each less what attention has read of those before it (DeltaFormer). In XLA."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import segments
from pallas_kernels.block_sparse import merge_attention
from pallas_kernels.linear_recurrence.triangular import unit_lower_inverse, unit_lower_solve
from pallas_kernels.softmax_attention import softmax_attention

Before = tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]

# Tokens that are solved for at once: (I + L)^-1 of so many, and a product of so many rows with all keys.
_CHUNK = 64


def delta_values(
  w: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H V"],
  beta: Float[Array, "B T H"],
  *,
  scale: float | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  before: Before | None = None,
  chunk_size: int | None = None,
) -> Float[Array, "B T H V"]:
  """``u_t = v_t - beta_t sum_{i < t} softmax_i(scale w_t . k_i) u_i`` (arXiv:2505.19488).

  With P the weights of w on the keys before, ``(I + diag(beta) P) u = v``: a triangular system, solved in chunks, whose
  right-hand sides are what attention reads of the chunks already solved. So its time is quadratic in T, as attention's
  is, and its memory linear, gradients included: the values' gradients solve the transposed system, and those of w, k
  and beta are attention's over u.

  Args:
    w, k: what a token asks of those before it, and their keys.
    v: values.
    beta: how much of what is there already is taken away.
    scale: of the logits; ``None`` is K ** -0.5.
    segment_ids: documents packed in a row: only keys of a token's own run of equal ids are asked.
    before: ``softmax_attention`` of w over tokens of an earlier call, their u being its values: (o, lse). The softmax
      is then one over both.
    chunk_size: a power of two; its effect on the result is rounding only.

  Returns:
    u in v's dtype. Its system is solved in float32 (float64 for float64 inputs).
  """
  B, T = k.shape[:2]
  scale = k.shape[-1] ** -0.5 if scale is None else scale
  chunk = chunk_size or min(_CHUNK, 1 << (T - 1).bit_length())
  runs = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segments.runs(segment_ids)
  return _delta_values(scale, chunk, w, k, v, beta, runs, before)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _delta_values(scale, chunk, w, k, v, beta, runs, before):
  return _forward(scale, chunk, w, k, v, beta, runs, before)[0]


def _forward(scale, chunk, w, k, v, beta, runs, before):
  lse = _read(w, k, k[..., :1], runs, scale)[1]
  rest = v
  if before is not None:
    read, lse = merge_attention((None, lse), before)
    rest = v - beta[..., None] * read
  u = _solve(_System(w, k, beta, lse, runs, scale, chunk), rest).astype(v.dtype)
  return u, (w, k, v, beta, u, lse, runs, before)


def _backward(scale, chunk, residuals, du):
  w, k, v, beta, u, lse, runs, before = residuals
  dv = _solve(_System(w, k, beta, lse, runs, scale, chunk), du, transposed=True)

  def read(w, k, before):
    there = _read(w, k, u, runs, scale)
    return (there if before is None else merge_attention(there, before))[0]

  o, pull = jax.vjp(read, w, k, before)
  dw, dk, dbefore = pull((-beta[..., None] * dv).astype(o.dtype))
  dbeta = -jnp.sum(o * dv, axis=-1)
  return dw, dk, dv.astype(v.dtype), dbeta.astype(beta.dtype), None, dbefore


_delta_values.defvjp(_forward, _backward)


def _read(w, k, v, runs, scale):
  """(o, lse) of attention to the tokens before each one."""
  here = dict(segment_ids=runs, key_segment_ids=runs)
  return softmax_attention(w, k, v, scale=scale, query_positions=jnp.arange(k.shape[1]) - 1, **here)


class _System:
  """``I + diag(beta) P`` in chunks of rows and columns, of arrays [B, H, T', ...], T' whole chunks.

  Tokens that fill the last chunk have beta 0: their rows are the identity's, and nobody's columns.
  """

  def __init__(self, w, k, beta, lse, runs, scale, chunk):
    self.dtype = jnp.promote_types(w.dtype, jnp.float32)
    self.chunk, self.scale, self.length = chunk, scale, k.shape[1]
    self.count = -(-self.length // chunk)
    self.w, self.k = self.tokens(w), self.tokens(k)
    self.beta, self.lse = self.tokens(beta, self.dtype), self.tokens(lse, self.dtype)
    self.runs = jnp.pad(runs, ((0, 0), (0, self.count * chunk - runs.shape[1])), "edge")

  def tokens(self, x, dtype=None):
    """[B, T, H, ...] -> [B, H, T', ...]."""
    more = self.count * self.chunk - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))
    return jnp.swapaxes(x, 1, 2).astype(dtype or x.dtype)

  def part(self, x, i, axis=2):
    return jax.lax.dynamic_slice_in_dim(x, i * self.chunk, self.chunk, axis)

  def weights(self, row=None, column=None):
    """``diag(beta) P``: a chunk of its rows with all columns, or of its columns with all rows."""
    every = jnp.arange(self.runs.shape[1])
    queries = [self.w, self.beta, self.lse]
    if row is not None:
      queries = [self.part(x, row) for x in queries]
    w, beta, lse = queries
    k = self.k if column is None else self.part(self.k, column)
    at, run = (every, self.runs) if row is None else self._of(row, every)
    key_at, key_run = (every, self.runs) if column is None else self._of(column, every)
    seen = (at[:, None] > key_at) & (run[:, None, :, None] == key_run[:, None, None, :])
    logits = self.scale * self.product("bhqk,bhsk->bhqs", w, k)
    # Masked before exp: what is not seen may be far above lse, and where nothing is seen that is -inf.
    p = jnp.exp(jnp.where(seen, logits - jnp.where(seen.any(-1), lse, 0)[..., None], -jnp.inf))
    return beta[..., None] * p

  def _of(self, chunk, every):
    return self.part(every, chunk, axis=0), self.part(self.runs, chunk, axis=1)

  def product(self, equation, a, b):
    """Of operands as the inputs are, sums in float32 at least."""
    a, b = a.astype(self.w.dtype), b.astype(self.w.dtype)
    return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=self.dtype)


def _solve(system: _System, rest: Float[Array, "B T H V"], transposed: bool = False):
  """``(I + diag(beta) P)^-1 rest``, chunk by chunk from the first; or its transpose's, from the last."""
  s = system
  rest = s.tokens(rest, s.dtype)

  def forward(x, i):
    rows = s.weights(row=i)
    here = s.part(rest, i) - s.product("bhqs,bhsv->bhqv", rows, x)
    return s.part(rows, i, axis=3), here, unit_lower_solve

  def backward(x, i):
    columns = s.weights(column=i)
    here = s.part(rest, i) - s.product("bhqs,bhqv->bhsv", columns, x)
    return s.part(columns, i), here, _transposed_solve

  def step(x, i):  # x is 0 where it is not known yet
    L, here, solve = (backward if transposed else forward)(x, i)
    return jax.lax.dynamic_update_slice_in_dim(x, solve(L, here), i * s.chunk, 2), None

  order = jnp.arange(s.count)
  x, _ = jax.lax.scan(step, jnp.zeros_like(rest), order[::-1] if transposed else order)
  return jnp.swapaxes(x, 1, 2)[:, : s.length]


def _transposed_solve(L, R):
  return jnp.matmul(jnp.swapaxes(unit_lower_inverse(L), -1, -2), R, precision="highest")
