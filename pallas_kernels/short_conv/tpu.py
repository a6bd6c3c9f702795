"""The short convolution as Pallas TPU kernels: x read once, y written once; backward x and dy once, dx once.

A grid step has a block of time and channels. The rows that taps reach beyond it come from the step before, kept in
VMEM: the forward pass walks on in time and keeps a block's last rows, the backward pass walks back and keeps its
first ones. A shift in time is then a load that begins some rows later, and nothing is rolled.

Segments enter as a number a token, how many tokens before it (backward: after it) are of its segment, at most the
taps. Time lies along lanes there, as one number a token in rows of 128 lanes would be twice the bytes of x.

Channels beyond the last and tokens beyond the end are what lies in memory: lanes do not mix, and such tokens are
masked wherever they would be summed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch

_LANES, _SUBLANES = 128, 8
# Rows and lanes that are computed together: 4 registers an array, so that all taps of it stay in registers.
_ROWS = 32
# Tokens and channels of a grid step at the most.
_TIME, _CHANNELS = 512, 512


def check(x: Array, weight: Array) -> None:
  """Raises NotImplementedError, saying why, where the kernels cannot serve the call on this machine."""
  dispatch.needs_tpu(x.dtype)
  limitations(x, weight)


def limitations(x: Array, weight: Array) -> None:
  """The part of ``check`` that does not ask where it runs."""
  for name, dtype in (("x", x.dtype), ("weight", weight.dtype)):
    if dtype not in (jnp.bfloat16, jnp.float32):
      raise NotImplementedError(f"the TPU kernel takes bfloat16 or float32; {name} is {dtype}")
  if weight.shape[0] > _ROWS:
    raise NotImplementedError(f"the TPU kernel has at most {_ROWS} taps; got {weight.shape[0]}")


def _up(n: int, unit: int) -> int:
  return -(-n // unit) * unit


def _blocks(x: Array) -> tuple[int, int]:
  """Tokens and channels of a grid step."""
  _, T, D = x.shape
  time = min(_TIME, _up(T, _LANES))
  # As few lanes beyond the last channel as can be.
  channels = min((_up(D, c), -c) for c in range(_LANES, _CHANNELS + 1, _LANES))[1]
  return time, -channels


def _halo(weight: Array) -> int:
  """Rows kept from the neighbouring block, whole registers."""
  return max(_up(weight.shape[0] - 1, _SUBLANES), _SUBLANES)


def _same(runs: Int[Array, "B T"], W: int, ahead: bool) -> Int[Array, "B T"]:
  """How many of the W - 1 tokens before each (or after it) are of its run; those before the first are of run 0."""
  T = runs.shape[1]
  pad = (0, W - 1) if ahead else (W - 1, 0)
  window = jnp.pad(runs, ((0, 0), pad), constant_values=-1 if ahead else 0)
  lags = range(1, W) if ahead else range(W - 1)
  equal = [window[:, w : w + T] == runs for w in lags]
  return sum((e.astype(jnp.int32) for e in equal), jnp.zeros_like(runs))


def _rows_of_time(counts: Int[Array, "B T"] | None, length: int, fill: int):
  """[B, 1, length], as kernels read it."""
  if counts is None:
    return None
  pad = ((0, 0), (0, length - counts.shape[1]))
  return jnp.pad(counts, pad, constant_values=fill)[:, None]


def _spread(counts_ref, buffer) -> None:
  """A row of counts as a column, the same in all lanes."""
  row = counts_ref[0].astype(jnp.float32)
  column = jnp.broadcast_to(row, (_SUBLANES, row.shape[1])).T[:, :1]
  buffer[...] = jnp.broadcast_to(column, buffer.shape)


def _pieces(length: int, size: int):
  return [slice(i, i + size) for i in range(0, length, size)]


def _forward_kernel(W: int, x, weight, bias, before, counts, y, window, same):
  C, D = x.shape[1:]
  H = window.shape[1] - C

  @pl.when(pl.program_id(2) == 0)
  def _():
    for i, lanes in enumerate(_pieces(D, _LANES)):
      window[i, :H] = before[0, :, lanes]

  if counts is not None:
    _spread(counts, same)
  for i, lanes in enumerate(_pieces(D, _LANES)):
    taps = [weight[w : w + 1, lanes] for w in range(W)]
    for rows in _pieces(C, _ROWS):
      window[i, H + rows.start : H + rows.stop] = x[0, rows, lanes].astype(jnp.float32)
      out = jnp.broadcast_to(bias[:, lanes], (_ROWS, _LANES))
      for w in range(W):
        lag = W - 1 - w
        start = H + rows.start - lag
        term = window[i, start : start + _ROWS] * taps[w]
        if counts is not None and lag:
          term = jnp.where(same[rows] >= lag, term, 0.0)
        out = out + term
      y[0, rows, lanes] = out.astype(y.dtype)
  window[:, :H] = window[:, C:]


def _backward_kernel(W, last, x, dy, weight, tail, counts, dx, sums, window, same):
  C, D = x.shape[1:]
  H = window.shape[1] - C
  back = pl.program_id(2)
  here = pl.num_programs(2) - 1 - back

  @pl.when((pl.program_id(1) == 0) & (back == 0))
  def _():
    sums[...] = jnp.zeros_like(sums)

  @pl.when(back == 0)
  def _():
    window[:, C:] = jnp.zeros_like(window[:, C:])

  @pl.when(back > 0)
  def _():
    window[:, C:] = window[:, :H]

  if counts is not None:
    _spread(counts, same)
  for j, lanes in enumerate(_pieces(D, _LANES)):
    for rows in _pieces(C, _ROWS):
      window[j, rows] = dy[0, rows, lanes].astype(jnp.float32)
    taps = [weight[w : w + 1, lanes] for w in range(W)]
    totals = [0.0] * (W + 1)
    for i, rows in enumerate(_pieces(C, _ROWS)):
      own = x[0, rows, lanes].astype(jnp.float32)
      out = jnp.zeros((_ROWS, _LANES), jnp.float32)
      # The final state is inputs as they were: their cotangents lie in the last two pieces that tokens are in.
      for piece, part in zip(last, (tail[0, :_ROWS, lanes], tail[0, _ROWS:, lanes]), strict=True):
        if piece >= 0 and piece % (C // _ROWS) == i:
          out = out + jnp.where(here == piece // (C // _ROWS), part, 0.0)
      for w in range(W):
        lag = W - 1 - w
        d = window[j, rows.start + lag : rows.start + lag + _ROWS]
        product = own * d
        if counts is not None:
          seen = same[rows] >= lag
          d, product = jnp.where(seen, d, 0.0), jnp.where(seen, product, 0.0)
        out = out + d * taps[w]
        totals[w] += _by_sublane(product)
        if not lag:
          totals[W] += _by_sublane(d)
      dx[0, rows, lanes] = out.astype(dx.dtype)
    for w in range(W + 1):
      sums[w, :, lanes] += totals[w]


def _by_sublane(x: Float[Array, "C L"]) -> Float[Array, "8 L"]:
  return jnp.sum(x.reshape(-1, _SUBLANES, x.shape[-1]), axis=0)


def _call(kernel, grid, arrays, specs, outs, out_specs, scratch, **options):
  """A pallas_call whose absent inputs and scratch the kernel sees as None."""
  given = [x is not None for x in arrays]
  layout = [*given, *(True for _ in jax.tree.leaves(outs)), *(s is not None for s in scratch)]

  def body(*refs):
    refs = iter(refs)
    kernel(*(next(refs) if there else None for there in layout))

  def only_given(values):
    return [v for v, there in zip(values, given, strict=True) if there]

  return pl.pallas_call(
    body,
    grid=grid,
    in_specs=only_given(specs),
    out_specs=out_specs,
    out_shape=outs,
    scratch_shapes=[s for s in scratch if s is not None],
    **options,
  )(*only_given(arrays))


def _cost(W: int, *arrays) -> pl.CostEstimate:
  """Of arrays that are read or written once, the first of them W multiply-adds an element."""
  moved = sum(a.size * a.dtype.itemsize for a in arrays)
  return pl.CostEstimate(flops=2 * W * arrays[0].size, transcendentals=0, bytes_accessed=moved)


def _last(x, before, runs):
  """The last W - 1 inputs, and which of them are of the last token's run (None: all)."""
  T, n = x.shape[1], before.shape[1]
  window = x[:, T - n :] if n <= T else jnp.concatenate([before[:, T:], x], axis=1)
  if runs is None:
    return window, None
  runs = jnp.pad(runs[:, max(T - n, 0) :], ((0, 0), (max(n - T, 0), 0)))
  return window, (runs == runs[:, -1:])[..., None] if n else None


def forward(
  x: Float[Array, "B T D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None,
  before: Float[Array, "B past D"],
  runs: Int[Array, "B T"] | None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B past D"]]:
  """As ``xla.forward``; ``interpret`` runs the kernel on any machine."""
  B, T, D = x.shape
  W, H, (C, Dc) = weight.shape[0], _halo(weight), _blocks(x)
  grid = B, pl.cdiv(D, Dc), pl.cdiv(T, C)
  masked = runs is not None and W > 1
  counts = _rows_of_time(_same(runs, W, ahead=False), grid[2] * C, 0) if masked else None
  block = pl.BlockSpec((1, C, Dc), lambda b, d, t: (b, t, d))
  y = jax.ShapeDtypeStruct(x.shape, x.dtype)
  y = _call(
    functools.partial(_forward_kernel, W),
    grid,
    [
      x,
      weight.astype(jnp.float32),
      (jnp.zeros((1, D)) if bias is None else bias[None]).astype(jnp.float32),
      jnp.pad(before.astype(jnp.float32), ((0, 0), (H - (W - 1), 0), (0, 0))),
      counts,
    ],
    [
      block,
      pl.BlockSpec((W, Dc), lambda b, d, t: (0, d)),
      pl.BlockSpec((1, Dc), lambda b, d, t: (0, d)),
      pl.BlockSpec((1, H, Dc), lambda b, d, t: (b, 0, d)),
      pl.BlockSpec((1, 1, C), lambda b, d, t: (b, 0, t)),
    ],
    y,
    block,
    [
      pltpu.VMEM((Dc // _LANES, H + C, _LANES), jnp.float32),
      pltpu.VMEM((C, _LANES), jnp.float32) if masked else None,
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    cost_estimate=_cost(W, x, y),
    interpret=interpret,
    name="short_conv_forward",
  )
  window, mask = _last(x, before, runs)
  return y, window if mask is None else jnp.where(mask, window, 0)


def backward(
  x: Float[Array, "B T D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None,
  before: Float[Array, "B past D"],
  runs: Int[Array, "B T"] | None,
  dy: Float[Array, "B T D"],
  dafter: Float[Array, "B past D"],
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Array, Array, Array | None, Array]:
  """As ``xla.backward``; ``interpret`` runs the kernel on any machine."""
  B, T, D = x.shape
  W, H, (C, Dc) = weight.shape[0], _halo(weight), _blocks(x)
  taps = weight.astype(jnp.float32)
  grid = pl.cdiv(D, Dc), B, pl.cdiv(T, C)
  masked = runs is not None or T % C != 0
  counts = None
  if masked:
    one_run = jnp.zeros((1, T), jnp.int32) if runs is None else runs
    counts = _rows_of_time(_same(one_run, W, ahead=True), grid[2] * C, -1)

  # The cotangents of the final state, where they belong: to the last tokens, or to what was before the first.
  _, mask = _last(x, before, runs)
  dafter = dafter.astype(jnp.float32)
  dlast = dafter if mask is None else jnp.where(mask, dafter, 0)
  n = min(T, W - 1)
  piece = (T - 1) // _ROWS
  first = T - n - (piece - 1) * _ROWS
  tail = jnp.pad(dlast[:, W - 1 - n :], ((0, 0), (first, 2 * _ROWS - n - first), (0, 0)))

  at = lambda d, b, t: (b, grid[2] - 1 - t, d)  # noqa: E731
  block = pl.BlockSpec((1, C, Dc), at)
  of_row = 0 if runs is None else 1
  outs = (
    jax.ShapeDtypeStruct(x.shape, x.dtype),
    jax.ShapeDtypeStruct((W + 1, _SUBLANES, D), jnp.float32),
  )
  dx, sums = _call(
    functools.partial(_backward_kernel, W, (piece - 1, piece)),
    grid,
    [x, dy, taps, tail, counts],
    [
      block,
      block,
      pl.BlockSpec((W, Dc), lambda d, b, t: (0, d)),
      pl.BlockSpec((1, 2 * _ROWS, Dc), lambda d, b, t: (b, 0, d)),
      pl.BlockSpec((1, 1, C), lambda d, b, t: (of_row * b, 0, grid[2] - 1 - t)),
    ],
    outs,
    (block, pl.BlockSpec((W + 1, _SUBLANES, Dc), lambda d, b, t: (0, 0, d))),
    [
      pltpu.VMEM((Dc // _LANES, C + H, _LANES), jnp.float32),
      pltpu.VMEM((C, _LANES), jnp.float32) if masked else None,
    ],
    # Sums over rows and time stay in VMEM.
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary")
    ),
    cost_estimate=_cost(2 * W, x, dy, outs[0]),
    interpret=interpret,
    name="short_conv_backward",
  )
  sums = jnp.sum(sums, axis=1)

  # What the taps of the first tokens read before them.
  early = dy[:, :n].astype(jnp.float32)
  seen = jnp.ones((B, n, 1), bool) if runs is None else (runs[:, :n] == 0)[..., None]
  dbefore, dweight = dlast[:, : W - 1 - n], sums[:W]
  dbefore = jnp.pad(dbefore, ((0, 0), (n, 0), (0, 0)))
  for w in range(W - 1):
    pad = ((0, 0), (w, max(W - 1 - n - w, 0)), (0, 0))
    d, s = (jnp.pad(y, pad)[:, : W - 1] for y in (early, seen))
    dbefore += jnp.where(s, d * taps[w], 0)
    product = jnp.where(s, d * before.astype(jnp.float32), 0)
    dweight = dweight.at[w].add(jnp.sum(product, axis=(0, 1)))
  dbias = None if bias is None else sums[W].astype(bias.dtype)
  return dx, dweight.astype(weight.dtype), dbias, dbefore.astype(before.dtype)
