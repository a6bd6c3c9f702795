"""Gradients of what is local to a chunk of the recurrence on a GPU: Pallas Mosaic GPU kernels for Hopper.

The state before a chunk ``S``, the gradient ``D`` of the state after it and, where there is an erase, the gradient
``dy`` of the right side of its triangular system are there already (``gpu_scan.py``). Three kernels follow, each for
all chunks and heads at once: of 64 value channels, what an erase writes, ``u``, and the gradient of values that are
written as they are; of what tokens are to each other, the gradients (``do u^T`` for the scores); and of 64 key channels
the gradients of inputs, from those (times keys and queries under the decay between them, compared in blocks as in
``gpu_chunk.py``) and from what meets the states (``do S^T``, ``u D^T``).

A decay enters as ``x exp(decay)``, so its gradient is that times the operand's: with the operands as the products saw
them, rounded. Then what rows gain is what columns lose, and the gradient of a gate, a sum over later tokens, is no
difference of two roundings.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.linear_recurrence.gpu_chunk import (
  _TILE,
  _WGMMA,
  ZEROS,
  _Chunk,
  _iota,
  _levels,
  _load,
  _middles,
  _times,
  halves,
  within,
)
from pallas_kernels.linear_recurrence.gpu_scan import (
  CHUNK,
  Plan,
  joined,
  parts,
  products,
  put,
  tiles,
  transposed,
)

_BLOCK = 64  # channels of a tile


def _zeros() -> Array:
  return plgpu.layout_cast(jnp.zeros(_TILE, jnp.float32), _WGMMA)


def _numbers() -> Array:
  """One of each row."""
  return plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), _WGMMA.reduce(1))


def serves(p: Plan) -> bool:
  """Whether shared memory holds the operands and sums of ``_channels_kernel``."""
  return p.parts == 1 or p.erase != "low_rank"


def _placed(sources: dict, pool) -> dict:
  """Where ``_fetch`` puts tiles; by name, each a list of parts."""
  free = list(pool)
  return {name: [free.pop(0) for _ in refs] for name, refs in sources.items()}


def _fetch(sources: dict, pool, ready) -> dict:
  """Copies tiles into shared memory. ``ready`` expects as many copies."""
  out = _placed(sources, pool)
  for name, refs in sources.items():
    for ref, to in zip(refs, out[name], strict=True):
      plgpu.copy_gmem_to_smem(ref, to, ready)
  plgpu.barrier_wait(ready)
  return out


def _sums(count: int, steps, products_of, start=None):
  """Sums over steps of ``count`` products each, kept where tensor cores add to them; and what a step carries on.

  ``products_of(step, carry)`` returns the pairs of operands, and a function that gives the next carry.
  """

  def run(*sums):
    def step(j, carry):
      pairs, then = products_of(j, carry)
      for acc, (a, b) in zip(sums, pairs, strict=True):
        for i, x in enumerate(a):
          for y in b[: len(b) - i]:
            plgpu.wgmma(acc, x, y)
      carry = then()
      plgpu.wgmma_wait(0)
      plgpu.commit_smem()  # all warps are done with what was multiplied
      return carry

    carry = lax.fori_loop(0, steps, step, start)
    return tuple(acc[...] for acc in sums), carry

  return pl.run_scoped(run, *[plgpu.ACC(_TILE, jnp.float32)] * count)


class _Program:
  """One program: the places of its tiles."""

  def __init__(self, p: Plan, refs: dict, chunk: Array, head: Array, here: Array):
    self.p, self.refs, self.chunk, self.head, self.here = p, refs, chunk, head, here

  def value_tile(self, name: str, j) -> list:
    """Of what is laid out like v."""
    columns = pl.ds(self.head * self.p.V + _BLOCK * j, _BLOCK)
    return [ref.at[self.chunk, :, columns] for ref in self.refs[name]]

  def state_tile(self, name: str, i, j) -> list:
    at = self.here, pl.ds(_BLOCK * i, _BLOCK), pl.ds(_BLOCK * j, _BLOCK)
    return [ref.at[at] for ref in self.refs[name]]

  def key_tile(self, name: str, i, head) -> list:
    columns = pl.ds(head * self.p.K + _BLOCK * i, _BLOCK)
    return [ref.at[self.chunk, :, columns] for ref in self.refs[name]]

  def operand(self, name: str, i=0) -> list:
    """Of what ``gpu_chunk.operands`` gives."""
    return [ref.at[self.here, :, pl.ds(_BLOCK * i, _BLOCK)] for ref in self.refs[name]]


# --- what is written, and the gradient of values ---


def _values_kernel(p: Plan, tree, *refs, pool, x_refs, of_state, of_system, of_dstate, of_own):
  refs, outs = jax.tree.unflatten(tree, refs)
  batch, n, block = (lax.axis_index(name) for name in ("batch", "chunk", "block"))
  blocks = p.V // _BLOCK
  head, j = lax.div(block, jnp.int32(blocks)), lax.rem(block, jnp.int32(blocks))
  here = (batch * p.Hv + head) * p.chunks + n
  x = _Program(p, refs, batch * p.chunks + n, head, here)
  columns = pl.ds(head * p.V + _BLOCK * j, _BLOCK)

  def meet(name, state, ready):
    """The sum over key channels of a chunk's operand and a state."""

    def body(i, acc):
      sources = {"rows": x.operand(name, i), "state": x.state_tile(state, i, j)}
      got = _fetch(sources, pool, ready)
      acc = acc + products(_TILE, (got["rows"], got["state"]))
      plgpu.commit_smem()  # all warps are done with what was multiplied
      return acc

    return lax.fori_loop(0, p.K // _BLOCK, body, _zeros())

  if p.erase != "none":
    R = meet("erased", "S", of_state)
    sources = {"inverse": x.operand("inverse")}
    if p.erase == "key":
      values = functools.reduce(jnp.add, [_load(ref) for ref in x.value_tile("v", j)])
      beta = plgpu.load(refs["beta"].at[here], layout=_WGMMA.reduce(1), optimized=False)
      beta = plgpu.layout_cast(lax.broadcast_in_dim(beta, _TILE, [0]), _WGMMA)
      R = R + beta * values
    else:
      sources |= {"removed": x.operand("removed"), "v": x.value_tile("v", j)}
    got = _fetch(sources, pool, of_system)
    if p.erase == "low_rank":
      R = R + products(_TILE, (got["removed"], got["v"]))
    put(x_refs, R)
    plgpu.commit_smem()
    U = products(_TILE, (got["inverse"], x_refs))
    for i, out in enumerate(outs["u"]):
      part = U.astype(jnp.bfloat16)
      out[x.chunk, :, columns] = part
      if i + 1 < p.parts:
        U = U - part.astype(jnp.float32)
    plgpu.commit_smem()

  if p.erase != "key":
    dv = meet("writes", "D", of_dstate)
    sources = {"scores": x.operand("scores"), "do": x.value_tile("do", j)}
    if p.erase == "low_rank":
      sources |= {"removed": x.operand("removed"), "dy": x.value_tile("dy", j)}
    got = _fetch(sources, pool, of_own)
    pairs = [(transposed(got["scores"]), got["do"])]
    if p.erase == "low_rank":
      pairs.append((transposed(got["removed"]), got["dy"]))
    dv = dv + products(_TILE, *pairs)
    outs["v"][x.chunk, :, columns] = dv.astype(outs["v"].dtype)


def _tile(*count: int, dtype=jnp.bfloat16):
  return plgpu.SMEM((*count, *_TILE), dtype, transforms=tiles(128, dtype))


def values(p: Plan, arrays: dict, v_dtype, interpret) -> dict:
  """``u``, what an erase writes, in parts, and ``v``, the gradient of values that are written as they are.

  Args:
    arrays: operands of ``gpu_chunk.operands`` for gradients, ``v``, ``do`` and ``dy`` [B * N, C, Hv * V], and the
      states ``S`` and ``D`` [B * Hv * N, K, V], all in parts; ``beta`` [B * Hv * N, C].
    v_dtype: of the gradient of values.
  """
  like_v = p.B * p.chunks, CHUNK, p.Hv * p.V
  outs: dict = {}
  if p.erase != "none":
    outs["u"] = [jax.ShapeDtypeStruct(like_v, jnp.bfloat16)] * p.parts
  if p.erase != "key":
    outs["v"] = jax.ShapeDtypeStruct(like_v, v_dtype)
  names = ("erased", "inverse", "removed", "writes", "scores", "v", "do", "dy", "S", "D", "beta")
  if p.erase == "none":
    names = ("writes", "scores", "do", "D")
  elif p.erase == "key":
    names = ("erased", "inverse", "v", "S", "beta")
  arrays = {name: arrays[name] for name in names if name in arrays}
  tree = jax.tree.structure((arrays, outs))
  low = p.erase == "low_rank"
  scratch = {
    "pool": [_tile() for _ in range((4 if low else 2) * p.parts)],
    "x_refs": [_tile() for _ in range(p.parts)],
    "of_state": plgpu.Barrier(num_arrivals=2 * p.parts),
    "of_system": plgpu.Barrier(num_arrivals=(3 if low else 1) * p.parts),
    "of_dstate": plgpu.Barrier(num_arrivals=2 * p.parts),
    "of_own": plgpu.Barrier(num_arrivals=(4 if low else 2) * p.parts),
  }
  flat = plgpu.kernel(
    functools.partial(_values_kernel, p, tree),
    out_type=jax.tree.leaves(outs),
    grid=(p.B, p.chunks, p.Hv * (p.V // _BLOCK)),
    grid_names=("batch", "chunk", "block"),
    scratch_types=scratch,
    kernel_name="linear_recurrence_values",
    interpret=interpret,
  )(*jax.tree.leaves(arrays))
  return jax.tree.unflatten(jax.tree.structure(outs), flat)


# --- gradients of what tokens are to each other, and of what a chunk is computed from ---


class _Facts:
  """What is what in a specialisation."""

  def __init__(self, p: Plan, refs, undecayed: bool):
    self.channel, self.scalar = "G" in refs, "G_row" in refs
    self.bonus = "own" in refs
    self.erases = {"none": None, "key": "k", "low_rank": "b"}[p.erase]
    self.corrects = "a" if p.erase == "low_rank" else None
    # Rows, with the names of their decays, of the factors of what they read of the state, and of their gradients.
    reads = "before" if self.bonus else "G"
    self.rows = [("q", reads, "start", "do")]
    if self.erases:
      self.rows.append((self.erases, "before" if undecayed else "G", "erase_start", "dy"))
    # Columns, with what is written under them.
    self.cols = [("k", "u" if p.erase == "key" else "v")]
    if self.corrects:
      self.cols.append((self.corrects, "u"))
    self.values = sorted({x for *_, x in self.rows} | {x for _, x in self.cols})
    self.inputs = sorted({x for x, *_ in self.rows} | {x for x, _ in self.cols})
    # What the comparison of a row with a column is called.
    self.pairs = {("q", "k"): "scores"}
    if p.erase == "key":
      self.pairs["k", "k"] = "erasing"
    if self.corrects:
      self.pairs |= {("q", "a"): "corrected", ("b", "k"): "removed", ("b", "a"): "erasing"}
    self.squares = []
    if self.scalar:
      self.squares = list(self.pairs.values())
    elif p.erase == "key":
      self.squares = ["erasing"]
    self.decays = [d for d in ("G", "before") if d == "G" or d in [row[1] for row in self.rows]]


def _compared_kernel(p: Plan, tree, heads, undecayed, *refs, pairs, pool, of_values, of_square):
  """Gradients of comparisons of one chunk and head, with the factors that they carry."""
  refs, outs = jax.tree.unflatten(tree, refs)
  c = _Chunk(p, refs, outs, heads)
  at = _Program(p, refs, c.chunk, c.head, c.here)
  f = _Facts(p, refs, undecayed)
  row, col = _iota(0), _iota(1)

  gains: dict = {}

  def gain(name, value):
    gains[name] = gains[name] + value if name in gains else value

  # One after the other: all at once are more than registers hold.
  for (name, decay, _, of_row), (other, of_col) in itertools.product(f.rows, f.cols):
    if (name, other) not in pairs:
      continue
    operand = f.pairs[name, other]

    def compared(j, _, of_row=of_row, of_col=of_col):
      got = _fetch({x: at.value_tile(x, j) for x in (of_row, of_col)}, pool, of_values)
      return [(got[of_row], transposed(got[of_col]))], lambda: None

    (dz,), _ = _sums(1, p.V // _BLOCK, compared)
    erases_key = p.erase == "key" and name == "k"
    if f.scalar or erases_key:
      square = _fetch({operand: at.operand(operand)}, pool, of_square)[operand]
    mask = row > col if f.bonus or name != "q" else row >= col
    if "runs" in refs:
      mask &= c.rows("runs") == c.columns("runs_column")
    if f.bonus:
      gain("own", jnp.sum(jnp.where(row == col, dz, 0.0), axis=1))
    dz = jnp.where(mask, dz, 0.0)
    if erases_key:
      dz = -dz
      gain("beta", jnp.sum(dz * joined(square), axis=1))
      dz = dz * c.rows("beta")
    if f.scalar:
      change = jnp.where(mask, dz * joined(square), 0.0)
      gain(f"{decay}_row", jnp.sum(change, axis=1))
      gain("G_column", -jnp.sum(change, axis=0))
      dz = dz * jnp.exp(jnp.minimum(c.rows(f"{decay}_row") - c.columns("G_column"), 0.0))
    c.store(f"d_{operand}", dz)
    plgpu.commit_smem()  # all warps have read what was fetched
  for name, value in gains.items():
    outs[name][c.here] = value


class _Held:
  """What a program of ``_channels_kernel`` has in shared memory: what is read again and again takes no registers.

  Nor do its addresses: from one ``anew`` to the next they are others (``_Chunk.zero``).

  Args:
    c, i: the program, and its block of channels.
    sources: inputs and gradients of comparisons, by name; the first of the ``pool``, and after them what is ``spare``.
    resident: decays, the first of ``exact``, tiles in float32 (None: there are none).
    summed: gradients, the others of ``exact``; those of other inputs are in registers.
  """

  def __init__(self, c: _Chunk, i: Array, sources: dict, resident, summed, pool, exact):
    self._c, self._i, self._sources, self._pool, self._exact = c, i, sources, pool, exact
    self._resident, self._summed = resident, summed
    self._begun: set[str] = set()
    self._in_registers: dict = {}
    self.anew()

  def anew(self) -> None:
    """Begins a stage."""
    zero = self._c.zero()
    self.tiles = [self._pool.at[zero + n] for n in range(self._pool.shape[0])]
    self.x = _placed(self._sources, self.tiles)
    self.spare = self.tiles[sum(map(len, self._sources.values())) :]
    count = len(self._resident) + len(self._summed)
    exact = [self._exact.at[zero + n] for n in range(count)]
    self.decays = dict(zip(self._resident, exact, strict=False))
    self._totals = dict(zip(self._summed, exact[len(self._resident) :], strict=True))

  def decay(self, name: str) -> Array:
    return self.decays[name][...] if self.decays else self._c.tile(name, self._i)

  def gain(self, name: str, value: Array) -> None:
    """Adds to a gradient."""
    if name in self._totals:
      ref = self._totals[name]
      value = ref[...] + value if name in self._begun else value
      ref[...] = value
    else:
      self._in_registers[name] = self._in_registers[name] + value if name in self._begun else value
    self._begun.add(name)

  def write(self, outs: dict) -> None:
    """Gradients to where they go, ``outs`` by name, through shared memory."""
    self.anew()
    plgpu.commit_smem()
    small = list(self.tiles)
    for name, out in outs.items():
      ref = self._totals.get(name)
      if ref is None or out.dtype != jnp.float32:
        value = self._in_registers[name] if ref is None else ref[...]
        ref = small.pop(0)
        ref[...] = value.astype(ref.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(ref, out)
    plgpu.wait_smem_to_gmem(0)


def _channels_kernel(
  p: Plan,
  tree,
  heads,
  undecayed,
  *refs,
  resident,
  summed,
  pool,
  exact=None,
  of_inputs,
  of_reads,
  of_writes,
):
  """Gradients of 64 key channels of one chunk and head; of a number of a token, their part."""
  refs, outs = jax.tree.unflatten(tree, refs)
  blocks = jnp.int32(p.K // _BLOCK)
  block = lax.axis_index("head_block")
  i = lax.rem(block, blocks)
  c = _Chunk(p, refs, outs, heads, lax.div(block, blocks))
  at = _Program(p, refs, c.chunk, c.head, c.here)
  f = _Facts(p, refs, undecayed)
  columns, keeps = pl.ds(c.head * p.K + _BLOCK * i, _BLOCK), "keep" in outs

  sources = {}
  for name in f.inputs:
    sources[name] = at.key_tile(name, i, lax.div(c.head, c.ratio) if name in ("q", "k") else c.head)
  for pair, name in f.pairs.items():
    sources[pair] = at.operand(f"d_{name}")
  held = _Held(c, i, sources, resident, summed, pool, exact)
  for name, ref in held.decays.items():
    plgpu.copy_gmem_to_smem(refs[name].at[c.chunk, :, columns], ref, of_inputs)
  _fetch(sources, held.tiles, of_inputs)

  numbers: dict = {}

  def add(name, value):
    numbers[name] = jnp.sum(value, axis=1)

  # What reads the state, and what writes the next.
  def read(j, _):
    names = [of_row for *_, of_row in f.rows]
    sources = {name: at.value_tile(name, j) for name in names} | {"S": at.state_tile("S", i, j)}
    got = _fetch(sources, held.spare, of_reads)
    return [(got[name], transposed(got["S"])) for name in names], lambda: None

  def written(j, dkeep):
    names = [written for _, written in f.cols]
    sources = {name: at.value_tile(name, j) for name in names}
    sources |= {name: at.state_tile(name, i, j) for name in (("D", "S") if keeps else ("D",))}
    got = _fetch(sources, held.spare, of_writes)

    def then():
      if not keeps:
        return None
      return dkeep + jnp.sum(joined(got["S"]) * joined(got["D"]), axis=1)

    return [(got[name], transposed(got["D"])) for name in names], then

  met, _ = _sums(len(f.rows), p.V // _BLOCK, read)
  for (name, decay, start, _), dx in zip(f.rows, met, strict=True):
    held.anew()
    factor = c.rows(start)
    if f.channel:
      factor = _times(jnp.exp(held.decay(decay)), factor)
    if p.erase == "key" and name == "k":
      add("beta", -_times(dx, factor) * joined(held.x[name]))
      dx = -dx * c.rows("beta")
    if f.scalar:
      add(start, dx * joined(held.x[name]))
    dx = _times(dx, factor)
    held.gain(name, dx)
    if f.channel:
      held.gain(decay, dx * joined(held.x[name]))
  met, dkeep = _sums(len(f.cols), p.V // _BLOCK, written, _numbers() if keeps else None)
  if keeps:
    n = lax.rem(c.here, jnp.int32(p.chunks))
    outs["keep"][lax.div(c.here, jnp.int32(p.chunks)), n, pl.ds(_BLOCK * i, _BLOCK)] = dkeep
  for (name, _), dx in zip(f.cols, met, strict=True):
    held.anew()
    factor = c.rows("end")
    if f.channel:
      factor = _times(jnp.exp(c.tile("G", i, CHUNK - 1) - held.decay("G")), factor)
    if f.scalar:
      end = jnp.sum(dx * joined(held.x[name]), axis=1)
      numbers["end"] = numbers["end"] + end if "end" in numbers else end
    dx = _times(dx, factor)
    held.gain(name, dx)
    if f.channel:
      left = dx * joined(held.x[name])
      last = plgpu.layout_cast(lax.broadcast_in_dim(jnp.sum(left, axis=0), _TILE, [1]), _WGMMA)
      held.gain("G", jnp.where(_iota(0) == CHUNK - 1, last, 0.0) - left)
  for name, value in numbers.items():
    outs[name][i, c.here] = value

  # What tokens are to each other.
  for level, h in enumerate(_levels(p) if f.channel else []):
    _level(c, f, i, level == 0, h, held)
  if not f.channel:
    _all_at_once(f, held)
  names = [*f.inputs, *(f.decays if f.channel else [])]
  held.write({name: outs[name].at[c.chunk, :, columns] for name in names})


def _level(c: _Chunk, f: _Facts, i, near, h, held: _Held) -> None:
  """A level of ``gpu_chunk._compare``: what tokens of neighbouring blocks, or of one, are to each other."""
  cols = [name for name, _ in f.cols]

  def places():
    """Of columns and rows times their factors, and of what is masked."""
    held.anew()
    tiles = itertools.batched(held.spare, c.p.parts)
    return {name: next(tiles) for name in cols}, next(tiles), {name: next(tiles) for name in cols}

  def factor(decay, sign):
    difference = sign * (held.decay(decay) - _middles(c, h, i, near))
    return jnp.exp(difference if near else jnp.minimum(difference, 0.0))

  here = within(h) if near else halves(h)
  col_refs, _, _ = places()
  of_cols = factor("G", -1.0)
  for name, refs in col_refs.items():
    put(refs, joined(held.x[name]) * of_cols)
  for name, decay, *_ in f.rows:
    of_rows = factor(decay, 1.0)
    col_refs, row_refs, masked = places()
    put(row_refs, joined(held.x[name]) * of_rows)
    for other in cols:
      for z, to in zip(held.x[name, other], masked[other], strict=True):
        to[...] = jnp.where(here, z[...].astype(jnp.float32), 0.0).astype(to.dtype)
    plgpu.commit_smem()
    back = products(_TILE, *[(masked[other], col_refs[other]) for other in cols])
    held.gain(decay, back * joined(row_refs))
    held.gain(name, back * of_rows)
    for other in cols:
      col_refs, row_refs, masked = places()
      forth = products(_TILE, (transposed(masked[other]), row_refs))
      held.gain("G", -forth * joined(col_refs[other]))
      held.gain(other, forth * of_cols)
    plgpu.commit_smem()  # all warps are done with what was multiplied


def _all_at_once(f: _Facts, held: _Held) -> None:
  """The same where no decay is a channel's: all tokens at once."""
  x = held.x
  for name in f.inputs:
    pairs = [(x[name, other], x[other]) for other, _ in f.cols if (name, other) in f.pairs]
    pairs += [
      (transposed(x[other, name]), x[other]) for other, *_ in f.rows if (other, name) in f.pairs
    ]
    held.gain(name, products(_TILE, *pairs))


def gradients(
  p: Plan, arrays: dict, heads: int, undecayed: bool, keeps: bool, dtype, interpret
) -> dict[str, Array]:
  """Gradients of ``gpu_chunk.operands``'s arrays, by the same names, and of ``keep`` if it ``keeps`` less than all.

  Those of ``q`` and ``k`` are a value head's, [B * N, C, Hv * K].

  Args:
    arrays: as ``gpu_chunk.operands`` takes them; what it gives in parts, for gradients, what tokens are to tokens;
      ``v``, ``do``, ``dy``, ``u`` [B * N, C, Hv * V] and ``S``, ``D`` [B * Hv * N, K, V] in parts, those that the
      specialisation has.
    heads, undecayed: as there.
    dtype: of the gradients of q, k, a and b.
  """
  f = _Facts(p, arrays, undecayed)
  numbers, blocks = (p.heads * p.chunks, CHUNK), p.K // _BLOCK

  def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  def some(names):
    return {name: arrays[name] for name in names if name in arrays}

  def call(kernel, name, grid, arrays, outs, scratch):
    flat = plgpu.kernel(
      functools.partial(kernel, p, jax.tree.structure((arrays, outs)), heads, undecayed),
      out_type=jax.tree.leaves(outs),
      grid=(p.B, p.chunks, *grid.values()),
      grid_names=("batch", "chunk", *grid),
      scratch_types=scratch,
      kernel_name=f"linear_recurrence_{name}",
      interpret=interpret,
    )(*jax.tree.leaves(arrays))
    return jax.tree.unflatten(jax.tree.structure(outs), flat)

  scratch = {
    "pool": [_tile() for _ in range(2 * p.parts)],
    "of_values": plgpu.Barrier(num_arrivals=2 * p.parts),
    "of_square": plgpu.Barrier(num_arrivals=p.parts),
  }
  inputs = some((*f.values, *f.squares, "own", "beta", "runs", "runs_column"))
  inputs |= some(("G", "G_row", "G_column", "before_row"))
  got: dict = {}
  # Four comparisons are more than registers hold, one after the other too.
  for pairs in [(pair,) for pair in f.pairs] if f.corrects else [tuple(f.pairs)]:
    outs = {
      f"d_{f.pairs[pair]}": [jax.ShapeDtypeStruct((*numbers, CHUNK), jnp.bfloat16)] * p.parts
      for pair in pairs
    }
    names = ["own"] * f.bonus + ["beta"] * (p.erase == "key")
    if f.scalar:
      names += ["G_column", *{f"{row[1]}_row" for row in f.rows if row[0] in dict(pairs)}]
    outs |= {name: floats(*numbers) for name in names}
    kernel = functools.partial(_compared_kernel, pairs=pairs)
    for name, x in call(kernel, "comparisons", {"head": p.Hv}, inputs, outs, scratch).items():
      got[name] = got[name] + x if name in got else x
  squares = {name: got.pop(name) for name in list(got) if name.startswith("d_")}

  wide = p.B * p.chunks, CHUNK, p.Hv * p.K
  outs = {name: jax.ShapeDtypeStruct(wide, dtype) for name in f.inputs}
  names = ["beta"] * (p.erase == "key")
  if f.channel:
    outs |= {name: floats(*wide) for name in f.decays}
  if f.scalar:
    names += ["end", *(row[2] for row in f.rows)]
  outs |= {name: floats(blocks, *numbers) for name in names}
  if keeps:
    outs["keep"] = floats(p.heads, p.chunks, p.K)
  levels = (2 * len(f.cols) + 1) * f.channel
  # Sums in shared memory: more of them than registers hold, or what leaves from there.
  large = f.channel or bool(f.corrects) or dtype == jnp.float32
  summed = [*f.inputs, *(f.decays if f.channel else [])] if large else []
  # As much as fits: with a low-rank erase decays stay in global memory.
  fits = f.channel and not f.corrects and (p.parts == 1 or len(f.decays) == 1)
  resident = f.decays if fits else []
  copies = (len(f.inputs) + len(f.pairs)) * p.parts + len(resident)
  small = len(f.inputs) + len(f.pairs) + max(levels, len(f.rows) + 1, len(f.cols) + 1 + keeps)
  scratch = {"exact": _tile(len(resident) + len(summed), dtype=jnp.float32)} if large else {}
  scratch |= {
    "pool": _tile(small * p.parts),
    "of_inputs": plgpu.Barrier(num_arrivals=copies),
    "of_reads": plgpu.Barrier(num_arrivals=(len(f.rows) + 1) * p.parts),
    "of_writes": plgpu.Barrier(num_arrivals=(len(f.cols) + 1 + keeps) * p.parts),
  }
  inputs = some(
    (*f.values, "S", "D", "before", "start", "erase_start", "end", "own", "G", "G_row", "beta")
  )
  inputs["zeros"] = jnp.asarray(ZEROS)
  inputs |= squares | {name: parts(arrays[name], p.parts) for name in f.inputs}
  kernel = functools.partial(_channels_kernel, resident=resident, summed=summed)
  of_channels = call(kernel, "channels", {"head_block": p.Hv * blocks}, inputs, outs, scratch)
  for name in names:
    x = jnp.sum(of_channels[name], axis=0)
    of_channels[name] = got.pop(name) + x if name in got else x
  return got | of_channels
