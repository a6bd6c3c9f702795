"""The linear recurrence: one call for every decay, every erase and every backend."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, segments
from pallas_kernels.linear_recurrence import gpu, parts, reference, step_gpu, step_tpu, tpu, xla
from pallas_kernels.linear_recurrence.recurrence import Recurrence

# "interpret" runs the TPU kernels in Pallas's interpreter, "interpret_gpu" the GPU kernels, for tests on any machine.
_CHUNKED = {
  "xla": (xla.forward, xla.backward),
  "tpu": (tpu.forward, tpu.backward),
  "interpret": (
    functools.partial(tpu.forward, interpret=True),
    functools.partial(tpu.backward, interpret=True),
  ),
  "gpu": (gpu.forward, gpu.backward),
  "interpret_gpu": (
    functools.partial(gpu.forward, interpret=plgpu.InterpretGPUParams()),
    functools.partial(gpu.backward, interpret=plgpu.InterpretGPUParams()),
  ),
}
_ORDER = {"cpu": ["xla"], "gpu": ["gpu", "xla"], "tpu": ["tpu", "xla"]}
_STEPS = {
  "tpu": step_tpu.step,
  "interpret": functools.partial(step_tpu.step, interpret=True),
  "gpu": step_gpu.step,
  "interpret_gpu": functools.partial(step_gpu.step, interpret=plgpu.InterpretGPUParams()),
}
_STEP_CHECKS = {
  "reference": lambda r, state: None,
  "tpu": step_tpu.check,
  "interpret": step_tpu.supports,
  "gpu": step_gpu.check,
  "interpret_gpu": step_gpu.supports,
}
_STEP_ORDER = {"cpu": ["reference"], "gpu": ["gpu", "reference"], "tpu": ["tpu", "reference"]}


def linear_recurrence(
  r: Recurrence,
  initial_state: Float[Array, "B Hv K V"] | None = None,
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  chunk_size: int | None = None,
  return_state: bool = False,
  axis_name: str | None = None,
  backend: str = "auto",
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"] | None]:
  """Runs the recurrence over all tokens; see ``Recurrence`` for its inputs.

  Differentiable in everything but ``segment_ids``. The backward pass keeps the inputs and the states at chunk
  boundaries (on a GPU also what tokens are to tokens, see ``gpu.py``), and computes the rest again.

  On TPUs q, k, v and all else of [B, T, heads, dim] should be reshaped from [B, T, heads * dim], as projections write
  them, and the outputs and gradients be used like that: then nothing is copied. Where XLA holds such an array with four
  axes, as it does an argument or a result of a jit, it has tiles of heads and channels, where the kernels take tokens
  and channels, and so inputs and gradients are copied. Kimi Linear's 8192 tokens (bfloat16, v6e) take 131 MiB of
  temporary memory forward and backward, 128 of them states; with four axes everywhere 771 MiB.

  Args:
    r: the inputs.
    initial_state: what the first token starts from, zero where ``None``.
    segment_ids: where the id changes from one token to the next the state is cleared. The initial state goes to the
      first segment of each row, the final state is the last one's.
    chunk_size: tokens handled together, a power of two; ``None`` lets the backend choose. Changes rounding only.
    return_state: whether the final state is wanted.
    axis_name: within ``jax.shard_map``, the mesh axis over whose devices the tokens of each row are split, in order
      (``parts.py``). The initial state is the first part's, the final state the last one's; every device has both.
    backend: "auto", "tpu" or "gpu" (Pallas kernels), "xla" (chunked, any platform), "reference" (token by token), or
      "interpret" or "interpret_gpu": the TPU's or the GPU's kernels in Pallas's interpreter, on any machine.

  Returns:
    The outputs in v's dtype, and the final state in float32 (float64 for float64 inputs), or ``None``.

  Raises:
    ValueError: shapes that do not fit, a chunk size that is not a power of two, or arrays that a mesh with explicit
      axes splits: there it is called within ``jax.shard_map``, see README.md.
    NotImplementedError: a backend that was named cannot serve the call.
  """
  r.validate()
  dispatch.needs_parts("v", r.v)
  B, T, H, K = r.k.shape
  state_shape = (B, r.v.shape[2], K, r.v.shape[3])
  if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
    raise ValueError(f"chunk_size must be a power of two; got {chunk_size}")
  if segment_ids is not None and segment_ids.shape != (B, T):
    raise ValueError(f"segment_ids must have shape {(B, T)}; got {segment_ids.shape}")
  if initial_state is None:
    initial_state = jnp.zeros(state_shape, r.accumulate_dtype)
  elif initial_state.shape != state_shape:
    raise ValueError(f"initial_state must have shape {state_shape}; got {initial_state.shape}")
  initial_state = initial_state.astype(r.accumulate_dtype)
  serves = {
    "tpu": lambda: tpu.check(r, chunk_size),
    "interpret": lambda: tpu.supports(r, chunk_size),
  }
  serves["gpu"] = lambda: gpu.check(r, chunk_size)
  serves["interpret_gpu"] = lambda: gpu.supports(r, chunk_size)
  serves |= {name: lambda: None for name in ("xla", "reference")}
  name = dispatch.choose(backend, serves, _ORDER)
  if axis_name is not None and name == "reference":
    raise NotImplementedError(
      "the reference runs rows that are whole: axis_name needs another backend"
    )
  runs = None if segment_ids is None else segments.runs(segment_ids)

  if name == "reference":
    o, final = reference.linear_recurrence(r, initial_state, runs)
  elif axis_name is not None:
    o, final = _parts(name, chunk_size, axis_name, r, initial_state, segment_ids)
  elif T == 1:
    # a token in a segment of its own still continues the initial state: it is the first segment
    step = "reference" if name == "xla" else name
    o, final = linear_recurrence_step(r, initial_state, backend=step)
  else:
    o, final = _chunked(name, chunk_size, r, initial_state, runs)
  return o, final if return_state else None


def linear_recurrence_step(
  r: Recurrence, state: Float[Array, "B Hv K V"], *, backend: str = "auto"
) -> tuple[Float[Array, "B 1 Hv V"], Float[Array, "B Hv K V"]]:
  """One token (T == 1) from a state: the decode step, in float32 arithmetic.

  Args:
    r: the token of every sequence.
    state: as ``linear_recurrence`` returns it, or in bfloat16.
    backend: "auto", "tpu" or "gpu" (Pallas kernels that read and write the state once), "reference" (any platform), or
      "interpret" and "interpret_gpu": the kernels in Pallas's interpreters, on any machine.

  Returns:
    The output in v's dtype and the new state in the dtype of ``state``.

  Raises:
    ValueError: shapes that do not fit.
    NotImplementedError: a backend that was named cannot serve the call.
  """
  r.validate()
  dispatch.needs_parts("v", r.v)
  if r.k.shape[1] != 1:
    raise ValueError(f"a step takes one token; got {r.k.shape[1]}")
  expected = (r.k.shape[0], r.v.shape[2], r.k.shape[3], r.v.shape[3])
  if state.shape != expected:
    raise ValueError(f"state must have shape {expected}; got {state.shape}")
  serves = {name: functools.partial(f, r, state) for name, f in _STEP_CHECKS.items()}
  name = dispatch.choose(backend, serves, _STEP_ORDER)
  return _reference_step(r, state) if name == "reference" else _step(name, r, state)


def _reference_step(r, state):
  o, new = reference.token_step(r, state)
  return o, new.astype(state.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(backend, r, state):
  return _STEPS[backend](r, state)


# Nobody trains on sequences of one token: the gradients are the reference's.
_step.defvjp(
  lambda backend, r, state: (_step(backend, r, state), (r, state)),
  lambda _, inputs, cotangents: jax.vjp(_reference_step, *inputs)[1](cotangents),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(backend, chunk_size, r, initial_state, runs):
  forward, _ = _CHUNKED[backend]
  o, final, _ = forward(r, initial_state, runs, chunk_size, keep=False)
  return o, final


def _chunked_forward(backend, chunk_size, r, initial_state, runs):
  forward, _ = _CHUNKED[backend]
  o, final, kept = forward(r, initial_state, runs, chunk_size, keep=True)
  return (o, final), (r, runs, kept)


def _chunked_backward(backend, chunk_size, residuals, cotangents):
  r, runs, kept = residuals
  _, backward = _CHUNKED[backend]
  dr, dinitial = backward(r, runs, chunk_size, kept, *cotangents)
  return dr, dinitial, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _parts(backend, chunk_size, axis_name, r, initial_state, segment_ids):
  """``_chunked`` of rows of which each device of a mesh axis has a part."""
  return _parts_run(backend, chunk_size, axis_name, r, initial_state, segment_ids, keep=False)[0]


def _parts_run(backend, chunk_size, axis_name, r, initial_state, segment_ids, keep):
  """(o, final), and what the backward pass needs, which is whole only if ``keep``."""
  forward, _ = _CHUNKED[backend]
  runs = None if segment_ids is None else segments.runs(segment_ids)

  def run(r, state):
    return forward(r, state, runs, chunk_size, keep=False)[:2]

  e, written = parts.effect(run, r, runs, segment_ids, axis_name)
  state, final = parts.states(e, written, initial_state, axis_name)
  o, _, kept = forward(r, state, runs, chunk_size, keep=keep)
  return (o, final), (r, runs, kept, e)


def _parts_backward(backend, chunk_size, axis_name, residuals, cotangents):
  r, runs, kept, e = residuals
  _, backward = _CHUNKED[backend]
  do, dfinal = cotangents
  dstate, dinitial = parts.gradients(e, do, dfinal, axis_name)
  dr, _ = backward(r, runs, chunk_size, kept, do, dstate)
  return dr, dinitial, None


_parts.defvjp(functools.partial(_parts_run, keep=True), _parts_backward)
