"""Attention to pools as Pallas kernels for TPUs: FlashAttention (arXiv:2205.14135) over a range of keys a query.

A tile is some queries of all heads of a group: the rows of one matrix. Logits are [pools, rows]: what is one number a
row (lse, say) is a row of numbers, and what is summed up by channel is [channels, rows]. Pools that no query of a tile
sees are neither read nor computed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.block_sparse.tpu_tiles import EMPTY, LANES, NOTHING, TILE, dot

# Rows and pools of a tile, at most.
_ROWS, _POOLS = 1024, 512
_VMEM = 64 * 2**20
# Bytes of VMEM that are made of a logit, by those of an operand: float32 is multiplied in parts of bfloat16.
_A_LOGIT = {2: 12, 4: 20}


def supports(q, k, v=None) -> None:
  """Raises NotImplementedError, saying why, where the kernels cannot serve the call: without v one for weights."""
  _Plan.of(q, k, v)


def _limit() -> int:
  """Bytes of VMEM that a kernel may take."""
  return min(_VMEM, dispatch.vmem() * 3 // 4)


def _taken(R: int, queries: int, pools: int, D: int, V: int, size: int) -> int:
  """Bytes of VMEM that a tile takes at most, of the weights alone where V is 0: operands come and results go twice."""
  rows, (D, V) = R * queries, (-(-d // LANES) * LANES for d in (D, V))
  operands = (rows + pools) * (D + V) * size
  if V:
    # The backward pass, by query with what is summed up, and by pool.
    by_query = 2 * rows * max(D, V) * size + rows * max(D, V) * 4
    results = max(by_query, 2 * pools * (D + V) * 4)
  else:
    results = 2 * queries * pools * 4
  return 2 * operands + results + rows * pools * _A_LOGIT[max(size, 2)]


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Static facts: groups and heads of a group, queries and pools of a tile, and how many tiles there are of both."""

  B: int
  T: int
  G: int
  R: int
  queries: int
  pools: int
  steps: int
  parts: int

  @classmethod
  def of(cls, q, k, v=None) -> "_Plan":
    """The largest tiles that VMEM holds, those of queries first; without v of the weights alone.

    Raises:
      NotImplementedError: there are none.
    """
    (B, T, H, D), (_, N, G, _) = q.shape, k.shape
    V, size = 0 if v is None else v.shape[3], jnp.result_type(q, k, k if v is None else v).itemsize
    R = H // G
    queries = max(TILE, _ROWS // R // TILE * TILE)
    queries = min(queries, -(-T // TILE) * TILE)
    pools = min(_POOLS, -(-N // LANES) * LANES)
    while _taken(R, queries, pools, D, V, size) > _limit():
      if pools > LANES:
        pools = pools // 2 // LANES * LANES
      elif queries > TILE:
        queries = max(TILE, queries // 2 // TILE * TILE)
      else:
        raise NotImplementedError(
          f"{R} heads a group of {D} and {V} channels do not fit the {_limit() >> 20} MiB of VMEM of a Pallas kernel"
        )
    return cls(B, T, G, R, queries, pools, -(-T // queries), -(-N // pools))

  @property
  def rows(self) -> int:
    return self.R * self.queries

  # --- operands ---

  def _whole(self, x: Array) -> Array:
    """[B, T, ...] with whole tiles."""
    pad = self.steps * self.queries - self.T
    return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))

  def by_query(self, x: Array) -> Array:
    """[B, T, H, D] -> [B G, R, T, D], T padded."""
    x = self._whole(x)
    x = x.reshape(self.B, x.shape[1], self.G, self.R, x.shape[3])
    return x.transpose(0, 2, 3, 1, 4).reshape(self.B * self.G, self.R, -1, x.shape[4])

  def from_queries(self, x: Array) -> Array:
    """The inverse of ``by_query``."""
    x = x.reshape(self.B, self.G, self.R, *x.shape[2:]).transpose(0, 3, 1, 2, 4)
    return x.reshape(self.B, -1, self.G * self.R, x.shape[4])[:, : self.T]

  def by_pool(self, x: Array) -> Array:
    """[B, N, G, D] -> [B G, N, D], N padded."""
    x = jnp.pad(x, ((0, 0), (0, self.parts * self.pools - x.shape[1]), (0, 0), (0, 0)))
    return jnp.moveaxis(x, 2, 1).reshape(self.B * self.G, -1, x.shape[3])

  def from_pools(self, x: Array, N: int) -> Array:
    """The inverse of ``by_pool``."""
    return jnp.moveaxis(x.reshape(self.B, self.G, *x.shape[1:]), 1, 2)[:, :N]

  def row(self, x: Array) -> Array:
    """[B, T, H] -> [B G, tiles, 1, rows]."""
    x = self._whole(x).reshape(self.B, self.steps, self.queries, self.G, self.R)
    return x.transpose(0, 3, 1, 4, 2).reshape(self.B * self.G, self.steps, 1, self.rows)

  def from_row(self, x: Array) -> Array:
    """The inverse of ``row``."""
    x = x.reshape(self.B, self.G, self.steps, self.R, self.queries).transpose(0, 2, 4, 1, 3)
    return x.reshape(self.B, -1, self.G * self.R)[:, : self.T]

  def ranges(self, first: Array, complete: Array):
    """Which pools the rows of a tile see, and which tiles of both meet.

    Returns:
      The first pool of each row and the one after its last, [B, tiles, 1, rows]; of each tile of queries the first tile
      of pools and the one after the last, [2, B tiles]; and of each tile of pools those of queries.
    """
    first, last = (self._whole(x.astype(jnp.int32)) for x in (first, first + complete))
    first, last = (x.reshape(self.B, self.steps, 1, self.queries) for x in (first, last))
    start = jnp.arange(self.parts, dtype=jnp.int32)[:, None] * self.pools
    meet = (first < last) & (first < start + self.pools) & (last > start)
    meet = jnp.any(meet, axis=-1)  # [B, tiles of queries, of pools]

    def ends(meet):
      n, some = meet.shape[2], jnp.any(meet, axis=2)
      end = jnp.where(some, n - jnp.argmax(meet[:, :, ::-1], axis=2), 0)
      return jnp.stack([jnp.where(some, jnp.argmax(meet, axis=2), 0), end]).reshape(2, -1)

    rows = [jnp.tile(x, (1, 1, 1, self.R)) for x in (first, last)]
    to_int = lambda x: x.astype(jnp.int32)  # noqa: E731
    return rows, to_int(ends(meet)), to_int(ends(meet.swapaxes(1, 2)))

  # --- a kernel ---

  def call(self, kernel, name, ends, inputs, outs, scratch, products, *, over_pools, interpret):
    """Runs a kernel over tiles of queries and, innermost, the tiles of pools that each meets; or the other way round.

    Args:
      kernel: gets the number of the tile of pools, whether the tiles meet, whether it is the outer tile's first step
        or the last, and all references.
      ends: of the outer tiles, of ``ranges``.
      inputs, outs: (array or its shape, "query", "pool", "row", "range" or "weights") each.
      products: channels of the matrix products.
    """
    outer, inner = (self.steps, self.parts) if over_pools else (self.parts, self.steps)

    def tile(ends, g, i, j):  # of the inner axis; past the end the last one stays where it is
      at = g // self.G * outer + i
      return jnp.clip(ends[0, at] + j, 0, jnp.maximum(ends[1, at] - 1, 0))

    def spec(x, kind):
      def query(ends, g, i, j):
        return i if over_pools else tile(ends, g, i, j)

      def pool(ends, g, i, j):
        return tile(ends, g, i, j) if over_pools else i

      return {
        "query": lambda: pl.BlockSpec(
          (1, self.R, self.queries, x.shape[3]), lambda g, i, j, ends: (g, 0, query(ends, g, i, j), 0)
        ),
        "pool": lambda: pl.BlockSpec(
          (1, self.pools, x.shape[2]), lambda g, i, j, ends: (g, pool(ends, g, i, j), 0)
        ),
        "row": lambda: pl.BlockSpec(
          (1, 1, 1, self.rows), lambda g, i, j, ends: (g, query(ends, g, i, j), 0, 0)
        ),
        "range": lambda: pl.BlockSpec(
          (1, 1, 1, self.rows), lambda g, i, j, ends: (g // self.G, query(ends, g, i, j), 0, 0)
        ),
        "weights": lambda: pl.BlockSpec(
          (1, self.queries, self.pools), lambda g, i, j, ends: (g, i, j)
        ),
      }[kind]()  # fmt: skip

    def body(ends_ref, *refs):
      g, i, j = (pl.program_id(axis) for axis in range(3))
      at = g // self.G * outer + i
      n = ends_ref[0, at] + j
      kernel(n if over_pools else i, n < ends_ref[1, at], j == 0, j == inner - 1, *refs)

    pairs = self.B * self.G * self.steps * self.rows * self.parts * self.pools
    moved = sum(x.size * x.dtype.itemsize for x, _ in (*inputs, *outs))
    return pl.pallas_call(
      body,
      name=name,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(self.B * self.G, outer, inner),
        in_specs=[spec(*x) for x in inputs],
        out_specs=[spec(*x) for x in outs],
        scratch_shapes=scratch,
      ),
      out_shape=[x for x, _ in outs],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=None if interpret else _limit(),
      ),
      cost_estimate=pl.CostEstimate(
        flops=2 * pairs * products, transcendentals=pairs, bytes_accessed=moved
      ),
      interpret=interpret,
    )(ends, *(x for x, _ in inputs))


def _rows_of(ref) -> Array:
  """[1, R, queries, D] -> [rows, D]."""
  return ref[0].reshape(-1, ref.shape[3])


def _seen(p: _Plan, n, first_ref, last_ref) -> Array:
  """[pools, rows]: whether a row sees a pool of tile n."""
  number = n * p.pools + jax.lax.broadcasted_iota(jnp.int32, (p.pools, 1), 0)
  return (number >= first_ref[0, 0]) & (number < last_ref[0, 0])


def _shape(shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


# --- the softmax's weights alone ---


def weights(q, k, first, complete, scale, lse, interpret=False):
  """As ``pool_weights``."""
  if lse is None:
    _, lse = attend(q, k, k[..., :1], first, complete, scale, interpret)
  p, N = _Plan.of(q, k), k.shape[1]
  dtype = jnp.result_type(q, k)
  (first, last), _, _ = p.ranges(first, complete)
  # All tiles are written, those with nothing too.
  every = jnp.stack([jnp.zeros(p.B * p.steps, jnp.int32), jnp.full(p.B * p.steps, p.parts)])
  lse = jnp.where(lse == -jnp.inf, 0, lse).astype(jnp.float32)

  def kernel(n, meet, begin, end, q_ref, k_ref, lse_ref, first_ref, last_ref, out_ref):
    del meet, begin, end
    seen = _seen(p, n, first_ref, last_ref)
    some = jnp.any(seen)

    @pl.when(some)
    def _():
      x = scale * dot(k_ref[0], _rows_of(q_ref), (1, 1)) - lse_ref[0, 0]
      x = jnp.exp(jnp.where(seen, x, NOTHING))
      out_ref[0] = sum(x[:, r * p.queries : (r + 1) * p.queries] for r in range(p.R)).T

    @pl.when(jnp.logical_not(some))
    def _():
      out_ref[0] = jnp.zeros_like(out_ref[0])

  queries, keys = p.by_query(q.astype(dtype)), p.by_pool(k.astype(dtype))
  out = _shape((p.B * p.G, p.steps * p.queries, p.parts * p.pools))
  inputs = [(queries, "query"), (keys, "pool"), (p.row(lse), "row"), (first, "range"), (last, "range")]  # fmt: skip
  (x,) = p.call(
    kernel, "pool_weights", every.astype(jnp.int32), inputs, [(out, "weights")], [], q.shape[3],
    over_pools=True, interpret=interpret,
  )  # fmt: skip
  return x.reshape(p.B, p.G, *x.shape[1:])[:, :, : p.T, :N]


# --- attention ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(q, k, v, first, complete, scale, interpret=False):
  """As ``pool_attention``."""
  p, V = _Plan.of(q, k, v), v.shape[3]
  dtype = jnp.result_type(q, k, v)
  (first, last), ends, _ = p.ranges(first, complete)

  def kernel(n, meet, begin, end, q_ref, k_ref, v_ref, first_ref, last_ref, o_ref, lse_ref, *own):
    top_ref, total_ref, sums_ref = own

    @pl.when(begin)
    def _():
      top_ref[...] = jnp.full_like(top_ref, EMPTY)
      total_ref[...] = jnp.zeros_like(total_ref)
      sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(meet)
    def _():
      x = scale * dot(k_ref[0], _rows_of(q_ref), (1, 1))
      x = jnp.where(_seen(p, n, first_ref, last_ref), x, NOTHING)
      old = top_ref[...]
      top = jnp.maximum(old, jnp.max(x, axis=0, keepdims=True))
      left, x = jnp.exp(old - top), jnp.exp(x - top)
      top_ref[...] = top
      total_ref[...] = total_ref[...] * left + jnp.sum(x, axis=0, keepdims=True)
      v = v_ref[0]
      sums_ref[...] = sums_ref[...] * left + dot(v, x.astype(v.dtype), (0, 0))

    @pl.when(end)
    def _():
      total = total_ref[...]
      some = total > 0
      total = jnp.where(some, total, 1)
      lse_ref[0, 0] = jnp.where(some, top_ref[...] + jnp.log(total), NOTHING)
      o = (sums_ref[...] / total).T
      o_ref[0] = o.reshape(o_ref.shape[1:]).astype(o_ref.dtype)

  queries = p.by_query(q.astype(dtype))
  keys, values = (p.by_pool(x.astype(dtype)) for x in (k, v))
  outs = [
    (_shape((*queries.shape[:3], V), q.dtype), "query"),
    (_shape((p.B * p.G, p.steps, 1, p.rows)), "row"),
  ]
  one = pltpu.VMEM((1, p.rows), jnp.float32)
  scratch = [one, one, pltpu.VMEM((V, p.rows), jnp.float32)]
  inputs = [(queries, "query"), (keys, "pool"), (values, "pool"), (first, "range"), (last, "range")]
  o, lse = p.call(
    kernel, "pool_attention_forward", ends, inputs, outs, scratch, q.shape[3] + V, over_pools=True,
    interpret=interpret,
  )  # fmt: skip
  lse = p.from_row(lse)
  return p.from_queries(o), jnp.where(lse > NOTHING / 2, lse, -jnp.inf)


def _attend_forward(q, k, v, first, complete, scale, interpret):
  o, lse = attend(q, k, v, first, complete, scale, interpret)
  return (o, lse), (q, k, v, first, complete, o, lse)


def _attend_backward(scale, interpret, residuals, cotangents):
  q, k, v, first, complete, o, lse = residuals
  do, dlse = cotangents
  p, N = _Plan.of(q, k, v), k.shape[1]
  (D, V), dtype = (q.shape[3], v.shape[3]), jnp.result_type(q, k, v)
  (first, last), of_queries, of_pools = p.ranges(first, complete)
  # The softmax's derivative: dlogits = p (do . v - delta).
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
  lse = jnp.where(lse == -jnp.inf, 0, lse)
  queries, douts = (p.by_query(x.astype(dtype)) for x in (q, do))
  keys, values = (p.by_pool(x.astype(dtype)) for x in (k, v))
  inputs = [
    (queries, "query"), (douts, "query"), (keys, "pool"), (values, "pool"), (p.row(lse), "row"),
    (p.row(delta), "row"), (first, "range"), (last, "range"),
  ]  # fmt: skip

  def local(n, q_ref, do_ref, k_ref, v_ref, lse_ref, delta_ref, first_ref, last_ref):
    q, do, k, v = _rows_of(q_ref), _rows_of(do_ref), k_ref[0], v_ref[0]
    x = scale * dot(k, q, (1, 1)) - lse_ref[0, 0]
    x = jnp.exp(jnp.where(_seen(p, n, first_ref, last_ref), x, NOTHING))
    dx = x * (dot(v, do, (1, 1)) - delta_ref[0, 0])
    return q, do, k, x.astype(do.dtype), dx.astype(k.dtype)

  def to_queries(n, meet, begin, end, *refs):
    *operands, dq_ref, sums_ref = refs

    @pl.when(begin)
    def _():
      sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(meet)
    def _():
      _, _, k, _, dx = local(n, *operands)
      sums_ref[...] += dot(k, dx, (0, 0))

    @pl.when(end)
    def _():
      dq_ref[0] = (scale * sums_ref[...]).T.reshape(dq_ref.shape[1:]).astype(dq_ref.dtype)

  def to_pools(n, meet, begin, end, *refs):
    *operands, dk_ref, dv_ref = refs
    del end

    @pl.when(begin)
    def _():
      dk_ref[...] = jnp.zeros_like(dk_ref)
      dv_ref[...] = jnp.zeros_like(dv_ref)

    @pl.when(meet)
    def _():
      q, do, _, x, dx = local(n, *operands)
      dk_ref[0] += scale * dot(dx, q, (1, 0))
      dv_ref[0] += dot(x, do, (1, 0))

  (dq,) = p.call(
    to_queries, "pool_attention_dq", of_queries, inputs, [(_shape(queries.shape, q.dtype), "query")],
    [pltpu.VMEM((D, p.rows), jnp.float32)], 2 * D + V, over_pools=True, interpret=interpret,
  )  # fmt: skip
  dk, dv = p.call(
    to_pools, "pool_attention_dkv", of_pools, inputs,
    [(_shape(keys.shape), "pool"), (_shape(values.shape), "pool")], [], 2 * (D + V), over_pools=False,
    interpret=interpret,
  )  # fmt: skip
  dk, dv = (p.from_pools(x, N) for x in (dk, dv))
  return p.from_queries(dq), dk.astype(k.dtype), dv.astype(v.dtype), None, None


attend.defvjp(_attend_forward, _attend_backward)
