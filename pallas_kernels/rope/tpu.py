"""RoPE as a Pallas kernel for TPUs: x is read once and written once.

Heads lie side by side, [B, 1, T, D], or first, [B, H, T, D]; or some of both.

Left to XLA, the halves of a head, ranges of less than a register's lanes, are arrays of their own, and all of x is
copied between layouts in float32. Here the other half of a head comes by a rotation of a register's lanes, and what
cosine and sine each lane takes by tables for 128 lanes, which all heads share. The gradient is the rotation back.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.rope import xla
from pallas_kernels.rope.frequencies import Scaling

_LANES = 128
# Rows that are computed together: 4 registers an array.
_ROWS = 32
# Bytes of x in a grid step, at the most, and tokens.
_BLOCK, _TOKENS = 1 << 20, 512


def supports(dtype: jnp.dtype, T: int, D: int, size: int, rotated: int) -> None:
  """Raises NotImplementedError, saying why, where the kernel cannot serve T tokens of D channels side by side."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f"the TPU kernel takes bfloat16 or float32; x is {dtype}")
  if T < _ROWS:
    raise NotImplementedError(f"the TPU kernel needs {_ROWS} tokens or more; got {T}")
  if (size % _LANES and _LANES % size) or (D % _LANES and D != size):
    raise NotImplementedError(
      f"the TPU kernel needs heads that divide {_LANES} lanes or are whole times as many, and no part of them left;"
      f" got {D // size} of {size} channels"
    )
  if rotated > _LANES and rotated % (2 * _LANES):
    raise NotImplementedError(f"half of {rotated} channels that rotate are no whole {_LANES} lanes")


def _tables(
  positions: Array,
  size: int,
  lanes: int,
  theta: float,
  rotated: int,
  scaling: Scaling | None,
  back: bool,
) -> list[Array]:
  """Cosine and sine for each of these lanes, or, where a head's halves are whole registers, of each pair of channels.

  The sine of a first half is negative, as what comes from the second is taken away; what does not rotate has 1 and 0.
  """
  angle = xla.angles(positions, theta, rotated, scaling)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  sin = -sin if back else sin
  if rotated > _LANES:
    return [cos, sin]
  unit = min(size, lanes)
  rest = ((0, 0), (0, 0), (0, unit - rotated))
  cos = jnp.pad(jnp.concatenate([cos, cos], axis=-1), rest, constant_values=1)
  sin = jnp.pad(jnp.concatenate([-sin, sin], axis=-1), rest)
  return [jnp.tile(table, (1, 1, lanes // unit)) for table in (cos, sin)]


def _kernel(x_ref, cos_ref, sin_ref, y_ref, *, size: int, rotated: int):
  _, heads, tokens, D = x_ref.shape
  half, lanes = rotated // 2, min(D, _LANES)
  step = max(size, lanes)

  def rows(i, _):
    at = pl.ds(i * _ROWS, _ROWS)
    cos, sin = cos_ref[0, at], sin_ref[0, at]
    for head, start in itertools.product(range(heads), range(0, D, step)):
      x, y = x_ref.at[0, head, at], y_ref.at[0, head, at]
      load = lambda start, width, x=x: x[:, pl.ds(start, width)].astype(jnp.float32)  # noqa: E731
      if rotated <= _LANES:
        one = load(start, lanes)
        one = one * cos + _other(one, size, half) * sin
        y[:, pl.ds(start, lanes)] = one.astype(y.dtype)
        kept = start + lanes
      else:
        first, second = load(start, half), load(start + half, half)
        y[:, pl.ds(start, half)] = (first * cos - second * sin).astype(y.dtype)
        y[:, pl.ds(start + half, half)] = (second * cos + first * sin).astype(y.dtype)
        kept = start + rotated
      if kept < start + step:
        rest = pl.ds(kept, start + step - kept)
        y[:, rest] = x[:, rest]
    return 0

  jax.lax.fori_loop(0, tokens // _ROWS, rows, 0)


def _other(x: Array, size: int, half: int) -> Array:
  """For each lane the one that it makes a pair with."""
  if x.shape[1] < _LANES:  # a head alone in a register
    rest = [x[:, 2 * half :]] * (2 * half < x.shape[1])
    return jnp.concatenate([x[:, half : 2 * half], x[:, :half], *rest], axis=1)
  before = pltpu.roll(x, half, 1)
  if 2 * half == _LANES:
    return before
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % min(size, _LANES)
  return jnp.where(lane < half, pltpu.roll(x, _LANES - half, 1), before)


def _call(x, positions, size, theta, rotated, scaling, back, interpret):
  B, H, T, D = x.shape
  size_of_token = max(D, _LANES) * x.dtype.itemsize
  tokens = min(_TOKENS, _BLOCK // size_of_token, -(-T // _ROWS) * _ROWS)
  tokens = max(_ROWS, tokens // _ROWS * _ROWS)
  most = max(1, _BLOCK // (tokens * size_of_token))
  heads = max(h for h in range(1, min(most, H) + 1) if H % h == 0)
  tables = _tables(positions, size, min(D, _LANES), theta, rotated, scaling, back)
  # All heads of some tokens one after the other, for which the tables stay where they are.
  block = pl.BlockSpec((1, heads, tokens, D), lambda b, t, h: (b, h, t, 0))
  table = pl.BlockSpec((1, tokens, tables[0].shape[2]), lambda b, t, h: (b, t, 0))
  return pl.pallas_call(
    functools.partial(_kernel, size=size, rotated=rotated),
    name="rope",
    grid=(B, -(-T // tokens), H // heads),
    in_specs=[block, table, table],
    out_specs=block,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
    cost_estimate=pl.CostEstimate(
      flops=3 * x.size,
      transcendentals=0,
      bytes_accessed=2 * x.size * x.dtype.itemsize + 2 * tables[0].size * 4,
    ),
    interpret=interpret,
  )(x, *tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def rotate(
  x: Float[Array, "B H T D"],
  positions: Int[Array, "B T"],
  size: int,
  theta: float,
  rotated: int,
  scaling: Scaling | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B H T D"]:
  """As ``xla.rotate``, of H times D / size heads of ``size`` channels; ``interpret`` runs the kernel on any machine."""
  return _call(x, positions, size, theta, rotated, scaling, False, interpret)


def _forward(x, positions, size, theta, rotated, scaling, interpret):
  return _call(x, positions, size, theta, rotated, scaling, False, interpret), positions


def _backward(size, theta, rotated, scaling, interpret, positions, dy):
  return _call(dy, positions, size, theta, rotated, scaling, True, interpret), None


rotate.defvjp(_forward, _backward)
