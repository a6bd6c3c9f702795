"""The parts of the recurrence on a GPU that walk chunks one after the other: Pallas Mosaic GPU kernels for Hopper.

What a chunk computes without the state (``gpu_chunk.py``) comes in as operands of products, decays and masks applied.
A program owns a block of value channels of one head of one sequence, and with it all rows of these columns of the
state, in float32 registers of one warpgroup. Forward, for each chunk:

    R = beta v + erased S    U = inverse R    o = q S + scores U    S <- keep S + writes^T U

without an erase ``U = v``, and with one of low rank

    R = removed v + erased S    U = inverse R    o = q S + scores v + corrected U
    S <- keep S + writes^T v + corrections^T U

Backward, the transposed of this gives the gradient of the state at every boundary; all other gradients are local to a
chunk once these are known.

Operands of tensor cores are bfloat16. A float32 operand is two of them, a high and a low part, and a product three.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

CHUNK = 64
# Of 227 KiB a block may have; barriers and alignment take the rest.
SMEM = 226 * 1024
# Rows of the state that are updated at once.
ROWS = 64


@dataclasses.dataclass(frozen=True)
class Plan:
  """Static facts of a call.

  Attributes:
    chunks: of CHUNK tokens each.
    parts: bfloat16 arrays that make up an operand: 1, or 2 for float32.
    erase: "none", "key" or "low_rank".
    columns: value channels a program; the state takes K * columns / 128 registers of a thread.
  """

  B: int
  Hv: int
  K: int
  V: int
  chunks: int
  parts: int
  erase: str
  columns: int

  @property
  def heads(self) -> int:
    return self.B * self.Hv


def parts(x: Array, count: int) -> list[Array]:
  """``x`` as a sum of bfloat16 arrays, eight bits more with each."""
  out = []
  for _ in range(count - 1):
    # Rounded as a number of 16 bits: conversions of single numbers are slow, those of two at once give no float32.
    bits = (lax.bitcast_convert_type(x, jnp.int32) + 0x8000) & ~0xFFFF
    high = lax.bitcast_convert_type(bits, jnp.float32)
    out.append(high.astype(jnp.bfloat16))
    x = x - high
  return [*out, x.astype(jnp.bfloat16)]


def parts_in_xla(x: Array, count: int) -> list[Array]:
  """The same outside of kernels. XLA takes what is rounded and then made float32 again for what it was."""
  out = []
  for _ in range(count):
    out.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16))
    x = x - out[-1].astype(x.dtype)
  return out


def tiles(swizzle: int, dtype=jnp.bfloat16):
  """Transforms of a shared array: wgmma wants those of both operands to be the same."""
  tile = swizzle // jnp.dtype(dtype).itemsize
  return plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(swizzle)


def _smem(p: Plan, rows: int, dtype=jnp.bfloat16):
  return plgpu.SMEM((1, rows, p.columns), dtype, transforms=tiles(2 * p.columns, dtype))


def put(refs, x: Array) -> None:
  for ref, part in zip(refs, parts(x, len(refs)), strict=True):
    ref[...] = part


def multiply(acc, pairs) -> None:
  """Adds ``a b`` of each pair of operands, which are lists of parts, to an accumulator of tensor cores."""
  for a, b in pairs:
    for i, x in enumerate(a):
      for y in b[: len(b) - i]:
        plgpu.wgmma(acc, x, y)


def products(shape, *pairs) -> Array:
  """The sum of ``a b`` over pairs of operands, in float32."""

  def run(acc):
    multiply(acc, pairs)
    return acc[...]

  return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def transposed(refs):
  return [ref.T for ref in refs]


def joined(refs) -> Array:
  return functools.reduce(jnp.add, [ref[...].astype(jnp.float32) for ref in refs])


def wide(erase: str) -> tuple[str, ...]:
  """Names of a chunk's operands of K columns."""
  return ("q", "writes") + {"none": (), "key": ("erased",)}.get(erase, ("erased", "corrections"))


def square(erase: str) -> tuple[str, ...]:
  """Names of a chunk's operands of CHUNK columns: what tokens are to tokens."""
  key = ("scores", "inverse")
  return {"none": ("scores",), "key": key}.get(erase, (*key, "removed", "corrected"))


def _walk(p: Plan, body, names, arrays, rows, scratch, indices, start, finish, reverse, buffers):
  """Runs ``finish(body(n, operands, rows, scratch, S))`` over chunks, from ``start()``, in a program's first warpgroup.

  The second one brings the operands of later chunks into shared memory meanwhile. ``arrays`` by name, each a list of
  parts: operands of a chunk [heads * chunks, CHUNK, columns], and what is laid out like v, [B * chunks, CHUNK, Hv * V].
  ``rows`` by name: float32 numbers of a chunk, [heads, chunks, n].
  """
  batch, head, block = indices
  specs, refs = [], []

  def at(n):
    return p.chunks - 1 - n if reverse else n

  for name in names:
    for x in arrays[name]:
      if name in ("v", "do"):
        columns, column = p.columns, head * (p.V // p.columns) + block
        first = batch * p.chunks
      else:
        columns, column = x.shape[-1], 0
        first = (batch * p.Hv + head) * p.chunks
      refs.append(x)
      specs.append(
        plgpu.BlockSpec(
          (1, CHUNK, columns),
          lambda n, first=first, column=column: (first + at(n), 0, column),
          transforms=tiles(2 * p.columns),
        )
      )
  for x in rows.values():
    specs.append(plgpu.BlockSpec((1, x.shape[-1]), lambda n: (at(n), 0)))
    refs.append(x.at[batch * p.Hv + head])

  def step(index, *args):
    *values, S = args
    # 0, but the compiler must not know: addresses that are the same in all steps would be kept in registers, more than
    # there are.
    zero = lax.shift_right_logical(index[0], jnp.int32(24))
    values = [ref.at[zero] for ref in values]
    operands = {name: [values.pop(0) for _ in arrays[name]] for name in names}
    of_chunk = dict(zip(rows, values, strict=True))
    own = jax.tree.map(lambda ref: ref.at[zero], scratch)
    return body(at(index[0]), operands, of_chunk, own, S)

  pipeline = plgpu.emit_pipeline_warp_specialized(
    step,
    grid=(p.chunks,),
    in_specs=specs,
    max_concurrent_steps=buffers,
    wg_axis="warpgroup",
    num_compute_wgs=1,
    memory_registers=40,
    compute_context=lambda run: finish(run(start())),
  )
  pipeline(*refs)


def _stages(p: Plan, names, own: int) -> int:
  """How many chunks' operands fit into shared memory beside ``own`` bytes: at most 3, 0 where none."""
  columns = {name: p.K for name in wide(p.erase)} | {name: CHUNK for name in square(p.erase)}
  each = sum(columns.get(name, p.columns) for name in names) * CHUNK * 2 * p.parts
  each += 4 * (p.K + CHUNK)  # what is kept of the state, and beta
  return min((SMEM - own) // each, 3)


def _blocks(p: Plan, ref):
  return [ref.at[pl.ds(i, ROWS)] for i in range(0, p.K, ROWS)]


def _put_state(p: Plan, refs, S: list[Array]) -> None:
  for block, x in zip(zip(*[_blocks(p, ref) for ref in refs], strict=True), S, strict=True):
    put(block, x)


def _next_state(p: Plan, S: list[Array], keep, *pairs) -> list[Array]:
  """``keep S`` and the sum of ``a^T b`` over pairs of operands; a block of rows at a time, to save registers."""

  def block(i, x):
    rows = pl.ds(i * ROWS, ROWS)
    if keep is not None:
      x = x * lax.broadcast_in_dim(keep[rows], x.shape, [0])
    return x + products(x.shape, *[([y.at[:, rows].T for y in a], b) for a, b in pairs])

  return [block(i, x) for i, x in enumerate(S)]


def load_state(p: Plan, ref) -> list[Array]:
  return [
    plgpu.load(block, layout=plgpu.Layout.WGMMA, optimized=False) for block in _blocks(p, ref)
  ]


def store_state(p: Plan, ref, S: list[Array]) -> None:
  for block, x in zip(_blocks(p, ref), S, strict=True):
    block[...] = x


def _own_bytes(p: Plan, o_bytes: int) -> int:
  state, rows = p.K * p.columns, CHUNK * p.columns
  return 2 * p.parts * (state + (2 * rows if p.erase != "none" else 0)) + o_bytes * rows


def right_side(p: Plan, x: dict, beta, read: Array) -> Array:
  """Of a triangular system, whose erase has read ``read`` of the state."""
  if p.erase == "low_rank":
    return read + products(read.shape, (x["removed"], x["v"]))
  beta = plgpu.load(beta, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
  return read + lax.broadcast_in_dim(beta, read.shape, [0]) * joined(x["v"])


def solve(p: Plan, inverse, right, solution, x: Array) -> None:
  """A triangular system's solution for the right side x; both in shared memory, by parts."""
  put(right, x)
  plgpu.commit_smem()
  put(solution, products((CHUNK, p.columns), (inverse, right)))
  plgpu.commit_smem()


def of_values(p: Plan, x: dict, update, plain: str, corrected: str) -> list:
  """Pairs of operands: a chunk's values with what is named ``plain``, what its erase writes with ``corrected``."""
  if p.erase == "key":
    return [(x[plain], update)]
  return [(x[plain], x["v"])] + ([(x[corrected], update)] if p.erase == "low_rank" else [])


def _forward_names(p: Plan):
  return (*wide(p.erase), *square(p.erase), "v")


def _backward_names(p: Plan):
  return tuple(n for n in (*wide(p.erase), *square(p.erase)) if _in_backward(p, n)) + ("do",)


def _in_backward(p: Plan, name: str) -> bool:
  """What the state's gradient passes through: not what is written whatever the state is."""
  given = {"none": ("writes", "scores"), "key": (), "low_rank": ("writes", "scores", "removed")}
  return name not in given[p.erase]


def fits(p: Plan, o_bytes: int) -> bool:
  """Whether a chunk's operands fit into shared memory."""
  return _stages(p, _forward_names(p), _own_bytes(p, o_bytes)) > 0


def _call(p: Plan, kernel, name, inputs, outputs, scratch, interpret):
  return plgpu.kernel(
    kernel,
    out_type=outputs,
    grid=(p.B, p.Hv, p.V // p.columns),
    grid_names=("batch", "head", "block"),
    num_threads=2,
    thread_name="warpgroup",
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(approx_math=False),
    kernel_name=name,
    interpret=interpret,
  )(*inputs)


def scratch_of(p: Plan, state_rows: int, o_dtype=None) -> dict:
  """Operands that a program makes itself: so many rows of the state, a system's sides, and forward outputs."""
  scratch = {"state": [_smem(p, state_rows) for _ in range(p.parts)]}
  if p.erase != "none":
    for name in ("residual", "update"):
      scratch[name] = [_smem(p, CHUNK) for _ in range(p.parts)]
  if o_dtype is not None:
    scratch["out"] = _smem(p, CHUNK, o_dtype)
  return scratch


def indices_of_program():
  return tuple(lax.axis_index(name) for name in ("batch", "head", "block"))


def call_forward(
  p: Plan, kernel, name, arrays, rows, initial, o_dtype, boundaries: bool, scratch, interpret
):
  """Calls ``kernel(arrays, rows, initial, o, final, kept, scratch)``; what ``forward`` returns."""
  inputs, tree = jax.tree.flatten((arrays, rows, initial))
  like_state = jax.ShapeDtypeStruct((p.heads * p.chunks, p.K, p.V), jnp.bfloat16)
  outputs = [
    jax.ShapeDtypeStruct(arrays["v"][0].shape, o_dtype),
    jax.ShapeDtypeStruct((p.heads, p.K, p.V), jnp.float32),
    *[like_state] * (p.parts if boundaries else 0),
  ]

  def entry(*refs, **scratch):
    o, final, *kept = refs[len(inputs) :]
    kernel(*jax.tree.unflatten(tree, refs[: len(inputs)]), o, final, kept, scratch)

  o, final, *kept = _call(p, entry, name, inputs, outputs, scratch, interpret)
  return o, final, kept


def call_backward(p: Plan, kernel, name, arrays, rows, dfinal, scratch, interpret):
  """Calls ``kernel(arrays, rows, dfinal, dinitial, kept, solved, scratch)``; what ``backward`` returns."""
  inputs, tree = jax.tree.flatten((arrays, rows, dfinal))
  like_state = jax.ShapeDtypeStruct((p.heads * p.chunks, p.K, p.V), jnp.bfloat16)
  outputs = [jax.ShapeDtypeStruct((p.heads, p.K, p.V), jnp.float32), *[like_state] * p.parts]
  if p.erase != "none":
    outputs += [jax.ShapeDtypeStruct(arrays["do"][0].shape, jnp.bfloat16)] * p.parts

  def entry(*refs, **scratch):
    dinitial, *rest = refs[len(inputs) :]
    args = jax.tree.unflatten(tree, refs[: len(inputs)])
    kernel(*args, dinitial, rest[: p.parts], rest[p.parts :], scratch)

  dinitial, *rest = _call(p, entry, name, inputs, outputs, scratch, interpret)
  return rest[: p.parts], dinitial, rest[p.parts :]


def rows_of(**rows) -> dict:
  """Those that there are."""
  return {name: x for name, x in rows.items() if x is not None}


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
  """Outputs like v, the final state, and if asked for the state before each chunk [heads * N, K, V] in parts."""
  names = _forward_names(p)
  arrays = {name: (operands | {"v": v})[name] for name in names}
  rows = (CHUNK, p.columns)

  def kernel(arrays, of_chunks, initial, o, final, kept, scratch):
    batch, head, block = indices = indices_of_program()
    here, columns = batch * p.Hv + head, pl.ds(block * p.columns, p.columns)

    def body(n, x, of_chunk, own, S):
      state, residual, update, out = (
        own["state"],
        own.get("residual"),
        own.get("update"),
        own["out"],
      )
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of what the last chunk stored
      _put_state(p, state, S)
      plgpu.commit_smem()
      for ref, to in zip(state, kept, strict=False):
        plgpu.copy_smem_to_gmem(ref, to.at[here * p.chunks + n, :, columns])
      if p.erase != "none":
        read = products(rows, (x["erased"], state))
        R = right_side(p, x, of_chunk.get("beta"), read)
        solve(p, x["inverse"], residual, update, R)
      written = of_values(p, x, update, "writes", "corrections")
      S = _next_state(p, S, of_chunk.get("keep"), *written)
      pairs = [(x["q"], state), *of_values(p, x, update, "scores", "corrected")]
      out[...] = products(rows, *pairs).astype(o_dtype)
      plgpu.commit_smem()
      column = pl.ds(head * p.V + block * p.columns, p.columns)
      plgpu.copy_smem_to_gmem(out, o.at[batch * p.chunks + n, :, column])
      return S

    def start():
      return load_state(p, initial.at[here, :, columns])

    def finish(S):
      store_state(p, final.at[here, :, columns], S)
      plgpu.wait_smem_to_gmem(0)

    own = _own_bytes(p, jnp.dtype(o_dtype).itemsize)
    stages = _stages(p, names, own)
    _walk(p, body, names, arrays, of_chunks, scratch, indices, start, finish, False, stages)

  scratch = scratch_of(p, p.K, o_dtype)
  name, of_chunks = "linear_recurrence_forward_scan", rows_of(keep=keep, beta=beta)
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
  """The gradient of the state after each chunk [heads * N, K, V] in parts, and of the initial state.

  And that of a triangular system's right side, beta for a key erase being part of it, like v in parts.
  """
  names = _backward_names(p)
  arrays = {name: (operands | {"do": do})[name] for name in names}
  rows = (CHUNK, p.columns)

  def kernel(arrays, of_chunks, dfinal, dinitial, kept, solved, scratch):
    batch, head, block = indices = indices_of_program()
    here, columns = batch * p.Hv + head, pl.ds(block * p.columns, p.columns)

    def body(n, x, of_chunk, own, dS):
      state, residual, update = own["state"], own.get("residual"), own.get("update")
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      _put_state(p, state, dS)
      plgpu.commit_smem()
      for ref, to in zip(state, kept, strict=True):
        plgpu.copy_smem_to_gmem(ref, to.at[here * p.chunks + n, :, columns])
      pairs = [(x["q"], x["do"])]
      if p.erase != "none":
        reads, writes = ("scores", "writes") if p.erase == "key" else ("corrected", "corrections")
        dy = products(rows, (transposed(x[reads]), x["do"]), (x[writes], state))
        solve(p, transposed(x["inverse"]), update, residual, dy)
        pairs.append((x["erased"], residual))
        for ref, to in zip(residual, solved, strict=True):
          column = pl.ds(head * p.V + block * p.columns, p.columns)
          plgpu.copy_smem_to_gmem(ref, to.at[batch * p.chunks + n, :, column])
      dS = _next_state(p, dS, of_chunk.get("keep"), *pairs)
      plgpu.commit_smem()  # all warps are done with this chunk's operands
      return dS

    def start():
      return load_state(p, dfinal.at[here, :, columns])

    def finish(dS):
      store_state(p, dinitial.at[here, :, columns], dS)
      plgpu.wait_smem_to_gmem(0)

    stages = _stages(p, names, _own_bytes(p, 0))
    _walk(p, body, names, arrays, of_chunks, scratch, indices, start, finish, True, stages)

  scratch = scratch_of(p, p.K)
  name, of_chunks = "linear_recurrence_backward_scan", rows_of(keep=keep)
  return call_backward(p, kernel, name, arrays, of_chunks, dfinal, scratch, interpret)
