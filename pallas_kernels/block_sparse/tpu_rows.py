"""Attention to gathered keys on TPUs, each query to its own: tokens that are chosen one by one (DSA).

XLA gathers the keys of some queries and adds up their gradients (``xla.py``). With einsums between, it writes logits
and weights of every head to memory and reads them again, several times; a program here has one query, whose heads are
the rows of a matrix, and holds them in VMEM. What its operands take to read is then more than its bundles
(``python -m pallas_kernels.cost --kernels block_sparse --shapes dsa``).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse.reference import Blocks
from pallas_kernels.block_sparse.tpu_tiles import LANES, NOTHING, dot

# Keys of a step, at most; and the part of VMEM that a step takes.
_KEYS, _PART = 2048, 0.6


def limitations(q, k, v, blocks: Blocks, vmem: int) -> None:
  """Raises NotImplementedError, saying why, where the kernels cannot serve a call."""
  keys = blocks.indices.shape[3] * blocks.size
  if keys % LANES:
    raise NotImplementedError(
      f"the Pallas kernels have blocks of multiples of 16 tokens, or of any number if a query has a multiple of {LANES}"
      f" keys; got {blocks.indices.shape[3]} blocks of {blocks.size}"
    )
  rows, size = q.shape[2] // blocks.indices.shape[1], jnp.result_type(q, k, v).itemsize
  _tile(rows, keys, k.shape[3], v.shape[3], size, vmem)


def _lanes(n: int) -> int:
  return -(-n // LANES) * LANES


def _tile(rows: int, keys: int, D: int, V: int, size: int, vmem: int) -> int:
  """Keys of a step: as many as VMEM has room for, backward."""
  of_query = rows * (_lanes(D) + _lanes(V)) * (4 * size + 4)

  def taken(tile):
    # Keys, values and their gradients, this step's and the next's; of logits what is made of them.
    return of_query + tile * (2 * (_lanes(D) + _lanes(V)) * (size + 4) + 5 * 4 * rows)

  tiles = [n for n in range(LANES, min(keys, _KEYS) + 1, LANES) if keys % n == 0]
  fitting = [n for n in tiles if taken(n) <= _PART * vmem]
  if not fitting:
    raise NotImplementedError(f"{rows} heads of {D} channels do not fit the {vmem} bytes of VMEM")
  return fitting[-1]


def _logits(scale, q, k, seen):
  return jnp.where(seen, scale * dot(q, k, (1, 1)), NOTHING)


def _forward(scale, q, k, seen, o, lse, top, total, out, v=None):
  """Some keys of a query; the softmax is online over its steps. Without v the keys are the values."""
  step, steps = pl.program_id(1), pl.num_programs(1)

  @pl.when(step == 0)
  def _():
    top[...] = jnp.full_like(top, NOTHING)
    total[...] = jnp.zeros_like(total)
    out[...] = jnp.zeros_like(out)

  keys, mask = k[0], seen[0] > 0
  values = keys if v is None else v[0]
  logits = _logits(scale, q[0], keys, mask)
  highest = jnp.maximum(top[...], jnp.max(logits, axis=1, keepdims=True))
  p = jnp.where(mask, jnp.exp(logits - highest), 0)
  kept = jnp.exp(top[...] - highest)
  total[...] = kept * total[...] + jnp.sum(p, axis=1, keepdims=True)
  out[...] = kept * out[...] + dot(p.astype(values.dtype), values, (1, 0))
  top[...] = highest

  @pl.when(step == steps - 1)
  def _():
    some = total[...] > 0
    sums = jnp.where(some, total[...], 1)
    o[0] = (out[...] / sums).astype(o.dtype)
    lse[0] = jnp.where(some, top[...] + jnp.log(sums), -jnp.inf)


def _backward(scale, q, do, lse, delta, k, seen, dq, dk, sum_dq, v=None, dv=None):
  """Some keys of a query and their gradients; that of the query is the sum over its steps."""
  step, steps = pl.program_id(1), pl.num_programs(1)

  @pl.when(step == 0)
  def _():
    sum_dq[...] = jnp.zeros_like(sum_dq)

  keys, mask = k[0], seen[0] > 0
  values = keys if v is None else v[0]
  logits = _logits(scale, q[0], keys, mask)
  p = jnp.where(mask, jnp.exp(logits - lse[0]), 0)
  dlogits = (scale * p * (dot(do[0], values, (1, 1)) - delta[0])).astype(keys.dtype)
  sum_dq[...] += dot(dlogits, keys, (1, 0))
  of_keys, of_values = dot(dlogits, q[0], (0, 0)), dot(p.astype(do.dtype), do[0], (0, 0))
  if v is None:
    dk[0] = of_keys + of_values
  else:
    dk[0], dv[0] = of_keys, of_values

  @pl.when(step == steps - 1)
  def _():
    dq[0] = sum_dq[...].astype(dq.dtype)


@dataclasses.dataclass(frozen=True)
class Kernels:
  """``xla.Core``, of so many bytes of VMEM, or in Pallas's interpreter."""

  vmem: int
  interpret: bool = False

  def forward(self, q, k, v, mask, scale):
    R, (keys, V) = q.shape[4], (k if v is None else v).shape[4:]
    outs = {"o": ((R, V), q.dtype), "lse": ((R, 1), jnp.float32)}
    scratch = {"top": (R, 1), "total": (R, 1), "out": (R, V)}
    ins = {"q": q, "k": k, "v": v, "seen": mask.astype(jnp.int32)}
    o, lse = self._call(_forward, scale, ins, outs, scratch, keys)
    return o, lse[..., 0]

  def backward(self, q, do, lse, delta, k, v, mask, scale):
    keys, D = k.shape[4:]
    outs = {"dq": (q.shape[4:], q.dtype), "dk": ((keys, D), jnp.float32)}
    if v is not None:
      outs["dv"] = v.shape[4:], jnp.float32
    ins = {"q": q, "do": do, "lse": lse[..., None], "delta": delta[..., None]}
    ins |= {"k": k, "v": v, "seen": mask.astype(jnp.int32)}
    dq, dk, *dv = self._call(_backward, scale, ins, outs, {"sum_dq": q.shape[4:]}, keys)
    return dq, dk, *(dv or [None])

  def _call(self, kernel, scale, ins, outs, scratch, keys):
    """A query and some of its ``keys`` a step, the queries of all leading axes; what is by key is cut along them."""
    q, k, v = ins["q"], ins["k"], ins["v"]
    leading, (R, D), V = q.shape[:4], q.shape[4:], (k if v is None else v).shape[5]
    tile = _tile(R, keys, D, V, q.dtype.itemsize, self.vmem)
    by_keys = {"k", "v", "dk", "dv"}

    def spec(name, shape):
      if name == "seen":
        return pl.BlockSpec((1, 1, tile), lambda n, i: (n, 0, i))
      if name in by_keys:
        return pl.BlockSpec((1, tile, shape[1]), lambda n, i: (n, i, 0))
      return pl.BlockSpec((1, *shape), lambda n, i: (n, 0, 0))

    given = {name: x.reshape(-1, *x.shape[4:]) for name, x in ins.items() if x is not None}
    N = given["q"].shape[0]

    def run(*refs):
      kernel(scale, **dict(zip((*given, *outs, *scratch), refs, strict=True)))

    results = pl.pallas_call(
      run,
      name=f"block_sparse_rows_{kernel.__name__.strip('_')}",
      grid=(N, keys // tile),
      in_specs=[spec(name, x.shape[1:]) for name, x in given.items()],
      out_specs=[spec(name, shape) for name, (shape, _) in outs.items()],
      out_shape=[jax.ShapeDtypeStruct((N, *shape), dtype) for shape, dtype in outs.values()],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=None if self.interpret else self.vmem,
      ),
      interpret=self.interpret,
    )(*given.values())
    return [x.reshape(*leading, *x.shape[1:]) for x in results]
