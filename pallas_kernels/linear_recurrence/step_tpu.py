"""One token of every sequence as a Pallas TPU kernel: the state is read once and written once, in place.

A grid step has some heads of one sequence. The state's channels of the key lie along sublanes and those of the value
along lanes, so what has a number a key channel is needed as a column: all of it is turned at once, as the rows of
one small array, and spread over lanes head by head. Sums over key channels are sums of products in float32, as in the
reference: they cost less than the state's bytes take to move.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence

_LANES, _SUBLANES = 128, 8
# Bytes of the float32 state of a grid step, at the most: 4 MiB of VMEM for it, in and out, twice each.
_BLOCK = 1 << 20


def supports(r: Recurrence, state: Float[Array, "B Hv K V"]) -> None:
  """Raises NotImplementedError, saying why, where the kernel cannot serve the call."""
  if r.accumulate_dtype != jnp.float32:
    raise NotImplementedError("the TPU kernel computes in float32; float64 needs 'reference'")
  if state.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      f"the TPU kernel takes a float32 or bfloat16 state; got {state.dtype}"
    )
  K, V = state.shape[2:]
  if K * V > _BLOCK:  # of one head, which would not fit the VMEM of every chip
    raise NotImplementedError(f"a state of {K} x {V} is too large for the TPU kernel")


def _operands(r: Recurrence) -> tuple[dict, dict]:
  """What the kernel takes of each head: numbers a key channel [B, Hv, K], and a value channel [B, Hv, V], float32."""
  groups = r.v.shape[2] // r.k.shape[2]

  def token(x):
    return x[:, 0].astype(jnp.float32)

  def of_value_heads(x):
    return jnp.repeat(token(x), groups, axis=1)

  q, k, v = of_value_heads(r.q), of_value_heads(r.k), token(r.v)
  columns, rows = {"q": q, "k": k}, {"v": v}

  def row(x):
    return jnp.broadcast_to(x, v.shape)

  if r.decay == "constant":
    rows["decay"] = row(jnp.exp(r.log_decay.astype(jnp.float32))[:, None])
  elif r.log_decay is not None:
    decay = jnp.exp(token(r.log_decay))
    if r.decay == "channel":
      columns["decay"] = decay
    else:
      rows["decay"] = row(decay)
  if isinstance(r.erase, KeyErase):
    rows["beta"] = row(token(r.erase.beta)[..., None])
  elif isinstance(r.erase, LowRankErase):
    columns |= {"a": token(r.erase.a), "b": token(r.erase.b)}
  if r.bonus is not None:
    u = jnp.repeat(r.bonus.astype(jnp.float32), groups, axis=0)
    rows["own"] = row(jnp.sum(q * u * k, axis=-1, keepdims=True)) * v
  return columns, rows


def _stack(parts: dict, heads: int, lanes: int, sublanes: int) -> Float[Array, "B N R L"]:
  """For each group of heads the rows of all parts, one part after the other; padded."""
  B, Hv, D = next(iter(parts.values())).shape
  x = jnp.stack([p.reshape(B, Hv // heads, heads, D) for p in parts.values()], axis=2)
  x = x.reshape(B, Hv // heads, -1, D)
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % sublanes), (0, -D % lanes)))


def _kernel(columns, rows, heads, undecayed, columns_ref, rows_ref, state, o, new):
  K, V = state.shape[2:]
  turned = columns_ref[0, 0].T

  for h in range(heads):

    def column(name, h=h):
      i = columns.index(name) * heads + h
      return turned[:K, i : i + 1]

    for start in range(0, V, _LANES):
      lanes = slice(start, min(start + _LANES, V))

      def row(name, h=h, lanes=lanes):
        i = rows.index(name) * heads + h
        return rows_ref[0, 0, i : i + 1, lanes]

      before = state[0, h, :, lanes].astype(jnp.float32)
      S, v = before, row("v")
      if "decay" in columns:
        S = column("decay") * S
      elif "decay" in rows:
        S = row("decay") * S
      seen = before if undecayed else S
      if "beta" in rows:
        v = row("beta") * (v - jnp.sum(column("k") * seen, axis=0, keepdims=True))
      elif "a" in columns:
        S = S + column("a") * jnp.sum(column("b") * seen, axis=0, keepdims=True)
      S = S + column("k") * v
      if "own" in rows:
        out = jnp.sum(column("q") * before, axis=0, keepdims=True) + row("own")
      else:
        out = jnp.sum(column("q") * S, axis=0, keepdims=True)
      o[0, 0, h : h + 1, lanes] = out.astype(o.dtype)
      new[0, h, :, lanes] = S.astype(new.dtype)


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
  columns, rows = _operands(r)
  heads = max(h for h in range(1, Hv + 1) if Hv % h == 0 and (h == 1 or 4 * h * K * V <= _BLOCK))
  operands = _stack(columns, heads, _LANES, _SUBLANES), _stack(rows, heads, 1, 1)

  def whole(x):
    return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, h: (b, h, 0, 0))

  of_heads = pl.BlockSpec((1, heads, K, V), lambda b, h: (b, h, 0, 0))
  o = jax.ShapeDtypeStruct((B, Hv // heads, heads, V), r.v.dtype)
  moved = sum(x.size * x.dtype.itemsize for x in (*operands, state, state, o))
  o, new = pl.pallas_call(
    functools.partial(_kernel, list(columns), list(rows), heads, r.reads == "undecayed"),
    grid=(B, Hv // heads),
    in_specs=[*map(whole, operands), of_heads],
    out_specs=(whole(o), of_heads),
    out_shape=(o, jax.ShapeDtypeStruct(state.shape, state.dtype)),
    input_output_aliases={2: 1},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    cost_estimate=pl.CostEstimate(flops=7 * state.size, transcendentals=0, bytes_accessed=moved),
    interpret=interpret,
    name="linear_recurrence_step",
  )(*operands, state)
  return o.reshape(B, 1, Hv, V), new
