"""The scan of ``gpu_scan.py`` where a chunk's operands exceed shared memory: an erase of long float32 keys.

Operands of K columns come 64 of them at a time, and the state waits in shared memory. A step owns 64 of its rows and
does for them what the last chunk still has to write, then what this chunk reads; with the last rows of a chunk all is
read, and its triangular system is solved. So a chunk is walked over once, and one more step than there are chunks
writes what the last one leaves.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.linear_recurrence.gpu_scan import (
  CHUNK,
  ROWS,
  SMEM,
  Plan,
  call_backward,
  call_forward,
  indices_of_program,
  load_state,
  of_values,
  products,
  put,
  right_side,
  rows_of,
  scratch_of,
  solve,
  square,
  store_state,
  tiles,
  transposed,
  wide,
)

# By direction and erase: operands of this chunk, and of the one before it.
_FORWARD = {
  "key": (("q", "erased", "inverse", "scores", "v"), ("writes",)),
  "low_rank": (
    ("q", "erased", "inverse", "scores", "removed", "corrected", "v"),
    ("writes", "corrections", "v"),
  ),
}
_BACKWARD = {
  "key": (("writes", "inverse", "scores", "do"), ("q", "erased", "do")),
  "low_rank": (("corrections", "inverse", "corrected", "do"), ("q", "erased", "do")),
}


def _shape(p: Plan, name: str) -> tuple[int, int]:
  """Of one operand in one step."""
  if name in wide(p.erase):
    return CHUNK, ROWS
  return CHUNK, CHUNK if name in square(p.erase) else p.columns


def _stages(p: Plan, names: tuple[str, ...], o_bytes: int) -> int:
  """How many steps' operands fit into shared memory: at most 3."""
  values = sum(rows * columns for rows, columns in (_shape(p, name) for name in names))
  each = 2 * p.parts * values + 4 * (ROWS + CHUNK)
  rows = CHUNK * p.columns
  own = 4 * p.K * p.columns + 2 * p.parts * (ROWS * p.columns + 2 * rows) + o_bytes * rows
  return min((SMEM - own) // each, 3)


def _named(names: tuple[tuple[str, ...], tuple[str, ...]], arrays: dict) -> dict:
  return {name: arrays[name] for of_chunk in names for name in of_chunk}


def _walk(p: Plan, body, table, arrays, rows, scratch, start, finish, reverse, o_bytes):
  """Runs ``body(n, i, now, before, rows, scratch, read)`` for chunk n and rows i of the state; then ``finish()``.

  ``now`` and ``before`` have the operands of this chunk and of the last one by name, each a list of parts; ``rows``
  what is kept of these rows by the last chunk, and beta of this one; ``read`` is the tuple of sums over rows that the
  body returns.
  """
  batch, head, block = indices_of_program()
  current, previous = table[p.erase]
  here = batch * p.Hv + head

  def chunk(n, back):
    n = jnp.clip(n - back, 0, p.chunks - 1)
    return p.chunks - 1 - n if reverse else n

  def spec(name, back):
    if name in ("v", "do"):
      first, column = batch * p.chunks, lambda i: head * (p.V // p.columns) + block
    else:
      first, column = here * p.chunks, (lambda i: i) if name in wide(p.erase) else lambda i: 0
    where = lambda n, i: (first + chunk(n, back), 0, column(i))  # noqa: E731
    return plgpu.BlockSpec((1, *_shape(p, name)), where, transforms=tiles(2 * p.columns))

  named = [(name, 0) for name in current] + [(name, 1) for name in previous]
  specs = [spec(name, back) for name, back in named for _ in arrays[name]]
  refs = [x for name, _ in named for x in arrays[name]]
  where = {"keep": lambda n, i: (chunk(n, 1), i), "beta": lambda n, i: (chunk(n, 0), 0)}
  sizes = {"keep": ROWS, "beta": CHUNK}
  for name, x in rows.items():
    specs.append(plgpu.BlockSpec((1, sizes[name]), where[name]))
    refs.append(x.at[here])

  def step(index, *args):
    *values, read = args
    n, i = index
    # 0, but the compiler must not know: see gpu_scan.
    zero = lax.shift_right_logical(n, jnp.int32(24))
    values = [ref.at[zero] for ref in values]
    operands = [{name: [values.pop(0) for _ in arrays[name]] for name in current}]
    operands.append({name: [values.pop(0) for _ in arrays[name]] for name in previous})
    of_chunk = dict(zip(rows, values, strict=True))
    own = jax.tree.map(lambda ref: ref.at[zero], scratch)
    return body(n, i, *operands, of_chunk, own, read)

  def run(walk):
    walk(start())
    finish()

  pipeline = plgpu.emit_pipeline_warp_specialized(
    step,
    grid=(p.chunks + 1, p.K // ROWS),
    in_specs=specs,
    max_concurrent_steps=_stages(p, (*current, *previous), o_bytes),
    wg_axis="warpgroup",
    num_compute_wgs=1,
    memory_registers=40,
    compute_context=run,
  )
  pipeline(*refs)


def _zeros(p: Plan) -> Array:
  return plgpu.layout_cast(jnp.zeros((CHUNK, p.columns), jnp.float32), plgpu.Layout.WGMMA)


def _only(condition, x: Array) -> Array:
  """x where a scalar condition holds, else 0."""
  return jnp.where(lax.broadcast_in_dim(condition, x.shape, []), x, 0.0)


def _begin(p: Plan, scratch, initial, nothing, count: int) -> tuple[Array, ...]:
  """The state is the initial one, and nothing (its name) is left to write; ``count`` sums of nothing."""
  store_state(p, scratch["sum"].at[0], load_state(p, initial))
  put([ref.at[0] for ref in scratch[nothing]], _zeros(p))
  plgpu.commit_smem()
  return (_zeros(p),) * count


def _end(p: Plan, scratch, final) -> None:
  store_state(p, final, load_state(p, scratch["sum"].at[0]))
  plgpu.wait_smem_to_gmem(0)


def _next_rows(p: Plan, n, i, keep, own, kept_at, pairs) -> None:
  """Rows i of the state before chunk n: ``keep`` of those before the last chunk, and what that writes.

  In ``own["sum"]``, and in parts in ``own["state"]`` and where they are kept for the other pass.
  """
  rows = own["sum"].at[pl.ds(i * ROWS, ROWS)]
  x = plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)
  shape = (ROWS, p.columns)
  if keep is not None:
    kept = x * lax.broadcast_in_dim(keep[...], shape, [0])
    x = jnp.where(lax.broadcast_in_dim(n > 0, shape, []), kept, x)
  x = x + _only(n > 0, products(shape, *[(transposed(a), b) for a, b in pairs]))
  rows[...] = x
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of what the last step stored
  put(own["state"], x)
  plgpu.commit_smem()

  @pl.when(n < p.chunks)
  def _():
    for ref, to in zip(own["state"], kept_at, strict=False):
      plgpu.copy_smem_to_gmem(ref, to)


def _scratch(p: Plan, o_dtype=None) -> dict:
  state = plgpu.SMEM((1, p.K, p.columns), jnp.float32)
  return scratch_of(p, ROWS, o_dtype) | {"sum": state}


def forward(
  p: Plan,
  operands: dict[str, list[Array]],
  keep: Float[Array, "heads N K"] | None,
  beta: Float[Array, "heads N C"] | None,
  v: list[Float[Array, "BN C HvV"]],
  initial: Float[Array, "heads K V"],
  o_dtype,
  *,
  boundaries: bool,
  interpret,
) -> tuple[Array, Array, list[Array]]:
  """As ``gpu_scan.forward``."""
  arrays = _named(_FORWARD[p.erase], operands | {"v": v})
  rows = (CHUNK, p.columns)

  def kernel(arrays, of_chunks, initial, o, final, kept, scratch):
    batch, head, block = indices_of_program()
    here, columns = batch * p.Hv + head, pl.ds(block * p.columns, p.columns)
    column = pl.ds(head * p.V + block * p.columns, p.columns)

    def body(n, i, now, before, of_chunk, own, read):
      pairs = of_values(p, before, own["update"], "writes", "corrections")
      at = here * p.chunks + jnp.minimum(n, p.chunks - 1)
      kept_at = [ref.at[at, pl.ds(i * ROWS, ROWS), columns] for ref in kept]
      _next_rows(p, n, i, of_chunk.get("keep"), own, kept_at, pairs)
      o_sum, R = (_only(i > 0, x) for x in read)
      R = R + products(rows, (now["erased"], own["state"]))
      o_sum = o_sum + products(rows, (now["q"], own["state"]))

      @pl.when((i == p.K // ROWS - 1) & (n < p.chunks))
      def _():
        right = right_side(p, now, of_chunk.get("beta"), R)
        solve(p, now["inverse"], own["residual"], own["update"], right)
        pairs = of_values(p, now, own["update"], "scores", "corrected")
        out = o_sum + products(rows, *pairs)
        own["out"][...] = out.astype(o_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own["out"], o.at[batch * p.chunks + n, :, column])

      plgpu.commit_smem()  # all warps are done with this step's operands
      return o_sum, R

    start = functools.partial(_begin, p, scratch, initial.at[here, :, columns], "update", 2)
    finish = functools.partial(_end, p, scratch, final.at[here, :, columns])
    o_bytes = jnp.dtype(o_dtype).itemsize
    _walk(p, body, _FORWARD, arrays, of_chunks, scratch, start, finish, False, o_bytes)

  scratch = _scratch(p, o_dtype)
  name, of_chunks = "linear_recurrence_forward_stream", rows_of(keep=keep, beta=beta)
  return call_forward(
    p, kernel, name, arrays, of_chunks, initial, o_dtype, boundaries, scratch, interpret
  )


def backward(
  p: Plan,
  operands: dict[str, list[Array]],
  keep: Float[Array, "heads N K"] | None,
  do: list[Float[Array, "BN C HvV"]],
  dfinal: Float[Array, "heads K V"],
  *,
  interpret,
) -> tuple[list[Array], Array, list[Array]]:
  """As ``gpu_scan.backward``."""
  arrays = _named(_BACKWARD[p.erase], operands | {"do": do})
  rows = (CHUNK, p.columns)
  reads, writes = ("scores", "writes") if p.erase == "key" else ("corrected", "corrections")

  def kernel(arrays, of_chunks, dfinal, dinitial, kept, solved, scratch):
    batch, head, block = indices_of_program()
    here, columns = batch * p.Hv + head, pl.ds(block * p.columns, p.columns)
    column = pl.ds(head * p.V + block * p.columns, p.columns)

    def body(n, i, now, before, of_chunk, own, read):
      at = p.chunks - 1 - jnp.minimum(n, p.chunks - 1)
      kept_at = [ref.at[here * p.chunks + at, pl.ds(i * ROWS, ROWS), columns] for ref in kept]
      pairs = [(before["q"], before["do"]), (before["erased"], own["residual"])]
      _next_rows(p, n, i, of_chunk.get("keep"), own, kept_at, pairs)
      dy = _only(i > 0, read[0]) + products(rows, (now[writes], own["state"]))

      @pl.when((i == p.K // ROWS - 1) & (n < p.chunks))
      def _():
        right = dy + products(rows, (transposed(now[reads]), now["do"]))
        solve(p, transposed(now["inverse"]), own["update"], own["residual"], right)
        for ref, to in zip(own["residual"], solved, strict=True):
          plgpu.copy_smem_to_gmem(ref, to.at[batch * p.chunks + at, :, column])

      plgpu.commit_smem()  # all warps are done with this step's operands
      return (dy,)

    start = functools.partial(_begin, p, scratch, dfinal.at[here, :, columns], "residual", 1)
    finish = functools.partial(_end, p, scratch, dinitial.at[here, :, columns])
    _walk(p, body, _BACKWARD, arrays, of_chunks, scratch, start, finish, True, 0)

  scratch = _scratch(p)
  name, of_chunks = "linear_recurrence_backward_stream", rows_of(keep=keep)
  return call_backward(p, kernel, name, arrays, of_chunks, dfinal, scratch, interpret)
