"""An indexer's scores as Pallas kernels for TPUs.

A tile is some queries, each with all its heads: the rows of one matrix, [rows, keys] with a tile of keys. The heads of
a query are neighbours, so that their sum is one of registers. The backward pass computes products again: once for the
gradients by query, and once for those of keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.block_sparse.tpu_tiles import LANES, SUBLANES, TILE, dot

# Rows and keys of a tile.
_ROWS, _KEYS = 1024, 512


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Static facts: heads with what pads them, queries and keys of a tile, and how many tiles there are of both."""

  B: int
  t: int
  N: int
  heads: int
  queries: int
  keys: int
  steps: int
  parts: int

  @classmethod
  def of(cls, q, k) -> "_Plan":
    (B, t, h, _), N = q.shape, k.shape[1]
    heads = -(-h // SUBLANES) * SUBLANES
    queries = min(max(SUBLANES, _ROWS // heads // TILE * TILE), -(-t // SUBLANES) * SUBLANES)
    keys = min(_KEYS, -(-N // LANES) * LANES)
    return cls(B, t, N, heads, queries, keys, -(-t // queries), -(-N // keys))

  @property
  def rows(self) -> int:
    return self.queries * self.heads

  def by_query(self, x: Array) -> Array:
    """[B, t, h, D] -> [B, rows of all tiles, D], padded with zeros."""
    pad = self.steps * self.queries - self.t
    x = jnp.pad(x, ((0, 0), (0, pad), (0, self.heads - x.shape[2]), (0, 0)))
    return x.reshape(self.B, -1, x.shape[3])

  def from_queries(self, x: Array, h: int) -> Array:
    """The inverse of ``by_query``."""
    return x.reshape(self.B, -1, self.heads, x.shape[2])[:, : self.t, :h]

  def by_key(self, x: Array) -> Array:
    """[B, N, D] -> padded."""
    return jnp.pad(x, ((0, 0), (0, self.parts * self.keys - self.N), (0, 0)))

  def call(self, kernel, name, end, inputs, outs, scratch, products, *, over_keys, interpret):
    """Runs a kernel over tiles of queries and, innermost, the tiles of keys before the end; or the other way round.

    Args:
      kernel: gets the number of the tile of keys, whether it is before the end, whether it is the outer tile's first
        step or the last, the end, and all references.
      inputs, outs: (array or its shape, "query", "key" or "pair") each.
      products: channels of the matrix products.
    """
    outer, inner = (self.steps, self.parts) if over_keys else (self.parts, self.steps)

    def at(i, j):  # (tile of queries, tile of keys)
      return (i, j) if over_keys else (j, i)

    def seen(n, end):  # past the end the last one before it stays where it is
      return jnp.minimum(n, jnp.maximum((end[0] - 1) // self.keys, 0))

    def spec(x, kind, out):
      query = lambda b, i, j, end: (b, at(i, j)[0], 0)  # noqa: E731
      key = lambda b, i, j, end: (b, at(i, j)[1] if out else seen(at(i, j)[1], end), 0)  # noqa: E731
      pair = lambda b, i, j, end: (b, at(i, j)[0], at(i, j)[1] if out else seen(at(i, j)[1], end))  # noqa: E731
      shape, where = {
        "query": ((1, self.rows, x.shape[2]), query),
        "key": ((1, self.keys, x.shape[2]), key),
        "pair": ((1, self.queries, self.keys), pair),
      }[kind]
      return pl.BlockSpec(shape, where)

    def body(end_ref, *refs):
      i, j = pl.program_id(1), pl.program_id(2)
      n = at(i, j)[1]
      kernel(n, n * self.keys < end_ref[0], j == 0, j == inner - 1, end_ref[0], *refs)

    pairs = self.B * self.steps * self.rows * self.parts * self.keys
    moved = sum(x.size * x.dtype.itemsize for x, _ in (*inputs, *outs))
    return pl.pallas_call(
      body,
      name=name,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(self.B, outer, inner),
        in_specs=[spec(*x, False) for x in inputs],
        out_specs=[spec(*x, True) for x in outs],
        scratch_shapes=scratch,
      ),
      out_shape=[x for x, _ in outs],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary")
      ),
      cost_estimate=pl.CostEstimate(
        flops=2 * pairs * products, transcendentals=0, bytes_accessed=moved
      ),
      interpret=interpret,
    )(end.reshape(1), *(x for x, _ in inputs))


def _operands(p: _Plan, q, w, k):
  dtype = jnp.result_type(q, k)
  weights = p.by_query(w.astype(jnp.float32)[..., None])
  return [
    (p.by_query(q.astype(dtype)), "query"),
    (weights, "query"),
    (p.by_key(k.astype(dtype)), "key"),
  ]


def _shape(shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def scores(q, w, k, end, interpret=False):
  """As ``index_scores``."""
  p = _Plan.of(q, k)

  def kernel(n, seen, begin, final, end, q_ref, w_ref, k_ref, out_ref):
    del begin, final

    @pl.when(seen)
    def _():
      x = jnp.maximum(dot(q_ref[0], k_ref[0], (1, 1)), 0) * w_ref[0]
      x = jnp.sum(x.reshape(p.queries, p.heads, p.keys), axis=1)
      key = n * p.keys + jax.lax.broadcasted_iota(jnp.int32, (1, p.keys), 1)
      out_ref[0] = jnp.where(key < end, x, 0)

    @pl.when(jnp.logical_not(seen))
    def _():
      out_ref[0] = jnp.zeros_like(out_ref[0])

  out = _shape((p.B, p.steps * p.queries, p.parts * p.keys))
  (x,) = p.call(
    kernel, "index_scores_forward", end, _operands(p, q, w, k), [(out, "pair")], [], q.shape[3],
    over_keys=True, interpret=interpret,
  )  # fmt: skip
  return x[:, : p.t, : p.N]


def _forward(q, w, k, end, interpret):
  return scores(q, w, k, end, interpret), (q, w, k, end)


def _backward(interpret, residuals, dout):
  q, w, k, end = residuals
  p, h, d = _Plan.of(q, k), q.shape[2], q.shape[3]
  pad = (0, p.steps * p.queries - p.t), (0, p.parts * p.keys - p.N)
  inputs = [*_operands(p, q, w, k), (jnp.pad(dout, ((0, 0), *pad)), "pair")]

  def local(n, end, q_ref, w_ref, k_ref, dout_ref):
    """Products, and the scores' gradients, a row a head."""
    x = dot(q_ref[0], k_ref[0], (1, 1))
    key = n * p.keys + jax.lax.broadcasted_iota(jnp.int32, (1, p.keys), 1)
    g = jnp.where(key < end, dout_ref[0], 0)
    g = jnp.broadcast_to(g[:, None], (p.queries, p.heads, p.keys)).reshape(x.shape)
    return x, g, jnp.where(x > 0, g * w_ref[0], 0).astype(k_ref.dtype)

  def to_queries(n, seen, begin, final, end, *refs):
    *operands, dq_ref, dw_ref, sums_ref = refs

    @pl.when(begin)
    def _():
      dq_ref[...] = jnp.zeros_like(dq_ref)
      sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(seen)
    def _():
      x, g, dx = local(n, end, *operands)
      x = jnp.maximum(x, 0) * g
      sums_ref[...] += sum(x[:, i : i + LANES] for i in range(0, p.keys, LANES))
      dq_ref[0] += dot(dx, operands[2][0], (1, 0))

    @pl.when(final)
    def _():
      dw_ref[0] = jnp.sum(sums_ref[...], axis=1, keepdims=True)

  def to_keys(n, seen, begin, final, end, *refs):
    *operands, dk_ref = refs
    del final

    @pl.when(begin)
    def _():
      dk_ref[...] = jnp.zeros_like(dk_ref)

    @pl.when(seen)
    def _():
      dk_ref[0] += dot(local(n, end, *operands)[2], operands[0][0], (0, 0))

  rows = p.steps * p.rows
  dq, dw = p.call(
    to_queries, "index_scores_dq", end, inputs,
    [(_shape((p.B, rows, d)), "query"), (_shape((p.B, rows, 1)), "query")],
    [pltpu.VMEM((p.rows, LANES), jnp.float32)], 2 * d, over_keys=True, interpret=interpret,
  )  # fmt: skip
  (dk,) = p.call(
    to_keys, "index_scores_dk", end, inputs, [(_shape((p.B, p.parts * p.keys, d)), "key")], [], 2 * d,
    over_keys=False, interpret=interpret,
  )  # fmt: skip
  dq, dw = (p.from_queries(x, h) for x in (dq, dw))
  return dq.astype(q.dtype), dw[..., 0].astype(w.dtype), dk[:, : p.N].astype(k.dtype), None


scores.defvjp(_forward, _backward)
