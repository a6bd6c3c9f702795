"""The short convolution as shifted multiply-adds in plain jax.numpy: any platform.

XLA fuses them into one pass over memory (``lax.conv`` takes 60 times as long on a CPU).

Compiled for an H200, the forward pass is one kernel, which reads x and writes y once (Qwen3-Next's 8192 channels, 8192
tokens, bfloat16, with segments too); the backward pass is two that read x and dy, of which one writes dx, besides sums
of 64 rows (4 MiB). So no kernel of our own serves GPUs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch

# Blocks of time whose products are added before the sum over rows: see _weight_gradient.
_BLOCKS = 16


def accumulate(x: Array, weight: Array) -> jnp.dtype:
  """The dtype of all arithmetic: float32, or float64 where an input is."""
  return jnp.promote_types(jnp.result_type(x, weight), jnp.float32)


def _masked(x: Array, mask: Array | None) -> Array:
  return x if mask is None else jnp.where(mask[..., None], x, 0)


def forward(
  x: Float[Array, "B T D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None,
  before: Float[Array, "B past D"],
  runs: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B past D"]]:
  """Outputs and the state after the last token, of x's dtype; ``runs`` as ``segments.runs`` counts them."""
  T, W = x.shape[1], weight.shape[0]
  window = jnp.concatenate([before, x], axis=1)
  window_runs = None if runs is None else jnp.pad(runs, ((0, 0), (W - 1, 0)))
  dtype = accumulate(x, weight)
  y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
  for w in range(W):
    same = None if runs is None else window_runs[:, w : w + T] == runs
    y = y + _masked(window[:, w : w + T].astype(dtype) * weight[w], same)
  last = None if runs is None else window_runs[:, T:] == runs[:, -1:]
  return y.astype(x.dtype), _masked(window[:, T:], last)


def backward(
  x: Float[Array, "B T D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None,
  before: Float[Array, "B past D"],
  runs: Int[Array, "B T"] | None,
  dy: Float[Array, "B T D"],
  dafter: Float[Array, "B past D"],
) -> tuple[Array, Array, Array | None, Array]:
  """Gradients of x, weight, bias and before, in their dtypes."""
  T, W = x.shape[1], weight.shape[0]
  dtype = accumulate(x, weight)
  # The transpose: what enters the window at i reaches the tokens i - (W - 1), ..., i.
  sides = ((0, 0), (W - 1, W - 1))
  padded = jnp.pad(dy, (*sides, (0, 0)))
  window_runs = last = None
  if runs is not None:
    window_runs = jnp.pad(runs, ((0, 0), (W - 1, 0)))
    token_runs = jnp.pad(runs, sides, constant_values=-1)
    last = window_runs[:, T:] == runs[:, -1:]
  dwindow = jnp.pad(_masked(dafter, last).astype(dtype), ((0, 0), (T, 0), (0, 0)))
  for w in range(W):
    tokens = slice(W - 1 - w, 2 * (W - 1) - w + T)
    same = None if runs is None else token_runs[:, tokens] == window_runs
    dwindow = dwindow + _masked(padded[:, tokens].astype(dtype) * weight[w], same)
  window = jnp.concatenate([before, x], axis=1)
  dweight = _weight_gradient(window, window_runs, dy, W, dtype).astype(weight.dtype)
  dbias = None if bias is None else jnp.sum(dy, axis=(0, 1), dtype=dtype).astype(bias.dtype)
  dx, dbefore = dwindow[:, W - 1 :], dwindow[:, : W - 1]
  return dx.astype(x.dtype), dweight, dbias, dbefore.astype(before.dtype)


def _product(window, dy, window_runs, w, W):
  """What each token adds to the gradient of tap w."""
  T = dy.shape[1]
  same = None if window_runs is None else window_runs[:, w : w + T] == window_runs[:, W - 1 :]
  return _masked(window[:, w : w + T] * dy, same)


def _weight_gradient(window, window_runs, dy, W, dtype):
  """``sum_bt dy_bt window_b(t+w)``, for each tap w, without the products ever being an array.

  Elsewhere than on CPUs XLA fuses products and sums. On a CPU it writes the products of all taps to memory before it
  sums them over rows, W times x's size and four times the time: blocks of time are added elementwise, which it fuses.
  """
  B, T, D = dy.shape
  if dispatch.platform() != "cpu":
    wide = window.astype(dtype), dy.astype(dtype)
    products = (_product(*wide, window_runs, w, W) for w in range(W))
    return jnp.stack([jnp.sum(p, axis=(0, 1)) for p in products])
  size = -(-T // _BLOCKS)
  pad = -T % size
  window = jnp.pad(window, ((0, 0), (0, pad), (0, 0)))
  dy = jnp.pad(dy, ((0, 0), (0, pad), (0, 0)))  # zero: padding adds nothing
  if window_runs is not None:
    window_runs = jnp.pad(window_runs, ((0, 0), (0, pad)))

  def add_block(i, sums):
    def block(y, length):
      return jax.lax.dynamic_slice_in_dim(y, i * size, length, axis=1)

    x, d = block(window, size + W - 1).astype(dtype), block(dy, size).astype(dtype)
    runs = None if window_runs is None else block(window_runs, size + W - 1)
    return [s + _product(x, d, runs, w, W) for w, s in enumerate(sums)]

  zeros = [jnp.zeros((B, size, D), dtype) for _ in range(W)]
  sums = jax.lax.fori_loop(0, (T + pad) // size, add_block, zeros)
  return jnp.stack([jnp.sum(s, axis=(0, 1)) for s in sums])
