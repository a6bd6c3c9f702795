"""One token of every sequence as a Pallas TPU kernel: the state is read once and written once, in place.

A grid step has some heads of one sequence, a head's state with one of its axes along sublanes and the other along
lanes. What has a number for each lane is a row, which every sublane can read; what has one for each sublane is spread
over the lanes by the matrix unit, which is idle otherwise: three bfloat16 parts of each number, times ones, add up to
it exactly. (Copies turned by the transpose unit, or a lane broadcast, take half as long again.) Sums over key channels
are sums of products in float32, as in the reference: they cost less than the state's bytes take to move.

The state lies as XLA stores it, values along lanes; but where values would not fill the lanes and keys do (Mamba-2),
XLA stores it the other way round, and so does the kernel take it: with a copy of the state each token, three times as
many bytes would be moved. Where neither would, as with RWKV-7's 64 of both, tiles of 128 lanes are half empty: the
state is twice the bytes that the cost table counts.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.linear_recurrence.recurrence import Recurrence
from pallas_kernels.linear_recurrence.step_operands import operands

_LANES, _SUBLANES = 128, 8
# bfloat16 numbers that make a float32.
_PARTS = 3
# Bytes of the float32 state of a grid step, at the most: 4 MiB of VMEM for it, in and out, twice each.
_BLOCK = 1 << 20


def check(r: Recurrence, state: Float[Array, "B Hv K V"]) -> None:
  """Raises NotImplementedError, saying why, where the kernel cannot serve the call on this machine."""
  dispatch.needs_tpu(r.accumulate_dtype)
  supports(r, state)


def supports(r: Recurrence, state: Float[Array, "B Hv K V"]) -> None:
  """The part of ``check`` that does not ask where it runs."""
  if r.accumulate_dtype != jnp.float32:
    raise NotImplementedError("the TPU kernel computes in float32; float64 needs 'reference'")
  if state.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      f"the TPU kernel takes a float32 or bfloat16 state; got {state.dtype}"
    )
  K, V = state.shape[2:]
  R, L = (V, K) if _turned(K, V) else (K, V)
  # In and out, twice each: so much of the VMEM of every chip, and as much for the rest.
  if 4 * R * -(-L // _LANES) * _LANES * state.dtype.itemsize > dispatch.SMALL_VMEM // 2:
    raise NotImplementedError(f"a state of {K} x {V} is too large for the TPU kernel")


def _stack(parts: dict, heads: int, width: int) -> Float[Array, "B N R L"]:
  """For each group of heads the rows of all parts, one part after the other."""
  B, Hv = next(iter(parts.values())).shape[:2]
  x = jnp.stack([jnp.broadcast_to(p, (B, Hv, width)) for p in parts.values()], axis=1)
  x = x.reshape(B, len(parts), Hv // heads, heads, width)
  return jnp.swapaxes(x, 1, 2).reshape(B, Hv // heads, -1, width)


def _spread(parts: dict, heads: int) -> Float[Array, "B N h R L"]:
  """For each head the rows of all parts, three bfloat16 numbers that add up to each of theirs, and rows of zeros."""
  rows = jnp.stack(list(parts.values()), axis=2)
  split = []
  for _ in range(_PARTS):
    # not astype alone: XLA may keep what that would round away
    split.append(jax.lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7))
    rows = rows - split[-1]
  x = jnp.concatenate(split, axis=2).astype(jnp.bfloat16)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 16), (0, 0)))
  return x.reshape(x.shape[0], -1, heads, *x.shape[2:])


def _turned(K: int, V: int) -> bool:
  """Whether XLA stores states [..., K, V] with keys along lanes."""
  return V % _LANES != 0 and V % _SUBLANES == 0 and K % _LANES == 0


def _kernel(spread, rows, heads, turned, undecayed, spread_ref, rows_ref, state, o, new):
  """Steps the states of some heads; ``spread`` and ``rows`` name what is in the rows of the operands."""
  R, L = state.shape[2:]
  keys = 1 if turned else 0  # the axis of the key channels
  width = L if turned else min(L, _LANES)
  outs = jnp.zeros((R, _LANES), jnp.float32)
  # What is spread lies in whole registers side by side.
  pitch = -(-width // _LANES) * _LANES
  shape = spread_ref.shape[3], len(spread) * pitch
  row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
  members = jnp.zeros(shape, bool)
  for i in range(len(spread)):
    for part in range(_PARTS):
      here = (lane >= i * pitch) & (lane < (i + 1) * pitch)
      members |= here & (row == part * len(spread) + i)
  ones = jnp.where(members, 1.0, 0.0).astype(jnp.bfloat16)

  for h in range(heads):
    dimensions = (((0,), (0,)), ((), ()))
    wide = jax.lax.dot_general(
      spread_ref[0, 0, h], ones, dimensions, preferred_element_type=jnp.float32
    )
    columns = {name: wide[:, i * pitch : i * pitch + width] for i, name in enumerate(spread)}
    for start in range(0, L, width):
      lanes = slice(start, min(start + width, L))

      def of(name, h=h, lanes=lanes, columns=columns):
        if name in columns:
          return columns[name][:, : lanes.stop - lanes.start]
        i = rows.index(name) * heads + h
        return rows_ref[0, 0, i : i + 1, lanes]

      def read(name, S, of=of):
        return jnp.sum(of(name) * S, axis=keys, keepdims=True)

      before = state[0, h, :, lanes].astype(jnp.float32)
      S = of("decay") * before if "decay" in (*spread, *rows) else before
      v = of("v")
      if "beta" in rows:
        v = of("beta") * (v - read("k", before if undecayed else S))
      elif "a" in (*spread, *rows):
        S = S + of("a") * read("b", before if undecayed else S)
      S = S + of("k") * v
      new[0, h, :, lanes] = S.astype(new.dtype)
      if "own" in rows:
        own = of("own") * of("v")  # the same in all lanes where values lie along sublanes
        out = read("q", before) + (own[:, :1] if turned else own)
      else:
        out = read("q", S)
      if turned:
        lane = jax.lax.broadcasted_iota(jnp.int32, outs.shape, 1)
        outs = jnp.where(lane == h, out, outs)
      else:
        o[0, 0, h : h + 1, lanes] = out.astype(o.dtype)
  if turned:
    o[0, 0] = outs.T[:heads].astype(o.dtype)


def step(
  r: Recurrence,
  state: Float[Array, "B Hv K V"],
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B 1 Hv V"], Float[Array, "B Hv K V"]]:
  """As ``reference.token_step``, with the new state in the dtype of ``state`` and, where that is donated, in its place.

  Args:
    r: one token of every sequence, float32 or bfloat16.
    state: float32 or bfloat16; read and written as it is, arithmetic is float32.
    interpret: runs the kernel on any machine.
  """
  B, Hv, K, V = state.shape
  turned = _turned(K, V)
  keys, values, numbers = operands(r)
  spread, rows = (values, keys | numbers) if turned else (keys, values | numbers)
  most = min(max(_BLOCK // (4 * K * V), 1), _LANES)
  heads = max(h for h in range(1, min(most, Hv) + 1) if Hv % h == 0)
  stacked = _spread(spread, heads), _stack(rows, heads, K if turned else V)
  if turned:
    state = jnp.swapaxes(state, 2, 3)

  def whole(x):
    return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, h: (b, h, *(0,) * (x.ndim - 2)))

  of_heads = pl.BlockSpec((1, heads, *state.shape[2:]), lambda b, h: (b, h, 0, 0))
  o = jax.ShapeDtypeStruct((B, Hv // heads, heads, V), r.v.dtype)
  moved = sum(x.size * x.dtype.itemsize for x in (*stacked, state, state, o))
  o, new = pl.pallas_call(
    functools.partial(_kernel, list(spread), list(rows), heads, turned, r.reads == "undecayed"),
    grid=(B, Hv // heads),
    in_specs=[*map(whole, stacked), of_heads],
    out_specs=(whole(o), of_heads),
    out_shape=(o, jax.ShapeDtypeStruct(state.shape, state.dtype)),
    input_output_aliases={2: 1},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    cost_estimate=pl.CostEstimate(flops=7 * state.size, transcendentals=0, bytes_accessed=moved),
    interpret=interpret,
    name="linear_recurrence_step",
  )(*stacked, state)
  return o.reshape(B, 1, Hv, V), jnp.swapaxes(new, 2, 3) if turned else new
