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
  Shared,
  _Chunk,
  _iota,
  _spread,
  _times,
  approximate,
  base,
  exponents,
  half_of,
  levels,
  middle_rows,
  of_halves,
  of_one_block,
  sums,
  tile_of,
)
from pallas_kernels.linear_recurrence.gpu_scan import (
  CHUNK,
  Plan,
  joined,
  parts_in_xla,
  products,
  put,
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


def _start(sources: dict, pool, ready) -> dict:
  """Begins to copy tiles into shared memory. ``ready`` expects as many copies."""
  out = _placed(sources, pool)
  for name, refs in sources.items():
    for ref, to in zip(refs, out[name], strict=True):
      plgpu.copy_gmem_to_smem(ref, to, ready)
  return out


def _fetch(sources: dict, pool, ready) -> dict:
  """And waits until they are there."""
  out = _start(sources, pool, ready)
  plgpu.barrier_wait(ready)
  return out


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

  if p.erase == "key":
    beta = _spread(plgpu.load(refs["beta"].at[here], layout=_WGMMA.reduce(1), optimized=False), 0)
  if p.erase != "none":
    R = meet("erased", "S", of_state)
    sources = {"inverse": x.operand("inverse"), "v": x.value_tile("v", j)}
    sources |= {"removed": x.operand("removed")} if p.erase == "low_rank" else {}
    got = _fetch(sources, pool, of_system)
    if p.erase == "low_rank":
      R = R + products(_TILE, (got["removed"], got["v"]))
    else:
      R = R + beta * joined(got["v"])
    put(x_refs, R)
    plgpu.commit_smem()
    U = products(_TILE, (got["inverse"], x_refs))
    plgpu.commit_smem()  # all warps are done with what was multiplied
    put(x_refs, U)
    plgpu.commit_smem()
    for ref, out in zip(x_refs, outs["u"], strict=True):
      plgpu.copy_smem_to_gmem(ref, out.at[x.chunk, :, columns])

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
    out = outs["v"].at[x.chunk, :, columns]
    if out.dtype == jnp.float32:
      out[...] = dv
    else:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of u
      x_refs[0][...] = dv.astype(out.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(x_refs[0], out)
  plgpu.wait_smem_to_gmem(0)


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
    "pool": [tile_of() for _ in range((4 if low else 2) * p.parts)],
    "x_refs": [tile_of() for _ in range(p.parts)],
    "of_state": plgpu.Barrier(num_arrivals=2 * p.parts),
    "of_system": plgpu.Barrier(num_arrivals=(3 if low else 2) * p.parts),
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


def _values_of(f: _Facts, pairs) -> list[str]:
  """What is laid out like v of which rows and columns that are compared are the gradients."""
  of_row, of_col = {name: value for name, *_, value in f.rows}, dict(f.cols)
  return sorted({x for name, other in pairs for x in (of_row[name], of_col[other])})


def _tiles_at_once(p: Plan) -> int:
  """Tiles of each of them in shared memory: two, where that leaves room for another program."""
  return 2 if p.parts == 1 and p.V % (2 * _BLOCK) == 0 else 1


def _compared_kernel(
  p: Plan, tree, heads, undecayed, *refs, shared, pairs, pool, squares, slot, of_values, of_squares, ready=None,
  **memory,
):  # fmt: skip
  """Gradients of comparisons of one chunk and head, with the factors that they carry."""
  refs, outs = jax.tree.unflatten(tree, refs)
  c = _Chunk(p, refs, outs, heads, shared=shared, memory=memory, slots=[slot])
  at = _Program(p, refs, c.chunk, c.head, c.here)
  f = _Facts(p, refs, undecayed)
  sources = {
    f.pairs[pair]: at.operand(f.pairs[pair]) for pair in pairs if f.pairs[pair] in f.squares
  }
  square = _start(sources, squares, of_squares)
  c.fetch(ready)
  row, col = _iota(0), _iota(1)

  gains: dict = {}

  def gain(name, value):
    gains[name] = gains[name] + value if name in gains else value

  of_row = {name: value for name, *_, value in f.rows}
  of_col = dict(f.cols)
  tiles = range(_tiles_at_once(p))

  def compared(step, _):
    sources = {
      (x, j): at.value_tile(x, len(tiles) * step + j) for x in _values_of(f, pairs) for j in tiles
    }
    got = _fetch(sources, pool, of_values)
    return [
      [(got[of_row[name], j], transposed(got[of_col[other], j])) for j in tiles]
      for name, other in pairs
    ], lambda: None

  gradients, _ = sums(len(pairs), p.V // _BLOCK // len(tiles), compared)
  if square:
    plgpu.barrier_wait(of_squares)
  # One after the other: all at once are more than registers hold.
  for (name, other), dz in zip(pairs, gradients, strict=True):
    _, decay, *_ = next(row for row in f.rows if row[0] == name)
    operand = f.pairs[name, other]
    erases_key = p.erase == "key" and name == "k"
    mask = row > col if f.bonus or name != "q" else row >= col
    if "runs" in refs:
      mask &= c.rows("runs") == c.columns("runs_column")
    if f.bonus:
      gain("own", jnp.sum(jnp.where(row == col, dz, 0.0), axis=1))
    dz = jnp.where(mask, dz, 0.0)
    if erases_key:
      dz = -dz
      gain("beta", jnp.sum(dz * joined(square[operand]), axis=1))
      dz = dz * c.rows("beta")
    if f.scalar:
      change = jnp.where(mask, dz * joined(square[operand]), 0.0)
      gain(f"{decay}_row", jnp.sum(change, axis=1))
      gain("G_column", -jnp.sum(change, axis=0))
      dz = dz * jnp.exp(jnp.minimum(c.rows(f"{decay}_row") - c.columns("G_column"), 0.0))
    c.free()
    c.stage(f"d_{operand}", dz)
    c.send()
  for name, value in gains.items():
    outs[name][c.here] = value
  plgpu.wait_smem_to_gmem(0)


class _Held:
  """What a program of ``_channels_kernel`` has in shared memory besides decays.

  Addresses take registers, too: from one ``anew`` to the next they are others (``_Chunk.zero``).

  Args:
    sources: inputs and gradients of comparisons, by name; the first of the ``pool``, and after them what is ``spare``.
    summed: gradients that are summed in ``exact``, in float32; those of other inputs are in registers.

  Attributes:
    in_memory: whether those of inputs are among the ``summed``: registers are short of more than that.
  """

  def __init__(self, c: _Chunk, sources: dict, summed, pool, exact):
    self._c, self._sources, self._pool = c, sources, pool
    self._summed, self._exact = summed, exact
    self.in_memory = bool(set(summed) & {*sources})
    self._begun: set[str] = set()
    self.in_registers: dict = {}
    self.anew()

  def anew(self) -> None:
    """Begins a stage."""
    zero = self._c.zero()
    self.tiles = [self._pool.at[zero + n] for n in range(self._pool.shape[0])]
    self.x = _placed(self._sources, self.tiles)
    self.spare = self.tiles[sum(map(len, self._sources.values())) :]
    self._totals = {
      name: self._exact.at[zero + n, :, pl.ds(0, _BLOCK)] for n, name in enumerate(self._summed)
    }

  def gain(self, name: str, value: Array) -> None:
    """Adds to a gradient, at once: the compiler would keep the factors of products until their sums are used."""
    value = lax.optimization_barrier(value)
    if name in self._totals:
      ref = self._totals[name]
      value = ref[...] + value if name in self._begun else value
      ref[...] = value
    else:
      value = self.in_registers[name] + value if name in self._begun else value
      self.in_registers[name] = lax.optimization_barrier(value)
    self._begun.add(name)

  def write(self, outs: dict) -> None:
    """Gradients to where they go, ``outs`` by name."""
    self.anew()
    plgpu.commit_smem()
    free = list(self.tiles)
    for name, out in outs.items():
      value = self._totals[name][...] if name in self._totals else self.in_registers[name]
      if out.dtype == jnp.float32:
        out[...] = value  # a thread's 8 bytes and its neighbours' are what memory writes at once
        continue
      tile = free.pop(0)
      tile[...] = value.astype(tile.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(tile, out)
    plgpu.wait_smem_to_gmem(0)


def _channels_kernel(
  p: Plan, tree, heads, undecayed, *refs, shared, summed, pool, of_inputs, of_states, exact=None, ready=None, **memory
):  # fmt: skip
  """Gradients of 64 key channels of one chunk and head; of a number of a token, their part."""
  refs, outs = jax.tree.unflatten(tree, refs)
  blocks = jnp.int32(p.K // _BLOCK)
  block = lax.axis_index("head_block")
  i = lax.rem(block, blocks)
  head = lax.div(block, blocks)
  c = _Chunk(p, refs, outs, heads, head=head, shared=shared, memory=memory, first=i, anew=True)
  at = _Program(p, refs, c.chunk, c.head, c.here)
  f = _Facts(p, refs, undecayed)
  columns, keeps = pl.ds(c.head * p.K + _BLOCK * i, _BLOCK), "keep" in outs

  sources = {}
  for name in f.inputs:
    sources[name] = at.key_tile(name, i, lax.div(c.head, c.ratio) if name in ("q", "k") else c.head)
  for pair, name in f.pairs.items():
    sources[pair] = at.operand(f"d_{name}")
  held = _Held(c, sources, summed, pool, exact)
  _start(sources, held.tiles, of_inputs)

  numbers: dict = {}

  def add(name, value):
    numbers[name] = jnp.sum(value, axis=1)

  # What reads the state, and what writes the next.
  def states(rows, cols, ready):
    """The gradients of rows and columns by the states, and that of what is kept of the state, where columns are."""

    def step(j, dkeep):
      with c.step(j):
        held.anew()
      names = sorted({x for *_, x in rows} | {x for _, x in cols})
      sources = {name: at.value_tile(name, j) for name in names}
      sources |= {name: at.state_tile(name, i, j) for name in _states_of(rows, cols, keeps)}
      got = _fetch(sources, held.spare, ready)

      def then():
        if not (keeps and cols):
          return None
        return dkeep + jnp.sum(joined(got["S"]) * joined(got["D"]), axis=1)

      pairs = [[(got[of_row], transposed(got["S"]))] for *_, of_row in rows]
      return pairs + [[(got[written], transposed(got["D"]))] for _, written in cols], then

    start = _numbers() if keeps and cols else None
    met, dkeep = sums(len(rows) + len(cols), p.V // _BLOCK, step, start)
    if dkeep is not None:
      n = lax.rem(c.here, jnp.int32(p.chunks))
      outs["keep"][lax.div(c.here, jnp.int32(p.chunks)), n, pl.ds(_BLOCK * i, _BLOCK)] = dkeep
    return met

  for n, (rows, cols) in enumerate(_met(f)):
    met, decayed = states(rows, cols, of_states[n]), {}
    if n == 0:
      c.fetch(ready)
      plgpu.barrier_wait(of_inputs)
    for (name, decay, start, _), dx in zip(rows, met, strict=False):
      held.anew()
      factor = c.rows(start)
      if f.channel:
        if decay not in decayed:
          decayed[decay] = jnp.exp(c.tile(decay, 0))
        factor = _times(decayed[decay], factor)
      if p.erase == "key" and name == "k":
        add("beta", -_times(dx, factor) * joined(held.x[name]))
        dx = -dx * c.rows("beta")
      if f.scalar:
        add(start, dx * joined(held.x[name]))
      dx = _times(dx, factor)
      held.gain(name, dx)
      if f.channel:
        held.gain(decay, dx * joined(held.x[name]))
    for (name, _), dx in zip(cols, met[len(rows) :], strict=True):
      held.anew()
      factor = c.rows("end")
      if f.channel:
        factor = _times(jnp.exp(c.last(0) - c.tile("G", 0)), factor)
      if f.scalar:
        end = jnp.sum(dx * joined(held.x[name]), axis=1)
        numbers["end"] = numbers["end"] + end if "end" in numbers else end
      dx = _times(dx, factor)
      held.gain(name, dx)
      if f.channel:
        left = dx * joined(held.x[name])
        held.gain(
          "G", jnp.where(_iota(0) == CHUNK - 1, _spread(jnp.sum(left, axis=0), 1), 0.0) - left
        )
  for name, value in numbers.items():
    outs[name][i, c.here] = value

  # What tokens are to each other.
  if f.channel:

    def level(n, sums):
      held.in_registers = dict(sums)
      with c.step(n):
        for rows in _compared(f):
          _level(c, f, rows, n, held)
      return held.in_registers

    for rows in _compared(f):
      _level(c, f, rows, 0, held)
    held.in_registers = lax.fori_loop(1, levels(p), level, held.in_registers)
  else:
    _all_at_once(f, held)
  names = [*f.inputs, *(f.decays if f.channel else [])]
  outs = {name: outs[name].at[c.chunk, :, columns] for name in names}
  held.write(outs)


def _met(f: _Facts) -> list:
  """Rows and columns that meet states in one go: four sums are more than registers hold."""
  return [(f.rows, []), ([], f.cols)] if f.corrects else [(f.rows, f.cols)]


def _compared(f: _Facts) -> list:
  """Rows that are compared with all columns in one go: four comparisons are more than registers hold."""
  return [[row] for row in f.rows] if f.corrects else [f.rows]


def _states_of(rows, cols, keeps: bool) -> list[str]:
  return ["S"] * bool(rows or keeps) + ["D"] * bool(cols)


def _level(c: _Chunk, f: _Facts, rows, level: int | Array, held: _Held) -> None:
  """A level of ``gpu_chunk._compare``: what tokens of one block, or of neighbouring ones, are to each other."""
  cols, decays = [name for name, _ in f.cols], {name: decay for name, decay, *_ in rows}
  within = isinstance(level, int)
  column = "column" if within else "G"

  def of(which, logs):
    return jnp.exp(-logs["G"] if which == "column" else logs[which])

  held.anew()
  free = itertools.batched(held.spare, c.p.parts)
  # Of halves, a vector that is a row and a column, with one decay, is one operand: a token is one of them.
  operands = dict.fromkeys([*((name, column) for name in cols), *decays.items()])
  places = {operand: next(free) for operand in operands}
  masked = {(name, other): next(free) for name in decays for other in cols}
  logs = exponents(c, level, 0, decays.values())
  for (name, which), refs in places.items():
    put(refs, joined(held.x[name]) * of(which, logs))
  if within:
    here = of_one_block(base(c.p), c.zero())
  else:
    half = half_of(c.p, level)
    here = of_halves(half, c.zero())
  for pair, refs in masked.items():
    for z, to in zip(held.x[pair], refs, strict=True):
      to[...] = jnp.where(here, z[...].astype(jnp.float32), 0.0).astype(to.dtype)
  plgpu.commit_smem()
  for (name, which), refs in places.items():
    pairs, row, col = [], decays.get(name) == which, name in cols and which == column
    if row:
      pairs += [(masked[name, other], places[other, column]) for other in cols]
    if col:
      pairs += [(transposed(masked[x, name]), places[x, decays[x]]) for x in decays]
    product = products(_TILE, *pairs)
    # Factors that are many are computed anew: held until here they would be more than registers hold.
    if held.in_memory:
      logs = exponents(c, level, 0, decays.values())
    elif within:
      logs = jax.tree.map(lax.optimization_barrier, logs)
    held.gain(name, product * of(which, logs))
    # What rows gain columns lose.
    gained = product * joined(refs)
    if row and col:
      second = (_iota(0) & jnp.broadcast_to(half, _TILE)) != 0
      gained = jnp.where(second, gained, -gained)
    held.gain("G" if col else which, gained if row else -gained)
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
      compiler_params=approximate(p),
      kernel_name=f"linear_recurrence_{name}",
      interpret=interpret,
    )(*jax.tree.leaves(arrays))
    return jax.tree.unflatten(jax.tree.structure(outs), flat)

  numbered = [
    n for n in ("G_row", "G_column", "before_row", "beta", "runs", "runs_column") if n in arrays
  ]
  shared = Shared(numbers=tuple(numbered))
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
    squares = sum(f.pairs[pair] in f.squares for pair in pairs) * p.parts
    fetched = len(_values_of(f, pairs)) * _tiles_at_once(p) * p.parts
    scratch = {
      "pool": [tile_of() for _ in range(fetched)],
      "squares": [tile_of() for _ in range(squares)],
      "slot": [tile_of() for _ in range(p.parts)],
      "of_values": plgpu.Barrier(num_arrivals=fetched),
      "of_squares": plgpu.Barrier(num_arrivals=max(squares, 1)),
    } | shared.scratch(1)
    kernel = functools.partial(_compared_kernel, shared=shared, pairs=pairs)
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
  at_once = len(_compared(f)[0])
  compared = (len(f.cols) + at_once + len(f.cols) * at_once) * f.channel
  # Sums in shared memory: more of them than registers hold, or what leaves from there.
  large = bool(f.corrects) or dtype == jnp.float32
  summed = f.inputs * large + f.decays * f.channel
  # As much as fits: with a low-rank erase decays stay in global memory.
  fits = f.channel and not f.corrects and (p.parts == 1 or len(f.decays) == 1)
  shared = Shared(
    decays=tuple(f.decays) if fits else (),
    numbers=tuple(n for n in ("start", "erase_start", "end", "beta") if n in arrays),
    middles=middle_rows(p) if f.channel else (),
  )
  copies = (len(f.inputs) + len(f.pairs)) * p.parts
  met = [
    len({x[-1] for x in rows} | {x[-1] for x in cols}) + len(_states_of(rows, cols, keeps))
    for rows, cols in _met(f)
  ]
  small = len(f.inputs) + len(f.pairs) + max(compared, *met)
  # Rows are so long that eight of them, and four threads of each, meet all banks.
  exact = plgpu.SMEM((len(summed), CHUNK, _BLOCK + 8), jnp.float32)
  scratch = {"exact": exact} if summed else {}
  scratch |= {
    "pool": tile_of(small * p.parts),
    "of_inputs": plgpu.Barrier(num_arrivals=copies),
    "of_states": [plgpu.Barrier(num_arrivals=n * p.parts) for n in met],
  } | shared.scratch(1)
  inputs = some(
    (*f.values, "S", "D", "before", "start", "erase_start", "end", "own", "G", "G_row", "beta")
  )
  inputs["zero"] = jnp.zeros(1, jnp.int32)
  inputs |= squares | {name: parts_in_xla(arrays[name], p.parts) for name in f.inputs}
  kernel = functools.partial(_channels_kernel, shared=shared, summed=summed)
  of_channels = call(kernel, "channels", {"head_block": p.Hv * blocks}, inputs, outs, scratch)
  for name in names:
    x = jnp.sum(of_channels[name], axis=0)
    of_channels[name] = got.pop(name) + x if name in got else x
  return got | of_channels
