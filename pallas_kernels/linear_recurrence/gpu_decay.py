"""Log decays of channels summed over the tokens of a chunk on a GPU, and the gradient of that: kernels for Hopper.

Pallas Mosaic GPU. A thread has some channels and goes through the tokens of a chunk, so that all is read once and
written once. XLA's cumulative sum and its derivative take three times as long.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

_THREADS = 128
# Tokens that are loaded at once.
_AHEAD = 16


def cumulative(
  log_decay: Float[Array, "BN C W"], smallest: float, *, before: bool, interpret
) -> tuple[Float[Array, "BN C W"], Float[Array, "BN W"], Float[Array, "BN C W"] | None]:
  """Sums up to and with each token, in float32, that of all tokens, and, if asked for, those up to each token without.

  Log decays, of any float dtype, count for no less than ``smallest``, and those that do have no gradient.
  """
  W = log_decay.shape[-1]
  padded = jnp.pad(log_decay, ((0, 0), (0, 0), (0, -W % _THREADS)))

  @jax.custom_vjp
  def run(x):
    return _sums(x, smallest, before, interpret)

  def backward(x, cotangents):
    return (_gradient(x, *cotangents, smallest, interpret),)

  run.defvjp(lambda x: (run(x), x), backward)
  G, last, *rest = run(padded)
  return G[..., :W], last[:, :W], rest[0][..., :W] if before else None


def _width(W: int) -> int:
  """Channels of a program."""
  return next(n for n in (4 * _THREADS, 2 * _THREADS, _THREADS) if W % n == 0)


def _layout(width: int):
  return plgpu.Layout.WG_STRIDED((width,), vec_size=width // _THREADS)


def _program(width: int):
  """Its chunk, its channels, and how to load such numbers."""
  columns = pl.ds(lax.axis_index("block") * width, width)

  def load(ref):
    return plgpu.load(ref, layout=_layout(width), optimized=False).astype(jnp.float32)

  return lax.axis_index("chunk"), columns, load


def _call(kernel, name: str, inputs, outputs, interpret):
  chunks, _, W = inputs[0].shape
  width = _width(W)
  return plgpu.kernel(
    functools.partial(kernel, width),
    out_type=outputs,
    grid=(chunks, W // width),
    grid_names=("chunk", "block"),
    kernel_name=f"linear_recurrence_{name}",
    interpret=interpret,
  )(*inputs)


def _sums(x: Array, smallest: float, before: bool, interpret) -> list[Array]:
  chunks, C, W = x.shape
  each, whole = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (x.shape, (chunks, W)))

  def kernel(width, x, G, last, *rest):
    here, columns, load = _program(width)

    def tokens(group, total):
      at = [(here, group * _AHEAD + n, columns) for n in range(_AHEAD)]
      for where, value in zip(at, [load(x.at[where]) for where in at], strict=True):
        for ref in rest:
          ref[where] = total
        total = total + jnp.maximum(value, smallest)
        G[where] = total
      return total

    nothing = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), _layout(width))
    last[here, columns] = lax.fori_loop(0, C // _AHEAD, tokens, nothing)

  return _call(kernel, "decays", [x], [each, whole, *[each] * before], interpret)


def _gradient(x: Array, dG: Array, dlast: Array, *more) -> Array:
  *dbefore, smallest, interpret = more
  C = x.shape[1]

  def kernel(width, x, dG, dlast, *rest):
    *dbefore, dx = rest
    here, columns, load = _program(width)

    def tokens(group, total):
      at = [(here, C - 1 - group * _AHEAD - n, columns) for n in range(_AHEAD)]
      loaded = [[load(ref.at[where]) for ref in (x, dG, *dbefore)] for where in at]
      for where, (value, own, *later) in zip(at, loaded, strict=True):
        total = total + own
        dx[where] = jnp.where(value > smallest, total, 0.0).astype(dx.dtype)
        for other in later:
          total = total + other
      return total

    lax.fori_loop(0, C // _AHEAD, tokens, load(dlast.at[here, columns]))

  out = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return _call(kernel, "decays_gradient", [x, dG, dlast, *dbefore], out, interpret)
