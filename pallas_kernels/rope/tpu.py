"""RoPE as a Pallas kernel for TPUs, on heads side by side: x is read once and written once.

Left to XLA, the halves of a head, ranges of less than a register's lanes, are arrays of their own, and all of x is
copied between layouts in float32. Here the other half of a head comes by a rotation of a register's lanes, and what
cosine and sine each lane takes by tables for 128 lanes, which all heads share. The gradient is the rotation back.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.rope import xla

_LANES = 128
# Rows that are computed together: 4 registers an array.
_ROWS = 32
# Bytes of x in a grid step, at the most, and tokens.
_BLOCK, _TOKENS = 1 << 20, 512


def supports(x: Array, size: int, rotated: int) -> None:
  """Raises NotImplementedError, saying why, where the kernel cannot serve a call."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f"the TPU kernel takes bfloat16 or float32; x is {x.dtype}")
  if x.shape[1] < _ROWS:
    raise NotImplementedError(f"the TPU kernel needs {_ROWS} tokens or more; got {x.shape[1]}")
  if (size % _LANES and _LANES % size) or x.shape[2] % _LANES:
    raise NotImplementedError(
      f"the TPU kernel needs heads that divide {_LANES} lanes or are whole times as many, and no part of them left;"
      f" got {x.shape[2] // size} of {size} channels"
    )
  if rotated > _LANES and rotated % (2 * _LANES):
    raise NotImplementedError(f"half of {rotated} channels that rotate are no whole {_LANES} lanes")


def _tables(positions: Array, size: int, theta: float, rotated: int, back: bool) -> list[Array]:
  """Cosine and sine for each of 128 lanes, or, where a head's halves are whole registers, of each pair of channels.

  The sine of a first half is negative, as what comes from the second is taken away; what does not rotate has 1 and 0.
  """
  angle = xla.angles(positions, theta, rotated)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  sin = -sin if back else sin
  if rotated > _LANES:
    return [cos, sin]
  unit = min(size, _LANES)
  rest = ((0, 0), (0, 0), (0, unit - rotated))
  cos = jnp.pad(jnp.concatenate([cos, cos], axis=-1), rest, constant_values=1)
  sin = jnp.pad(jnp.concatenate([-sin, sin], axis=-1), rest)
  return [jnp.tile(table, (1, 1, _LANES // unit)) for table in (cos, sin)]


def _kernel(x_ref, cos_ref, sin_ref, y_ref, *, size: int, rotated: int):
  half = rotated // 2

  def rows(i, _):
    at = pl.ds(i * _ROWS, _ROWS)

    def load(start, width):
      return x_ref[0, at, pl.ds(start, width)].astype(jnp.float32)

    def store(start, y):
      y_ref[0, at, pl.ds(start, y.shape[1])] = y.astype(y_ref.dtype)

    cos, sin = cos_ref[0, at], sin_ref[0, at]
    step = max(size, _LANES)
    for start in range(0, x_ref.shape[2], step):
      if rotated <= _LANES:
        x = load(start, _LANES)
        store(start, x * cos + _other(x, size, half) * sin)
        kept = start + _LANES
      else:
        first, second = load(start, half), load(start + half, half)
        store(start, first * cos - second * sin)
        store(start + half, second * cos + first * sin)
        kept = start + rotated
      if kept < start + step:
        rest = pl.ds(kept, start + step - kept)
        y_ref[0, at, rest] = x_ref[0, at, rest]
    return 0

  jax.lax.fori_loop(0, x_ref.shape[1] // _ROWS, rows, 0)


def _other(x: Array, size: int, half: int) -> Array:
  """For each lane the one that it makes a pair with."""
  before = pltpu.roll(x, half, 1)
  if 2 * half == _LANES:
    return before
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % min(size, _LANES)
  return jnp.where(lane < half, pltpu.roll(x, _LANES - half, 1), before)


def _call(x, positions, size, theta, rotated, back, interpret):
  B, T, D = x.shape
  tokens = min(_TOKENS, _BLOCK // (D * x.dtype.itemsize), -(-T // _ROWS) * _ROWS)
  tokens = max(_ROWS, tokens // _ROWS * _ROWS)
  tables = _tables(positions, size, theta, rotated, back)
  block = lambda lanes: pl.BlockSpec((1, tokens, lanes), lambda b, t: (b, t, 0))  # noqa: E731
  return pl.pallas_call(
    functools.partial(_kernel, size=size, rotated=rotated),
    name="rope",
    grid=(B, -(-T // tokens)),
    in_specs=[block(D), *(block(table.shape[2]) for table in tables)],
    out_specs=block(D),
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    cost_estimate=pl.CostEstimate(
      flops=3 * x.size,
      transcendentals=0,
      bytes_accessed=2 * x.size * x.dtype.itemsize + 2 * tables[0].size * 4,
    ),
    interpret=interpret,
  )(x, *tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def rotate(
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  size: int,
  theta: float,
  rotated: int,
  interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T D"]:
  """As ``xla.rotate``, of heads of ``size`` channels side by side; ``interpret`` runs the kernel on any machine."""
  return _call(x, positions, size, theta, rotated, False, interpret)


def _forward(x, positions, size, theta, rotated, interpret):
  return _call(x, positions, size, theta, rotated, False, interpret), positions


def _backward(size, theta, rotated, interpret, positions, dy):
  return _call(dy, positions, size, theta, rotated, True, interpret), None


rotate.defvjp(_forward, _backward)
