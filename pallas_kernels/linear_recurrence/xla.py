"""The recurrence in chunks of tokens, in plain jax.numpy: any platform, any shape.

Within a chunk, with ``G`` the cumulative log decay, every write is ``key value^T`` for a value that
is either given (no erase) or solves a triangular system whose matrix compares erase keys with write
keys under the decay between them (the WY form of DeltaNet, arXiv:2406.06484; with a decay a channel
KDA, arXiv:2510.26692). What does not depend on the state (``_within``) is computed for a group of
chunks at once; a scan then carries the state through them (``_across``).

Decay enters only as exp of differences ``G_i - G_j <= 0``, masked before exp: nothing overflows,
however strong the decay.

Chunks are cut out of [B, T, H, D] as they are needed, and results are written back in place: no
transposed copy of a whole input exists, and a chunk's arrays stay in a CPU's cache.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence
from pallas_kernels.linear_recurrence.triangular import unit_lower_solve

_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _sizes(r: Recurrence, chunk: int | None) -> tuple[int, int]:
  """Tokens a chunk, and chunks a group.

  Accelerators want large products, and many chunks at once. A CPU wants arrays that stay in its
  cache, and few operations. Measured on two cores, forward + backward: Gated DeltaNet (B1 T2048 H4
  D128) with chunks of 32 takes 0.9 of the time of 64, and with one chunk a group 0.8 of four; KDA
  (B8 T512 H4 D64), whose comparisons take log2(chunk) passes over the keys, with chunks of 16 takes
  0.5 of 64.
  """
  on_cpu = dispatch.platform() == "cpu"
  chunk = chunk or min(
    64 if not on_cpu else 16 if r.decay == "channel" else 32,
    1 << (r.v.shape[1] - 1).bit_length(),
  )
  chunks = -(-r.v.shape[1] // chunk)
  return chunk, 1 if on_cpu else min(max(512 // chunk, 1), chunks)


def _t(x: Array) -> Array:
  return jnp.swapaxes(x, -1, -2)


def _masked(x: Array, mask: Array | None) -> Array:
  return x if mask is None else jnp.where(mask, x, 0)


# --- comparing rows with columns under the decay between them ---


def _compare(
  rows: Float[Array, "... C K"],
  cols: Float[Array, "... C K"],
  row_decay: Float[Array, "... C #K"] | None,
  col_decay: Float[Array, "... C #K"] | None,
  mask: Bool[Array, "... C C"],
  *,
  diagonal: bool,
) -> Float[Array, "... C C"]:
  """``sum_d rows_id cols_jd exp(row_decay_id - col_decay_jd)`` where the mask is set, else 0.

  The mask is lower triangular, strictly so unless ``diagonal``. Where it is set the exponent is
  <= 0; on the diagonal it is 0.
  """
  if col_decay is None:
    return jnp.where(mask, _dot(rows, _t(cols)), 0)
  if col_decay.shape[-1] == 1:
    difference = jnp.where(mask, row_decay - _t(col_decay), -jnp.inf)
    return _dot(rows, _t(cols)) * jnp.exp(difference)
  out = _compare_channels(*jnp.broadcast_arrays(rows, cols, row_decay, col_decay))
  if diagonal:
    eye = jnp.eye(rows.shape[-2], dtype=rows.dtype)
    out = out + jnp.sum(rows * cols, axis=-1, keepdims=True) * eye
  return jnp.where(mask, out, 0)


def _halves(x: Array, h: int) -> tuple[Array, Array]:
  """The two halves of each block of 2 h tokens, [..., C / 2h, h, D] each."""
  x = x.reshape(*x.shape[:-2], -1, 2, h, x.shape[-1])
  return x[..., 0, :, :], x[..., 1, :, :]


def _factors(rows, cols, row_decay, col_decay, h):
  """A token of the second half of a block and one of the first are separated by its middle.

  So exp(row - col) is exp(row - middle) exp(middle - col), both <= 1. Returns rows and columns with
  their factors applied, and the factors.
  """
  first, second = _halves(col_decay, h)[0], _halves(row_decay, h)[1]
  middle = first[..., -1:, :]
  row_factor, col_factor = jnp.exp(second - middle), jnp.exp(middle - first)
  rows, cols = _halves(rows, h)[1] * row_factor, _halves(cols, h)[0] * col_factor
  return rows, cols, row_factor, col_factor


@jax.custom_vjp
def _compare_channels(rows, cols, row_decay, col_decay):
  """``_compare`` with a decay a channel, strictly lower triangle: a matmul a level of bisection."""
  *lead, C, _ = rows.shape
  out = jnp.zeros((*lead, C, 1, 1), rows.dtype)  # the blocks of size h on the diagonal
  h = 1
  while h < C:
    r, c, _, _ = _factors(rows, cols, row_decay, col_decay, h)
    low = _dot(r, _t(c))
    top = jnp.concatenate([out[..., 0::2, :, :], jnp.zeros_like(low)], axis=-1)
    bottom = jnp.concatenate([low, out[..., 1::2, :, :]], axis=-1)
    out = jnp.concatenate([top, bottom], axis=-2)
    h *= 2
  return out[..., 0, :, :]


def _compare_channels_forward(*args):
  return _compare_channels(*args), args


def _compare_channels_backward(args, dout):
  """Half of the time of differentiating the levels.

  The decay of a row enters as ``rows * exp(row_decay)``, so its gradient is ``rows * drows``,
  whatever the levels; a column's is ``-cols * dcols``.
  """
  rows, cols, row_decay, col_decay = args
  drows, dcols = jnp.zeros_like(rows), jnp.zeros_like(cols)
  blocks = dout[..., None, :, :]
  h = rows.shape[-2] // 2
  while h:
    r, c, row_factor, col_factor = _factors(rows, cols, row_decay, col_decay, h)
    low = blocks[..., h:, :h]
    second, first = _dot(low, c) * row_factor, _dot(_t(low), r) * col_factor
    join = functools.partial(jnp.concatenate, axis=-2)
    drows = drows + join([jnp.zeros_like(second), second]).reshape(rows.shape)
    dcols = dcols + join([first, jnp.zeros_like(first)]).reshape(cols.shape)
    blocks = jnp.stack([blocks[..., :h, :h], blocks[..., h:, h:]], axis=-3)
    blocks = blocks.reshape(*dout.shape[:-2], -1, h, h)
    h //= 2
  return drows, dcols, rows * drows, -cols * dcols


_compare_channels.defvjp(_compare_channels_forward, _compare_channels_backward)


# --- a chunk ---


@dataclasses.dataclass(frozen=True)
class Chunks:
  """The inputs of a group: [chunks, B, H, Hv / H, C, D] each, the group of heads 1 for q and k."""

  q: Array
  k: Array
  v: Array
  log_decay: Array | None
  beta: Array | None
  a: Array | None
  b: Array | None
  bonus: Array | None  # [H, 1, 1, K]
  reads: str
  runs: Array | None  # [chunks, B, 1, 1, C]
  carried_run: Array | None  # [chunks, B, 1, 1, 1]: the run of the state that comes in


def strongest(dtype: jax.typing.DTypeLike) -> float:
  """The log of the strongest decay: what is left of a state then is less than a rounding of a rounding.

  A stronger one would take digits of the sums of all decays that follow in its chunk.
  """
  return 2 * math.log(jnp.finfo(dtype).eps)


def local(x: Chunks) -> dict:
  """What tokens of a chunk are to each other and to the state, decays and masks applied.

  ``q``, ``erased`` [C, K]: what reads the state; ``keep`` [K, 1]: what is kept of it; ``writes``, ``corrections``:
  what writes values, and what an erase writes, to the next state. [C, C]: ``scores`` and ``corrected``, of what is
  written so; ``L`` and ``removed``: the system ``(I + L) U = beta (v + erased S)``, or ``= removed v + erased S``.
  """
  q, k = x.q, x.k
  dtype, C = q.dtype, q.shape[-2]
  seen = jnp.tril(jnp.ones((C, C), bool))
  strictly = jnp.tril(seen, -1)
  from_state = to_state = keeps = None
  if x.runs is not None:
    same = x.runs[..., :, None] == x.runs[..., None, :]
    seen, strictly = seen & same, strictly & same
    from_state = (x.runs == x.carried_run)[..., None]
    to_state = (x.runs == x.runs[..., -1:])[..., None]
    keeps = (x.runs[..., -1:] == x.carried_run)[..., None]

  G = before = None
  decayed = remaining = lambda y, *_: y
  whole = jnp.ones((q.shape[0], 1, 1, 1, 1, 1), dtype)
  if x.log_decay is not None:
    G = jnp.cumsum(jnp.maximum(x.log_decay, strongest(dtype)), axis=-2)
    before = jnp.concatenate([jnp.zeros_like(G[..., :1, :]), G[..., :-1, :]], axis=-2)
    last = G[..., -1:, :]
    whole = jnp.exp(_t(last))

    def decayed(y, g):  # how much of the state that comes in a token sees
      return y * jnp.exp(g)

    def remaining(y):  # how much of a write is left at the end
      return y * jnp.exp(last - G)

  if x.bonus is None:
    read = G
    scores = _compare(q, k, G, G, seen, diagonal=True)
  else:
    read = before
    own = jnp.sum(q * x.bonus * k, axis=-1, keepdims=True) * jnp.eye(C, dtype=dtype)
    scores = own + _compare(q, k, before, G, strictly, diagonal=False)
  out = {"q": _masked(decayed(q, read), from_state), "keep": _masked(whole, keeps)}
  out |= {"writes": _masked(remaining(k), to_state), "scores": scores}
  erase = G if x.reads == "decayed" else before
  compare_erase = functools.partial(
    _compare, row_decay=erase, col_decay=G, mask=strictly, diagonal=False
  )
  if x.beta is not None:
    out["erased"] = -_masked(decayed(k, erase), from_state)
    out["L"] = x.beta * compare_erase(k, k)
  elif x.a is not None:
    out["erased"] = _masked(decayed(x.b, erase), from_state)
    out["L"] = -compare_erase(x.b, x.a)
    out["removed"] = compare_erase(x.b, k)
    out["corrections"] = _masked(remaining(x.a), to_state)
    out["corrected"] = _compare(q, x.a, G, G, seen, diagonal=True)
  return out


def _within(x: Chunks) -> dict:
  """What a chunk computes without the state, values included."""
  y = local(x)
  out = {"q": y["q"], "keep": y["keep"]}
  if x.beta is None:  # values that are written as they are
    out["o"], out["S"] = _dot(y["scores"], x.v), _dot(_t(y["writes"]), x.v)
  if x.beta is not None:
    given, erased = x.beta * x.v, x.beta * y["erased"]
    out["writes"], out["qw"] = y["writes"], y["scores"]
  elif x.a is not None:
    given, erased = _dot(y["removed"], x.v), y["erased"]
    out["writes"], out["qw"] = y["corrections"], y["corrected"]
  if "qw" in out:
    Y = unit_lower_solve(y["L"], jnp.concatenate([given, erased], axis=-1))
    out["U"], out["W"] = Y[..., : x.v.shape[-1]], Y[..., x.v.shape[-1] :]
  return out


def _across(S: Float[Array, "*n B H G K V"], x: dict):
  """One chunk, or each of several: reads the state before it, and makes the one after it."""
  o, new = _dot(x["q"], S), x["keep"] * S
  if "U" in x:
    U = x["U"] + _dot(x["W"], S)
    o, new = o + _dot(x["qw"], U), new + _dot(_t(x["writes"]), U)
  if "o" in x:
    o, new = o + x["o"], new + x["S"]
  return new, o


def cut(bonus, tokens: Recurrence, runs, chunk: int) -> Chunks:
  """``tokens`` holds the tokens of a few chunks alone, ``runs`` [B, 1 + tokens] also the one before them."""
  B, _, Hv, _ = tokens.v.shape
  H = tokens.k.shape[2]

  def split(x, repeated=True):  # [B, N, heads, D] -> [chunks, B, H, Hv / H, C, D]
    x = x.astype(tokens.accumulate_dtype)
    x = x.reshape(x.shape[0], -1, chunk, H, Hv // H if repeated else 1, x.shape[-1])
    return x.transpose(1, 0, 3, 4, 2, 5)

  own_runs = carried_run = None
  if runs is not None:
    own_runs, before = (
      x.reshape(B, -1, 1, 1, chunk).swapaxes(0, 1) for x in (runs[:, 1:], runs[:, :-1])
    )
    carried_run = before[..., :1]
  erase = tokens.erase
  low_rank = isinstance(erase, LowRankErase)
  return Chunks(
    split(tokens.q, repeated=False),
    split(tokens.k, repeated=False),
    split(tokens.v),
    None if tokens.log_decay is None else split(tokens.log_decay),
    split(erase.beta[..., None]) if isinstance(erase, KeyErase) else None,
    split(erase.a) if low_rank else None,
    split(erase.b) if low_rank else None,
    None if bonus is None else bonus[:, None, None, :],
    tokens.reads,
    own_runs,
    carried_run,
  )


def _group(S, bonus, tokens: Recurrence, runs, chunk: int):
  """A few chunks: the state after them and their outputs [B, tokens, Hv, V]; see ``cut``."""
  B, N, Hv, V = tokens.v.shape
  H, K = tokens.k.shape[2:]
  x = _within(cut(bonus, tokens, runs, chunk))
  S, o = jax.lax.scan(_across, S.reshape(B, H, Hv // H, K, V), x)
  o = o.transpose(1, 0, 4, 2, 3, 5).reshape(B, N, Hv, V)
  return S.reshape(B, Hv, K, V), o.astype(tokens.v.dtype)


# --- all chunks ---


def prepare(r: Recurrence, runs: Array | None, size: int):
  """What has a time axis, padded to groups of ``size`` with tokens that change nothing; the bonus.

  Constant decays become one a token, as padding has none. To ``runs`` the token before the first
  one is added: the initial state is of run 0. The bonus is cast here, so that its gradient is summed
  over groups in the accumulation dtype.
  """
  T = r.v.shape[1]
  log_decay = r.log_decay
  if r.decay == "constant":
    log_decay = jnp.broadcast_to(log_decay[:, None], (1, T, *log_decay.shape, 1))
  tokens = dataclasses.replace(r, bonus=None, log_decay=log_decay)
  if pad := -T % size:
    tokens = jax.tree.map(
      lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)), tokens
    )
  if runs is not None:
    runs = jnp.pad(jnp.pad(runs, ((0, 0), (0, pad)), mode="edge"), ((0, 0), (1, 0)))
  bonus = None if r.bonus is None else r.bonus.astype(r.accumulate_dtype)
  return tokens, bonus, runs, (T + pad) // size


def read(tree, i, size: int, extra: int = 0):
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size + extra, axis=1), tree
  )


def write(tree, parts, i, size: int):
  return jax.tree.map(
    lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, i * size, axis=1), tree, parts
  )


def forward(
  r: Recurrence,
  initial_state: Float[Array, "B Hv K V"],
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
  *,
  keep: bool,
) -> tuple[Array, Array, Array | None]:
  """Outputs [B, T, Hv, V], the final state, and if ``keep`` the states that ``backward`` starts from.

  ``chunk`` is a power of two; its effect on the result is rounding only.
  """
  chunk, chunks = _sizes(r, chunk)
  size = chunk * chunks
  tokens, bonus, runs, groups = prepare(r, runs, size)

  def body(carry, i):
    S, o = carry
    end, part = _group(S, bonus, read(tokens, i, size), read(runs, i, size, extra=1), chunk)
    return (end, write(o, part, i, size)), S if keep else None

  start = initial_state, jnp.zeros_like(tokens.v)
  (final, o), boundaries = jax.lax.scan(body, start, jnp.arange(groups))
  return o[:, : r.v.shape[1]], final, boundaries


def backward(
  r: Recurrence,
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
  boundaries: Float[Array, "N B Hv K V"],
  do: Float[Array, "B T Hv V"],
  dfinal: Float[Array, "B Hv K V"],
) -> tuple[Recurrence, Float[Array, "B Hv K V"]]:
  """Gradients of inputs and initial state: walks the groups in reverse, each computed again."""
  chunk, chunks = _sizes(r, chunk)
  size = chunk * chunks
  tokens, bonus, runs, groups = prepare(r, runs, size)
  T = r.v.shape[1]
  do = jnp.pad(do, ((0, 0), (0, groups * size - T), (0, 0), (0, 0)))

  def body(carry, x):
    dS, dbonus, dtokens = carry
    i, S = x

    def group(S, bonus, tokens):
      return _group(S, bonus, tokens, read(runs, i, size, extra=1), chunk)

    _, vjp = jax.vjp(group, S, bonus, read(tokens, i, size))
    dS, db, dt = vjp((dS, read(do, i, size)))
    return (dS, jax.tree.map(jnp.add, dbonus, db), write(dtokens, dt, i, size)), None

  zeros = jax.tree.map(jnp.zeros_like, (bonus, tokens))
  (dS, dbonus, dtokens), _ = jax.lax.scan(
    body, (dfinal, *zeros), (jnp.arange(groups), boundaries), reverse=True
  )
  return gradients(r, dbonus, dtokens), dS


def gradients(r: Recurrence, dbonus: Array | None, dtokens: Recurrence) -> Recurrence:
  """Of a recurrence, from those of what ``prepare`` made of it."""
  dr = jax.tree.map(lambda x: x[:, : r.v.shape[1]], dtokens)
  log_decay = dr.log_decay
  if r.decay == "constant":
    log_decay = jnp.sum(log_decay, axis=(0, 1, 3))
  if r.bonus is not None:
    dbonus = dbonus.astype(r.bonus.dtype)
  return dataclasses.replace(dr, bonus=dbonus, log_decay=log_decay)


def between_states(
  r: Recurrence,
  runs: Int[Array, "B T"] | None,
  chunk: int,
  group: int,
  S: Float[Array, "N B Hv K V"],
  do: Float[Array, "B T Hv V"],
  dS: Float[Array, "N B Hv K V"],
) -> Recurrence:
  """Gradients of inputs from the states before all chunks, and the gradients of the states after them.

  ``group`` chunks at once. The states' own gradients are none of the result: they have been through ``dS``.
  """
  size = chunk * group
  tokens, bonus, runs, groups = prepare(r, runs, size)
  B, T, Hv, V = r.v.shape
  H, K = r.k.shape[2:]
  do = jnp.pad(do, ((0, 0), (0, groups * size - T), (0, 0), (0, 0)))

  def by_group(x):
    x = jnp.pad(x, ((0, groups * group - x.shape[0]),) + ((0, 0),) * 4)
    return x.reshape(groups, group, B, H, Hv // H, K, V)

  def body(carry, x):
    dbonus, dtokens = carry
    i, S, dS = x

    def all_chunks(bonus, tokens):
      new, o = _across(S, _within(cut(bonus, tokens, read(runs, i, size, extra=1), chunk)))
      return new, o.transpose(1, 0, 4, 2, 3, 5).reshape(B, size, Hv, V)

    _, vjp = jax.vjp(all_chunks, bonus, read(tokens, i, size))
    db, dt = vjp((dS, read(do, i, size).astype(S.dtype)))
    return (jax.tree.map(jnp.add, dbonus, db), write(dtokens, dt, i, size)), None

  zeros = jax.tree.map(jnp.zeros_like, (bonus, tokens))
  xs = jnp.arange(groups), by_group(S), by_group(dS)
  (dbonus, dtokens), _ = jax.lax.scan(body, zeros, xs)
  return gradients(r, dbonus, dtokens)
