"""Block-sparse attention as Pallas kernels for TPUs: the keys and values of a head stay in VMEM.

A program walks the queries of a key head, some a step. Their blocks' numbers come through SMEM; each block is a slice
of the keys in VMEM, so that HBM is read once a key head, whatever is chosen. Some blocks of a query are one matrix, and
the softmax is online over what is left. The backward kernel adds to
gradients of keys and values that are in VMEM too: there is no scatter.

A document may begin anywhere, a slice of VMEM must not: a slice begins at or before its block, at a multiple of the
tile's rows, and what lies around the block is masked.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.block_sparse.reference import Blocks

# Queries a step, the rows of a tile of float32.
_QUERIES = 8
# Rows of a tile of bfloat16: where slices may begin.
_TILE = 16
# Logits of what is hidden, and the logarithm of a sum that is empty.
_NOTHING = -1e30
# Lanes of a register, and keys of a query that are one matrix. On v6e, 16 heads of 128 channels and 16 blocks of 64
# take 298 bundles a query forward and 809 backward with 1024, 367 and 1144 with 512, 476 and 1055 with 256.
_LANES, _KEYS = 128, 1024
# What is left for all that is not keys and values.
_REST = 6 * 2**20


def check(q, k, v, blocks: Blocks) -> None:
  """Raises NotImplementedError, saying why, where the kernels cannot serve the call on this machine."""
  if dispatch.platform() != "tpu":
    raise NotImplementedError(f"the Pallas kernel needs a TPU; this is a {dispatch.platform()}")
  limitations(q, k, v, blocks)


def limitations(q, k, v, blocks: Blocks, backward: bool = True) -> None:
  """The part of ``check`` that does not ask where it runs."""
  if jnp.result_type(q, k, v).itemsize > 4:
    raise NotImplementedError("the Pallas kernel computes in float32; float64 needs 'xla'")
  if blocks.size % _TILE:
    raise NotImplementedError(f"the Pallas kernel has blocks of multiples of {_TILE} tokens")
  plan = _Plan.of(q, k, v, blocks)
  if plan.vmem(backward) > _vmem():
    raise NotImplementedError(
      f"keys and values of a head need {plan.vmem(backward) >> 20} MiB of VMEM; there are {_vmem() >> 20}"
    )


def _vmem() -> int:
  """Bytes of VMEM of the chip that is traced for; the smallest of any where that is not known."""
  try:
    return pltpu.get_tpu_info().vmem_capacity_bytes
  except ValueError:
    return 16 * 2**20


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Static facts of a call.

  Attributes:
    B, heads, groups, rows: batch, key heads, groups of a key head, query heads of a group.
    T, Tk: queries and keys, with what pads them.
    slots, width: blocks of a query, with what pads them, and those that are one matrix.
    size, span: tokens of a block, and of the slice around it.
  """

  B: int
  heads: int
  groups: int
  rows: int
  T: int
  Tk: int
  D: int
  V: int
  slots: int
  width: int
  size: int
  span: int
  dtype: jnp.dtype

  @classmethod
  def of(cls, q, k, v, blocks: Blocks) -> "_Plan":
    (B, T, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    G, S = blocks.indices.shape[1], blocks.indices.shape[3]
    span = blocks.size if blocks.layout.aligned else blocks.size + _TILE
    # Slices fill registers' lanes: several one, or one several.
    span = next((n for n in (16, 32, 64) if n >= span), -(-span // _LANES) * _LANES)
    width = max(1, min(-(-S * span // _LANES) * _LANES, _KEYS) // span)
    S = -(-S // width) * width
    Tk = -(-Tk // _TILE) * _TILE + span
    T = -(-T // _QUERIES) * _QUERIES
    dtype = jnp.result_type(q, k, v)
    sizes = (T, Tk, D, v.shape[3], S, width, blocks.size, span)
    return cls(B, Hkv, G // Hkv, H // G, *sizes, dtype)

  def vmem(self, backward: bool) -> int:
    """Bytes of the keys and values of a head, and of their gradients."""
    lanes = sum(-(-d // 128) * 128 for d in (self.D, self.V))
    return self.Tk * lanes * (self.dtype.itemsize + 4 * backward) + _REST

  @property
  def precision(self):
    return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

  def flops(self, matmuls: int) -> pl.CostEstimate:
    pairs = self.B * self.heads * self.groups * self.T * self.slots * self.rows * self.span
    keys = self.B * self.heads * self.Tk * (self.D + self.V) * self.dtype.itemsize
    queries = self.B * self.heads * self.groups * self.T * self.rows * (self.D + self.V)
    return pl.CostEstimate(
      flops=matmuls * pairs * (self.D + self.V),
      transcendentals=pairs,
      bytes_accessed=keys + queries * self.dtype.itemsize,
    )


def _operands(p: _Plan, q, k, v, blocks: Blocks):
  """q [B Hkv groups, T, rows, D], k and v [B Hkv, Tk, D], and of each block the slice's start and the rows seen."""
  layout, T = blocks.layout, q.shape[1]
  indices = jnp.repeat(blocks.indices, blocks.query_block, axis=2)[:, :, :T]
  begin = layout.starts[:, None, :, None] + indices * p.size
  last = layout.positions[:, None] - blocks.window
  end = jnp.minimum(begin + p.size, last + 1)
  seen = (indices >= 0) & (layout.positions >= 0)[:, None] & (begin < end)
  begin, end = jnp.where(seen, begin, 0), jnp.where(seen, end, 0)
  slices = (begin // _TILE * _TILE, begin, end)
  slices = (_pad(_pad(x, 2, p.T), 3, p.slots) for x in slices)
  places = tuple(x.reshape(-1, p.T, p.slots).astype(jnp.int32) for x in slices)
  keys = (jnp.moveaxis(x, 2, 1).reshape(-1, *x.shape[1:2], x.shape[3]) for x in (k, v))
  k, v = (_pad(x.astype(p.dtype), 1, p.Tk) for x in keys)
  return _by_group(p, q).astype(p.dtype), k, v, places


def _pad(x: Array, axis: int, size: int) -> Array:
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, pad)


def _by_group(p: _Plan, x: Array) -> Array:
  """[B, T, H, ...] -> [B Hkv groups, T, rows, ...], padded."""
  x = x.reshape(*x.shape[:2], p.heads * p.groups, p.rows, *x.shape[3:])
  x = jnp.moveaxis(_pad(x, 1, p.T), 2, 1)
  return x.reshape(-1, *x.shape[2:])


def _from_groups(p: _Plan, x: Array, T: int) -> Array:
  """The inverse of ``_by_group``."""
  x = x.reshape(p.B, p.heads * p.groups, *x.shape[1:])
  x = jnp.moveaxis(x, 1, 2)[:, :T]
  return x.reshape(p.B, T, -1, *x.shape[4:])


def _dot(p: _Plan, x, y, contract, dtype=jnp.float32):
  return jax.lax.dot_general(
    x,
    y,
    ((contract[0], contract[1]), ((), ())),
    precision=p.precision,
    preferred_element_type=dtype,
  )


def _transposed(x):
  """A small matrix of float32, by the matrix unit, exactly."""
  n = x.shape[0]
  eye = (
    jax.lax.broadcasted_iota(jnp.int32, (n, n), 0) == jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)
  ).astype(jnp.float32)
  return jax.lax.dot_general(x, eye, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def _chosen(p: _Plan, c: int, group, starts, *refs):
  """A group of a query's blocks: where they start, and the rows of each array, one matrix [width span, D]."""
  at = [starts[0, c, group * p.width + i] for i in range(p.width)]
  at = [pl.ds(pl.multiple_of(start, _TILE), p.span) for start in at]
  rows = (jnp.concatenate([ref[0, i, :] for i in at], axis=0) for ref in refs)
  return at, *rows


def _seen(p: _Plan, c: int, group, starts, begins, ends):
  """[1, width span]: whether the query sees the rows of ``_chosen``."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
  out, each = [], max(_LANES // p.span, 1)  # slices that share lanes
  for lanes in range(p.width * p.span // _LANES):
    first = group * p.width + lanes * _LANES // p.span

    def scalar(ref, first=first):
      x = ref[0, c, first]
      for i in range(1, each):
        x = jnp.where(lane >= i * p.span, ref[0, c, first + i], x)
      return x

    row = scalar(starts) + (lane % p.span if each > 1 else lane + lanes * _LANES % p.span)
    out.append((row >= scalar(begins)) & (row < scalar(ends)))
  return jnp.concatenate(out, axis=1)


def _over_groups(p: _Plan, body, carry):
  """Folds ``body(group, carry)`` over the groups of a query's blocks."""
  count = p.slots // p.width
  return body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def _forward_kernel(p: _Plan, scale, starts, begins, ends, q_ref, k_ref, v_ref, o_ref, lse_ref):
  lse = []
  for c in range(_QUERIES):
    q = q_ref[0, c]

    def step(group, carry, c=c, q=q):
      top, total, acc = carry
      _, k, v = _chosen(p, c, group, starts, k_ref, v_ref)
      seen = _seen(p, c, group, starts, begins, ends)
      logits = jnp.where(seen, scale * _dot(p, q, k, ((1,), (1,))), _NOTHING)
      new = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
      weights = jnp.where(seen, jnp.exp(logits - new), 0)
      before = jnp.exp(top - new)
      total = total * before + jnp.sum(weights, axis=1, keepdims=True)
      return new, total, acc * before + _dot(p, weights.astype(v.dtype), v, ((1,), (0,)))

    column = lambda x: jnp.full((p.rows, 1), x, jnp.float32)  # noqa: E731
    first = column(_NOTHING), column(0.0), jnp.zeros((p.rows, p.V), jnp.float32)
    top, total, acc = _over_groups(p, step, first)
    some = total > 0
    total = jnp.where(some, total, 1)
    o_ref[0, c] = (acc / total).astype(o_ref.dtype)
    lse.append(jnp.where(some, top + jnp.log(total), _NOTHING))
  lse_ref[0] = _transposed(jnp.concatenate(lse, axis=1))


def _backward_kernel(
  p: _Plan,
  scale,
  starts,
  begins,
  ends,
  q_ref,
  k_ref,
  v_ref,
  do_ref,
  lse_ref,
  delta_ref,
  dq_ref,
  dk_ref,
  dv_ref,
):
  @pl.when(pl.program_id(1) == 0)
  def _():
    dk_ref[...] = jnp.zeros_like(dk_ref)
    dv_ref[...] = jnp.zeros_like(dv_ref)

  all_lse, all_delta = _transposed(lse_ref[0]), _transposed(delta_ref[0])
  for c in range(_QUERIES):
    q, do = q_ref[0, c], do_ref[0, c]
    lse, delta = all_lse[:, c : c + 1], all_delta[:, c : c + 1]

    def step(group, dq, c=c, q=q, do=do, lse=lse, delta=delta):
      at, k, v = _chosen(p, c, group, starts, k_ref, v_ref)
      seen = _seen(p, c, group, starts, begins, ends)
      logits = scale * _dot(p, q, k, ((1,), (1,)))
      weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - lse, 0)), 0)
      dp = _dot(p, do, v, ((1,), (1,)))
      dlogits = (scale * weights * (dp - delta)).astype(k.dtype)
      dv = _dot(p, weights.astype(do.dtype), do, ((0,), (0,)))
      dk = _dot(p, dlogits, q, ((0,), (0,)))
      for i, rows in enumerate(at):
        part = slice(i * p.span, (i + 1) * p.span)
        dv_ref[0, rows, :] += dv[part]
        dk_ref[0, rows, :] += dk[part]
      return dq + _dot(p, dlogits, k, ((1,), (0,)))

    dq = _over_groups(p, step, jnp.zeros((p.rows, p.D), jnp.float32))
    dq_ref[0, c] = dq.astype(dq_ref.dtype)


def _call(p: _Plan, kernel, name, arrays, keys, outs, matmuls, interpret):
  """Runs a kernel over key heads, and for each over the queries of its groups.

  Args:
    arrays: operands by query, [B Hkv groups, T, ...]; the first three are for SMEM.
    keys: operands by key, [B Hkv, Tk, D], which come after the fourth array.
    outs: shapes and dtypes of the results; those of gradients by key are last.
  """
  steps = p.T // _QUERIES

  def by_query(x, **space):
    shape = (1, _QUERIES, *x.shape[2:])
    zeros = (0,) * (len(shape) - 2)
    return pl.BlockSpec(shape, lambda b, i: (b * p.groups + i // steps, i % steps, *zeros), **space)

  def by_key(x):
    once = pl.Buffered(1)
    return pl.BlockSpec((1, *x.shape[1:]), lambda b, i: (b, 0, 0), pipeline_mode=once)

  places, rest = arrays[:3], arrays[3:]
  specs = [by_query(x, memory_space=pltpu.SMEM) for x in places]
  specs += [by_query(rest[0]), *(by_key(x) for x in keys), *(by_query(x) for x in rest[1:])]
  out_specs = [by_key(x) if x.ndim == 3 and x.shape[1] == p.Tk else by_query(x) for x in outs]
  semantics = ("parallel", "arbitrary")
  limit = None if interpret else _vmem()
  return pl.pallas_call(
    kernel,
    name=name,
    grid=(p.B * p.heads, p.groups * steps),
    in_specs=specs,
    out_specs=out_specs,
    out_shape=outs,
    compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit),
    cost_estimate=p.flops(matmuls),
    interpret=interpret,
  )(*places, rest[0], *keys, *rest[1:])


def forward(q, k, v, sinks, blocks: Blocks, scale: float, interpret=False):
  """As ``reference.forward``, but without the keys of the window."""
  o, lse = _attend(q, k, v, blocks, scale, interpret)
  if sinks is None:
    return o, lse
  with_sink = jnp.logaddexp(lse, sinks.astype(lse.dtype))
  share = jnp.where(lse > -jnp.inf, jnp.exp(lse - with_sink), 0)
  return (o * share[..., None]).astype(o.dtype), with_sink


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, blocks, scale, interpret):
  limitations(q, k, v, blocks, backward=False)
  p = _Plan.of(q, k, v, blocks)
  queries, keys, values, places = _operands(p, q, k, v, blocks)
  G = p.B * p.heads * p.groups
  outs = [
    jax.ShapeDtypeStruct((G, p.T, p.rows, p.V), q.dtype),
    jax.ShapeDtypeStruct((G, p.T, p.rows), jnp.float32),
  ]
  kernel = functools.partial(_forward_kernel, p, scale)
  arrays, name = (*places, queries), "block_sparse_forward"
  o, lse = _call(p, kernel, name, arrays, (keys, values), outs, 2, interpret)
  o, lse = (_from_groups(p, x, q.shape[1]) for x in (o, lse))
  return o, jnp.where(lse > _NOTHING / 2, lse, -jnp.inf)


def _attend_forward(q, k, v, blocks, scale, interpret):
  o, lse = _attend(q, k, v, blocks, scale, interpret)
  return (o, lse), (q, k, v, blocks, o, lse)


def _attend_backward(scale, interpret, residuals, cotangents):
  q, k, v, blocks, o, lse = residuals
  do, dlse = cotangents
  limitations(q, k, v, blocks)
  p = _Plan.of(q, k, v, blocks)
  queries, keys, values, places = _operands(p, q, k, v, blocks)
  # The softmax's derivative: dlogits = p (do . v - delta).
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
  finite = jnp.where(lse == -jnp.inf, 0, lse)
  rest = (_by_group(p, do).astype(p.dtype), _by_group(p, finite), _by_group(p, delta))
  outs = [
    jax.ShapeDtypeStruct(queries.shape, q.dtype),
    jax.ShapeDtypeStruct(keys.shape, jnp.float32),
    jax.ShapeDtypeStruct(values.shape, jnp.float32),
  ]
  kernel = functools.partial(_backward_kernel, p, scale)
  arrays, name = (*places, queries, *rest), "block_sparse_backward"
  dq, *dkv = _call(p, kernel, name, arrays, (keys, values), outs, 5, interpret)
  dk, dv = (
    jnp.moveaxis(x.reshape(p.B, p.heads, p.Tk, -1), 1, 2)[:, : k.shape[1]].astype(y.dtype)
    for x, y in zip(dkv, (k, v), strict=True)
  )
  return _from_groups(p, dq, q.shape[1]), dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)
