"""The short causal convolution along time that linear mechanisms put before their recurrence.

Depthwise: each channel is filtered alone, by a handful of taps. The work is a few multiply-adds an
element, so what counts is one pass over memory, forward and backward. The backward pass keeps
nothing but the inputs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import context_parallel, dispatch, segments
from pallas_kernels.short_conv import tpu, xla

_ORDER = {"cpu": ["xla"], "gpu": ["xla"], "tpu": ["tpu", "xla"]}


def short_conv(
  x: Float[Array, "B T D"],
  weight: Float[Array, "W D"],
  bias: Float[Array, " D"] | None = None,
  initial_state: Float[Array, "B past D"] | None = None,
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  axis_name: str | None = None,
  backend: str = "auto",
) -> tuple[Float[Array, "B T D"], Float[Array, "B past D"]]:
  """Convolves each channel causally: ``y_t = bias + sum_w weight_w x_{t - (W - 1) + w}``.

  Arithmetic is float32 (float64 for float64 inputs). Differentiable in all but ``segment_ids``.

  Args:
    x: the inputs, float32, bfloat16 or float64.
    weight: the taps, oldest first: ``weight[-1]`` multiplies the token itself.
    bias: added to every output.
    initial_state: the inputs before the first token, oldest first; zero where ``None``. They belong
      to the first segment of each row.
    segment_ids: no tap reaches across a change of id from one token to the next.
    axis_name: within ``jax.shard_map``, the mesh axis over whose devices the tokens of each row are split, in order;
      each has at least W - 1. The initial state is the first part's, the returned one the last part's.
    backend: "auto", "xla", "tpu" (a Pallas kernel) or "interpret" (the same, on any machine, slowly). "gpu" has none,
      and says why.

  Returns:
    The outputs, in x's dtype, and the state after the last token, in x's dtype: the last W - 1
    inputs, zero where they are not of the last token's segment.

  Raises:
    ValueError: shapes that do not fit.
    NotImplementedError: a backend that was named cannot serve the call.
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
  backends: dict[str, Callable[[], None]] = {
    "xla": lambda: None,
    "tpu": functools.partial(tpu.check, x, weight),
    "interpret": functools.partial(tpu.limitations, x, weight),
    "gpu": functools.partial(_no_gpu_kernel, x),
  }
  name = dispatch.choose(backend, backends, _ORDER)
  if axis_name is not None:
    initial_state = context_parallel.tokens_before(
      x, weight.shape[0] - 1, axis_name, initial_state, segment_ids
    )
  y, state = _conv(name, x, weight, bias, initial_state.astype(x.dtype), runs)
  return y, context_parallel.of_last(state, axis_name)


def _no_gpu_kernel(x: Array) -> None:
  """On GPUs XLA's passes are what a kernel would do: ``xla.py`` tells what was compiled."""
  size = x.size * x.dtype.itemsize / 2**20
  raise NotImplementedError(
    "the short convolution has no GPU kernel: XLA's own, backend 'xla', reads x and writes y once, the least there is "
    f"(here {2 * size:.0f} MiB forward); backward it reads x and dy twice and writes dx, {5 * size:.0f} MiB of at "
    f"least {3 * size:.0f}"
  )


def short_conv_step(
  x: Float[Array, "B 1 D"],
  weight: Float[Array, "W D"],
  state: Float[Array, "B past D"],
  bias: Float[Array, " D"] | None = None,
) -> tuple[Float[Array, "B 1 D"], Float[Array, "B past D"]]:
  """One token from a state, as ``short_conv`` returns it: the decode step.

  Returns:
    The output in x's dtype and the new state in the dtype of ``state``.
  """
  _check(x, weight, bias, state, "state")
  if x.shape[1] != 1:
    raise ValueError(f"a step takes one token; got x {x.shape}")
  window = jnp.concatenate([state, x.astype(state.dtype)], axis=1)
  dtype = xla.accumulate(x, weight)
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


def _run(backend: str, phase: str):
  if backend == "xla":
    return getattr(xla, phase)
  return functools.partial(getattr(tpu, phase), interpret=backend == "interpret")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(backend, x, weight, bias, before, runs):
  return _run(backend, "forward")(x, weight, bias, before, runs)


def _conv_forward(backend, *args):
  return _conv(backend, *args), args


def _conv_backward(backend, residuals, cotangents):
  return *_run(backend, "backward")(*residuals, *cotangents), None


_conv.defvjp(_conv_forward, _conv_backward)
