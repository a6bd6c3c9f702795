"""The recurrence in chunks of tokens, in plain jax.numpy: any platform, any shape.

Within a chunk, with ``G`` the cumulative log decay, every write is ``key value^T`` for a value that is either given (no
erase) or solves a triangular system whose matrix compares erase keys with write keys under the decay between them (the
WY form of DeltaNet, arXiv:2406.06484; with per-channel decay KDA, arXiv:2510.26692). What does not depend on the state
(``_within``) is computed for a group of chunks at once; a scan then carries the state through them (``_across``).

Decay enters only as exp of differences ``G_i - G_j <= 0``, masked before exp: nothing overflows, however strong the decay.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence
from pallas_kernels.linear_recurrence.triangular import unit_lower_inverse

DEFAULT_CHUNK = 64
# Chunks whose state-independent part is computed together: enough rows to keep the matmuls busy, and a working set
# that does not grow with T.
_GROUP_TOKENS = 512
# Below this block size, decay between two tokens is taken channel by channel; above, as a product of two factors.
_PAIRWISE = 4

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _t(x: Array) -> Array:
  return jnp.swapaxes(x, -1, -2)


def _shift(G: Array) -> Array:
  """The cumulative decay up to, and without, each token."""
  return jnp.concatenate([jnp.zeros_like(G[..., :1, :]), G[..., :-1, :]], axis=-2)


def _masked_exp(x: Array, mask: Array) -> Array:
  return jnp.exp(jnp.where(mask, x, -jnp.inf))


def _compare(
  rows: Float[Array, "... C K"],
  cols: Float[Array, "... C K"],
  row_decay: Float[Array, "... C #K"] | None,
  col_decay: Float[Array, "... C #K"] | None,
  mask: Bool[Array, "... C C"],
) -> Float[Array, "... C C"]:
  """``sum_d rows_id cols_jd exp(row_decay_id - col_decay_jd)`` where the mask is set, else 0.

  Where the mask is set the exponent must be <= 0, and the mask must be lower triangular.
  """
  if col_decay is None:
    return jnp.where(mask, _dot(rows, _t(cols)), 0)
  if col_decay.shape[-1] == 1:
    return _dot(rows, _t(cols)) * _masked_exp(row_decay - _t(col_decay), mask)
  return jnp.where(mask, _compare_channels(rows, cols, row_decay, col_decay), 0)


def _compare_channels(rows, cols, row_decay, col_decay):
  """Per-channel decay, lower triangle only (the upper is arbitrary but finite).

  A pair of tokens in different halves of a block is separated by the decay at the middle: both factors of
  exp(row - middle) exp(middle - col) are <= 1. Bisection leaves small diagonal blocks, whose pairs are taken one by one.
  """
  C, K = rows.shape[-2:]
  lead = rows.shape[:-2]

  def blocks(x, size):
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])

  size = min(C, _PAIRWISE)
  r, c, gr, gc = (blocks(x, size) for x in (rows, cols, row_decay, col_decay))
  lower = jnp.tril(jnp.ones((size, size), bool))[..., None]
  difference = gr[..., :, None, :] - gc[..., None, :, :]
  # A strictly lower comparison reads exclusive decay, whose diagonal difference is positive: clip, the mask drops it.
  weight = _masked_exp(jnp.minimum(difference, 0), lower)
  out = jnp.sum(r[..., :, None, :] * c[..., None, :, :] * weight, axis=-1)
  while size < C:
    half, size = size, 2 * size
    r, c, gr, gc = (blocks(x, size) for x in (rows, cols, row_decay, col_decay))
    middle = gc[..., half - 1 : half, :]
    low = _dot(
      r[..., half:, :] * jnp.exp(gr[..., half:, :] - middle),
      _t(c[..., :half, :] * jnp.exp(middle - gc[..., :half, :])),
    )
    pairs = out.reshape(*lead, -1, 2, half, half)
    top = jnp.concatenate([pairs[..., 0, :, :], jnp.zeros_like(low)], axis=-1)
    out = jnp.concatenate([top, jnp.concatenate([low, pairs[..., 1, :, :]], axis=-1)], axis=-2)
  return out[..., 0, :, :]


def _within(x: dict) -> dict:
  """What a chunk computes without the state; leading axes are free, [..., Hv, C, D] each."""
  dtype = x["dtype"]
  groups = x["v"].shape[-3] // x["k"].shape[-3]

  def wide(name, repeat=False):
    y = x[name].astype(dtype)
    return jnp.repeat(y, groups, axis=-3) if repeat and groups > 1 else y

  q, k, v = wide("q", True), wide("k", True), wide("v")
  C = q.shape[-2]
  seen = jnp.tril(jnp.ones((C, C), bool))
  strictly = jnp.tril(jnp.ones((C, C), bool), -1)
  from_state = to_state = keeps = None
  if x["runs"] is not None:
    run, carried = x["runs"], x["carried_run"]  # [..., C], [..., 1]
    same = (run[..., :, None] == run[..., None, :])[..., None, :, :]
    seen, strictly = seen & same, strictly & same
    from_state = (run == carried)[..., None, :, None]
    to_state = (run == run[..., -1:])[..., None, :, None]
    keeps = (run[..., -1:] == carried)[..., None, :, None]

  def masked(y, mask):
    return y if mask is None else jnp.where(mask, y, 0)

  G = before = None
  decay_rows = decay_cols = lambda y, _: y
  whole = jnp.ones((*q.shape[:-2], 1, 1), dtype)
  if x["log_decay"] is not None:
    G = jnp.cumsum(wide("log_decay"), axis=-2)
    before = _shift(G)
    last = G[..., -1:, :]
    decay_rows = lambda y, g: y * jnp.exp(g)  # noqa: E731  how much of the carried state a token sees
    decay_cols = lambda y, g: y * jnp.exp(last - g)  # noqa: E731  how much of a write is left at the end
    whole = jnp.exp(_t(last))

  read, read_mask = (G, seen) if x["bonus"] is None else (before, strictly)
  out = {
    "q": masked(decay_rows(q, read), from_state),
    "k": masked(decay_cols(k, G), to_state),
    "keep": masked(whole, keeps),
  }
  qk = _compare(q, k, read, G, read_mask)
  if x["bonus"] is not None:
    u = jnp.repeat(x["bonus"].astype(dtype), groups, axis=0)[:, None, :]
    qk = qk + jnp.sum(q * u * k, -1, keepdims=True) * jnp.eye(C, dtype=dtype)

  erase = G if x["reads"] == "decayed" else before
  if x["beta"] is not None:
    beta = wide("beta")
    inverse = unit_lower_inverse(beta * _compare(k, k, erase, G, strictly))
    out["U"] = _dot(inverse, beta * v)
    out["W"] = -_dot(inverse, beta * masked(decay_rows(k, erase), from_state))
    out["writes"], out["qw"] = out.pop("k"), qk
  elif x["a"] is not None:
    a, b = wide("a"), wide("b")
    inverse = unit_lower_inverse(-_compare(b, a, erase, G, strictly))
    out["U"] = _dot(inverse, _dot(_compare(b, k, erase, G, strictly), v))
    out["W"] = _dot(inverse, masked(decay_rows(b, erase), from_state))
    out["writes"] = masked(decay_cols(a, G), to_state)
    out["qw"] = _compare(q, a, G, G, seen)
  if "k" in out:  # values that are written as they are
    out["o"] = _dot(qk, v)
    out["S"] = _dot(_t(out.pop("k")), v)
  return out


def _across(S: Float[Array, "B Hv K V"], x: dict):
  """One chunk: reads the carried state, and passes it on."""
  C = x["q"].shape[-2]
  if "U" in x:
    read = _dot(jnp.concatenate([x["q"], x["W"]], axis=-2), S)
    o, U = read[..., :C, :], x["U"] + read[..., C:, :]
    o = o + _dot(x["qw"], U)
    S = x["keep"] * S + _dot(_t(x["writes"]), U)
  else:
    o = _dot(x["q"], S)
    S = x["keep"] * S
  if "o" in x:
    o, S = o + x["o"], S + x["S"]
  return S, o


def _chunked(r: Recurrence, runs: Int[Array, "B T"] | None, chunk: int) -> dict:
  """The inputs as [groups, chunks, batch, heads, C, dim], padded with tokens that change nothing."""
  B, T = r.v.shape[:2]
  chunks = -(-T // chunk)
  per_group = min(max(_GROUP_TOKENS // chunk, 1), chunks)
  groups = -(-chunks // per_group)
  pad = groups * per_group * chunk - T

  def split(x):  # [B, T, H, D] -> [groups, chunks, B, H, C, D]
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], groups, per_group, chunk, *x.shape[2:])
    return x.transpose(1, 2, 0, 4, 3, 5)

  g = r.log_decay
  if r.decay == "constant":
    g = jnp.broadcast_to(g[:, None], (1, T, *g.shape, 1))
  out = {"q": split(r.q), "k": split(r.k), "v": split(r.v)}
  out["log_decay"] = None if g is None else split(g)
  out["beta"] = split(r.erase.beta[..., None]) if isinstance(r.erase, KeyErase) else None
  low_rank = isinstance(r.erase, LowRankErase)
  out["a"] = split(r.erase.a) if low_rank else None
  out["b"] = split(r.erase.b) if low_rank else None
  out["runs"] = out["carried_run"] = None
  if runs is not None:
    padded = jnp.pad(runs, ((0, 0), (0, pad)), mode="edge")
    before = jnp.pad(padded, ((0, 0), (1, 0)))[:, :-1]  # the initial state is of run 0

    def split_runs(x):
      return x.reshape(B, groups, per_group, chunk).transpose(1, 2, 0, 3)

    out["runs"] = split_runs(padded)
    out["carried_run"] = split_runs(before)[..., :1]
  return out


def _unchunked(o: Array, T: int) -> Array:
  """[groups, chunks, B, H, C, V] -> [B, T, H, V]."""
  o = o.transpose(2, 0, 1, 4, 3, 5)
  return o.reshape(o.shape[0], -1, *o.shape[4:])[:, :T]


def _group(r: Recurrence, S: Array, bonus: Array | None, x: dict):
  x = x | {"dtype": r.accumulate_dtype, "bonus": bonus, "reads": r.reads}
  S, o = jax.lax.scan(_across, S, _within(x))
  return S, o.astype(r.v.dtype)


def forward(
  r: Recurrence,
  initial_state: Float[Array, "B Hv K V"],
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
) -> tuple[Array, Array, Array]:
  """Outputs [B, T, Hv, V], the final state, and the states that ``backward`` starts from.

  A power of two is taken as the chunk (default 64); its effect on the result is rounding only.
  """
  chunk = chunk or min(DEFAULT_CHUNK, 1 << (r.v.shape[1] - 1).bit_length())

  def body(S, x):
    end, o = _group(r, S, r.bonus, x)
    return end, (o, S)

  final, (o, boundaries) = jax.lax.scan(body, initial_state, _chunked(r, runs, chunk))
  return _unchunked(o, r.v.shape[1]), final, boundaries


def backward(
  r: Recurrence,
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
  boundaries: Float[Array, "N B Hv K V"],
  do: Float[Array, "B T Hv V"],
  dfinal: Float[Array, "B Hv K V"],
) -> tuple[Recurrence, Float[Array, "B Hv K V"]]:
  """Gradients of the inputs and of the initial state: walks the groups of chunks in reverse, each computed again."""
  chunk = chunk or min(DEFAULT_CHUNK, 1 << (r.v.shape[1] - 1).bit_length())
  chunks, unchunk = jax.vjp(lambda r: _drop_integers(_chunked(r, runs, chunk)), r)
  integers = {k: v for k, v in _chunked(r, runs, chunk).items() if k not in chunks}
  do = _chunked(Recurrence(do, do, do), None, chunk)["v"]

  def body(carry, x):
    dS, dbonus = carry
    S, chunks, integers, do = x
    _, vjp = jax.vjp(lambda S, bonus, c: _group(r, S, bonus, c | integers), S, r.bonus, chunks)
    dS, db, dchunks = vjp((dS, do))
    return (dS, jax.tree.map(jnp.add, dbonus, db)), dchunks

  dbonus = jax.tree.map(jnp.zeros_like, r.bonus)
  (dS, dbonus), dchunks = jax.lax.scan(
    body, (dfinal, dbonus), (boundaries, chunks, integers, do), reverse=True
  )
  (dr,) = unchunk(dchunks)
  if r.bonus is not None:
    dr = jax.tree.map(lambda x: x, dr)
    dr = Recurrence(dr.q, dr.k, dr.v, dr.log_decay, dr.erase, dbonus, dr.reads)
  return dr, dS


def _drop_integers(chunks: dict) -> dict:
  return {k: v for k, v in chunks.items() if k not in ("runs", "carried_run")}
