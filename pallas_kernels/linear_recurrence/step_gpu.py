"""One token of every sequence as a Pallas Mosaic GPU kernel: the state is read once and written once, in place.

A block of 128 threads has some value channels of a head's state, all of their keys: the state comes to shared memory,
is changed in registers as a matrix, and goes back the way it came. Sums over keys are within the block.

Compiled by XLA for an H200 the reference reads the state twice where there is an erase: a sum over all keys must be
there before the first of them is written. That is 3 passes over the state where 2 would do; without an erase it is 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.linear_recurrence.recurrence import Recurrence
from pallas_kernels.linear_recurrence.step_operands import operands

# Numbers of a block's state: 64 registers of each thread in float32. On an H200 half of that was slower.
_BLOCK = 64 * 128
# Rows of the layout that matrices have in registers.
_ROWS = 64
_MATRIX = plgpu.Layout.WGMMA
_OF_KEYS, _OF_VALUES = _MATRIX.reduce(1), _MATRIX.reduce(0)


def check(r: Recurrence, state: Float[Array, "B Hv K V"]) -> None:
  """Raises NotImplementedError, saying why, where the kernel cannot serve the call on this machine."""
  dispatch.needs_hopper()
  supports(r, state)


def supports(r: Recurrence, state: Float[Array, "B Hv K V"]) -> None:
  """The part of ``check`` that does not ask where it runs."""
  if r.accumulate_dtype != jnp.float32:
    raise NotImplementedError("the GPU kernel computes in float32; float64 needs 'reference'")
  if state.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      f"the GPU kernel takes a float32 or bfloat16 state; got {state.dtype}"
    )
  K, V = state.shape[2:]
  if K % _ROWS or _width(K, V) is None:
    raise NotImplementedError(
      f"the GPU kernel has 64, 128, 192 or 256 keys and a multiple of 32 values; got {K} and {V}"
    )


def _width(K: int, V: int) -> int | None:
  """Value channels of a block."""
  return next((n for n in (128, 64, 32) if V % n == 0 and K * n <= _BLOCK), None)


def _kernel(names, undecayed, K, width, keys_ref, values_ref, numbers_ref, state, o, tile, loaded):
  """Steps a block; ``names`` say what is in the rows of the operands."""
  batch, head = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
  channels = pl.ds(jax.lax.axis_index("block") * width, width)
  block = state.at[batch, head, :, channels]
  plgpu.copy_gmem_to_smem(block, tile, loaded)
  keys, numbers = names

  def load(ref, layout, axis):
    x = plgpu.load(ref, (), layout=layout, optimized=False)
    return jax.lax.broadcast_in_dim(x, (K, width), (axis,))

  def of(name):
    if name in keys:
      return load(keys_ref.at[batch, head, keys.index(name)], _OF_KEYS, 0)
    return numbers_ref[batch, head, numbers.index(name)]

  def read(name, S):
    return jnp.sum(of(name) * S, axis=0)

  def row(x):
    return jax.lax.broadcast_in_dim(x, (K, width), (1,))

  at = values_ref.at[batch, head, channels]
  v = given = plgpu.load(at, (), layout=_OF_VALUES, optimized=False)
  plgpu.barrier_wait(loaded)
  S = before = plgpu.load(tile, (), layout=_MATRIX).astype(jnp.float32)
  if "decay" in (*keys, *numbers):
    S = of("decay") * S
  seen = before if undecayed else S
  if "beta" in numbers:
    v = of("beta") * (v - read("k", seen))
  elif "a" in keys:
    S = S + of("a") * row(read("b", seen))
  S = S + of("k") * row(v)
  tile[...] = S.astype(tile.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(tile, block)
  out = read("q", before) + of("own") * given if "own" in numbers else read("q", S)
  o[batch, head, channels] = out.astype(o.dtype)
  plgpu.wait_smem_to_gmem(0)


def step(
  r: Recurrence,
  state: Float[Array, "B Hv K V"],
  interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "B 1 Hv V"], Float[Array, "B Hv K V"]]:
  """As ``reference.token_step``, with the new state in the dtype of ``state`` and, where that is donated, in its place.

  Args:
    r: one token of every sequence, float32 or bfloat16.
    state: float32 or bfloat16; read and written as it is, arithmetic is float32.
    interpret: runs the kernel on any machine.
  """
  B, Hv, K, V = state.shape
  width = _width(K, V)
  keys, values, numbers = operands(r)
  names = list(keys), list(numbers)
  numbers = [x[..., 0] for x in numbers.values()] or [jnp.zeros((B, Hv), jnp.float32)]
  lanes = min(width, 128 // state.dtype.itemsize)  # of 128 bytes, the most that is swizzled
  transforms = (
    plgpu.TilingTransform((8, lanes)),
    plgpu.SwizzleTransform(lanes * state.dtype.itemsize),
  )
  kernel = plgpu.kernel(
    functools.partial(_kernel, names, r.reads == "undecayed", K, width),
    out_type=jax.ShapeDtypeStruct((B, Hv, V), r.v.dtype),
    grid=(B, Hv, V // width),
    grid_names=("batch", "head", "block"),
    scratch_types=dict(
      tile=plgpu.SMEM((K, width), state.dtype, transforms=transforms), loaded=plgpu.Barrier()
    ),
    kernel_name="linear_recurrence_step",
    interpret=interpret,
  )
  new = jax.new_ref(state)
  o = kernel(jnp.stack(list(keys.values()), 2), values["v"], jnp.stack(numbers, 2), new)
  return o[:, None], jax.freeze(new)
