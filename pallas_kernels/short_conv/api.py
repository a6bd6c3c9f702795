"""The short causal convolution along time that linear mechanisms put before their recurrence.

Depthwise: each channel is filtered alone, by a handful of taps. The work is a few multiply-adds an
element, so it is written as shifted multiply-adds that XLA fuses into one pass over memory
(``lax.conv`` takes 60 times as long on a CPU), with its own backward pass that keeps nothing but the
inputs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import segments

# Blocks of time whose products are added before the sum over rows: see _weight_gradient.
_BLOCKS = 16


def short_conv(
  x: Float[Array, "B T D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None = None,
  initial_state: Float[Array, "B W-1 D"] | None = None,
  *,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
  """Convolves each channel causally: ``y_t = bias + sum_w weight_w x_{t - (W - 1) + w}``.

  Arithmetic is float32 (float64 for float64 inputs). Differentiable in all but ``segment_ids``.

  Args:
    x: the inputs, float32, bfloat16 or float64.
    weight: the taps, oldest first: ``weight[-1]`` multiplies the token itself.
    bias: added to every output.
    initial_state: the inputs before the first token, oldest first; zero where ``None``. They belong
      to the first segment of each row.
    segment_ids: no tap reaches across a change of id from one token to the next.

  Returns:
    The outputs, in x's dtype, and the state after the last token, in x's dtype: the last W - 1
    inputs, zero where they are not of the last token's segment.

  Raises:
    ValueError: shapes that do not fit.
  """
  _check(x, weight, bias, initial_state)
  B, T, D = x.shape
  if T < 1:
    raise ValueError("x must hold at least one token (T >= 1)")
  if segment_ids is not None and segment_ids.shape != (B, T):
    raise ValueError(f"segment_ids must have shape {(B, T)}; got {segment_ids.shape}")
  if initial_state is None:
    initial_state = jnp.zeros((B, weight.shape[0] - 1, D), x.dtype)
  runs = None if segment_ids is None else segments.runs(segment_ids)
  return _conv(x, weight, bias, initial_state.astype(x.dtype), runs)


def short_conv_step(
  x: Float[Array, "B 1 D"],
  weight: Float[Array, "W D"],
  state: Float[Array, "B W-1 D"],
  bias: Float[Array, " D"] | None = None,
) -> tuple[Float[Array, "B 1 D"], Float[Array, "B W-1 D"]]:
  """One token from a state, as ``short_conv`` returns it: the decode step.

  Returns:
    The output in x's dtype and the new state in the dtype of ``state``.
  """
  _check(x, weight, bias, state, "state")
  if x.shape[1] != 1:
    raise ValueError(f"a step takes one token; got x {x.shape}")
  window = jnp.concatenate([state, x.astype(state.dtype)], axis=1)
  dtype = _accumulate(x, weight)
  y = jnp.sum(window.astype(dtype) * weight, axis=1, keepdims=True)
  return (y if bias is None else y + bias).astype(x.dtype), window[:, 1:]


def _check(x, weight, bias, state, state_name="initial_state") -> None:
  if x.ndim != 3:
    raise ValueError(f"x must be [batch, time, channels]; got {x.shape}")
  B, _, D = x.shape
  if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != D:
    raise ValueError(f"weight must be [taps, {D}]; got {weight.shape}")
  if bias is not None and bias.shape != (D,):
    raise ValueError(f"bias must have shape {(D,)}; got {bias.shape}")
  expected = (B, weight.shape[0] - 1, D)
  if state is not None and state.shape != expected:
    raise ValueError(f"{state_name} must have shape {expected}; got {state.shape}")


def _accumulate(x: Array, weight: Array) -> jnp.dtype:
  return jnp.promote_types(jnp.result_type(x, weight), jnp.float32)


def _masked(x: Array, mask: Array | None) -> Array:
  return x if mask is None else jnp.where(mask[..., None], x, 0)


@jax.custom_vjp
def _conv(x, weight, bias, before, runs):
  T, W = x.shape[1], weight.shape[0]
  window = jnp.concatenate([before, x], axis=1)
  window_runs = None if runs is None else jnp.pad(runs, ((0, 0), (W - 1, 0)))
  dtype = _accumulate(x, weight)
  y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
  for w in range(W):
    same = None if runs is None else window_runs[:, w : w + T] == runs
    y = y + _masked(window[:, w : w + T].astype(dtype) * weight[w], same)
  last = None if runs is None else window_runs[:, T:] == runs[:, -1:]
  return y.astype(x.dtype), _masked(window[:, T:], last)


def _conv_forward(x, weight, bias, before, runs):
  return _conv(x, weight, bias, before, runs), (x, weight, bias, before, runs)


def _conv_backward(residuals, cotangents):
  x, weight, bias, before, runs = residuals
  dy, dafter = cotangents
  T, W = x.shape[1], weight.shape[0]
  dtype = _accumulate(x, weight)
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
  return dx.astype(x.dtype), dweight, dbias, dbefore.astype(before.dtype), None


def _weight_gradient(window, window_runs, dy, W, dtype):
  """``sum_bt dy_bt window_b(t+w)``, for each tap w, without the products ever being an array.

  XLA on a CPU writes the products of all taps to memory before it sums them over rows, W times x's
  size and four times the time. Blocks of time are added elementwise instead, which it does fuse.
  """
  B, T, D = dy.shape
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

    def product(w):
      same = None if runs is None else runs[:, w : w + size] == runs[:, W - 1 :]
      return _masked(x[:, w : w + size] * d, same)

    return [s + product(w) for w, s in enumerate(sums)]

  zeros = [jnp.zeros((B, size, D), dtype) for _ in range(W)]
  sums = jax.lax.fori_loop(0, (T + pad) // size, add_block, zeros)
  return jnp.stack([jnp.sum(s, axis=(0, 1)) for s in sums])


_conv.defvjp(_conv_forward, _conv_backward)
