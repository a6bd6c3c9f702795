"""One token of every sequence as a Pallas Mosaic GPU kernel: the state is read once and written once, in place.

A block of 128 threads has some value channels of a head's state, all of their keys, in registers between one read of
memory and one write. A warp has channels of its own: sums over keys are of a thread's own and a few shuffles, and no
warp waits for another to have its sums. What has a number for each key comes to shared memory, in float32, while the
state is on its way.

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
from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence

# Numbers of a block's state: 64 registers of each thread in float32.
_BLOCK = 64 * 128
# Keys of a load of one number for each of them: every thread has one, two threads the same.
_KEYS = 64
_EACH = plgpu.Layout.TILED(
  plgpu.Tiling(((_KEYS,), (_KEYS // 4,), (1,))), (-3,), (-2, plgpu.Replicated(2)), -1
)


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
  if K % _KEYS or _width(K, V) is None:
    raise NotImplementedError(
      f"the GPU kernel has 64, 128, 192 or 256 keys and a multiple of 32 values; got {K} and {V}"
    )


def _width(K: int, V: int) -> int | None:
  """Value channels of a block."""
  return next((n for n in (128, 64, 32) if V % n == 0 and K * n <= _BLOCK), None)


def _matrix(width: int) -> plgpu.Layout:
  """Of [K, width]: each of four warps has a quarter of the columns, a thread four that are side by side."""
  lanes = width // 16  # that a warp's part of a row takes
  rows = 32 // lanes
  tiles = (rows, width), (rows, width // 4), (4,)
  return plgpu.Layout.TILED(plgpu.Tiling(tiles), (-4,), (-3, -2), -1)


def _of_keys(r: Recurrence) -> dict:
  """What has a number for each key channel of a head, by name; decays as logs."""
  keys = {"q": r.q, "k": r.k}
  if r.decay == "channel":
    keys["decay"] = r.log_decay
  if isinstance(r.erase, LowRankErase):
    keys |= {"a": r.erase.a, "b": r.erase.b}
  if r.bonus is not None:
    keys["bonus"] = r.bonus
  return keys


def _kernel(tree, *refs, keys):
  """Steps a block; ``refs`` are the leaves of a Recurrence of this ``tree``, the state, and the output."""
  *leaves, state, o = refs
  r: Recurrence = jax.tree.unflatten(tree, leaves)
  _, Hv, K, V = state.shape
  width = _width(K, V)
  matrix = _matrix(width)
  batch, head, block = (jax.lax.axis_index(name) for name in ("batch", "head", "block"))
  channels = pl.ds(block * width, width)
  block_of_state = state.at[batch, head, :, channels]

  def load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

  def load_keys(ref):
    of_head = jax.lax.div(head, Hv // ref.shape[-2])
    return load(ref.at[of_head] if ref.ndim == 2 else ref.at[batch, 0, of_head], _EACH)

  # All of these are asked for before the first is waited for.
  S = before = load(block_of_state, matrix)
  v = load(r.v.at[batch, 0, head, channels], matrix.reduce(0))
  loaded = {name: load_keys(ref) for name, ref in _of_keys(r).items()}
  if isinstance(r.erase, KeyErase):
    beta = r.erase.beta[batch, 0, head].astype(jnp.float32)
  if r.decay in ("constant", "scalar"):
    at = head if r.decay == "constant" else (batch, 0, head, 0)
    decay = jnp.exp(r.log_decay[at].astype(jnp.float32))
  names = list(loaded)
  for i, name in enumerate(names):
    keys[i] = jnp.exp(loaded[name]) if name == "decay" else loaded[name]

  def column(name):
    x = load(keys.at[names.index(name)], matrix.reduce(1))
    return jax.lax.broadcast_in_dim(x, S.shape, (0,))

  def row(x):
    return jax.lax.broadcast_in_dim(x, S.shape, (1,))

  def read(name, S):
    return jnp.sum(column(name) * S, axis=0)

  if r.bonus is not None:
    out = read("q", before + column("bonus") * column("k") * row(v))
  if r.decay != "none":
    S = S * (column("decay") if r.decay == "channel" else decay)
  seen = before if r.reads == "undecayed" else S
  if isinstance(r.erase, KeyErase):
    v = beta * (v - read("k", seen))
  elif isinstance(r.erase, LowRankErase):
    S = S + column("a") * row(read("b", seen))
  S = S + column("k") * row(v)
  block_of_state[...] = S.astype(state.dtype)
  if r.bonus is None:
    out = read("q", S)
  o[batch, head, channels] = out.astype(o.dtype)


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
  leaves, tree = jax.tree.flatten(r)
  kernel = plgpu.kernel(
    functools.partial(_kernel, tree),
    out_type=jax.ShapeDtypeStruct((B, Hv, V), r.v.dtype),
    grid=(B, Hv, V // _width(K, V)),
    grid_names=("batch", "head", "block"),
    scratch_types=dict(keys=plgpu.SMEM((len(_of_keys(r)), K), jnp.float32)),
    kernel_name="linear_recurrence_step",
    interpret=interpret,
  )
  new = jax.new_ref(state)
  o = kernel(*leaves, new)
  return o[:, None], jax.freeze(new)
