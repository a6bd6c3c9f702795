"""What is local to a chunk of the recurrence on a GPU, for all chunks at once: a Pallas Mosaic GPU kernel for Hopper.

A program computes, for one chunk of one head, the operands that ``gpu_scan.py`` walks with, as ``xla.local`` defines
them, and inverts the triangular system of an erase. What it reads, tiles of 64 x 64 and numbers a token, comes to
shared memory in bulk copies, all begun at once (but for what does not fit: float32 inputs, decays of many channels),
and what it writes leaves so. Outputs are staged in the tiles of operands; the inverse is computed in those of inputs.

Tokens are compared under a decay a channel in blocks: the second half of a block with the first through the decay at
its middle, and small blocks on the diagonal through theirs, where factors may exceed one but not the range of a number
(``tpu_chunk.py`` has the same, and its bounds on a decay).
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.linear_recurrence.gpu_scan import (
  CHUNK,
  SMEM,
  Plan,
  joined,
  multiply,
  products,
  put,
  tiles,
  transposed,
  wide,
)

# Tokens of the blocks on the diagonal, and the smallest decay of a channel, by parts of an operand.
_BASES = {1: (16, -10.0), 2: (8, -20.0)}
# Parts of the operands of a triangular inverse: 16 bits, or 24 where inputs have more than 8.
_INVERSE_PARTS = {1: 2, 2: 3}
# Of a token and head; those of columns are the same numbers once more.
_NUMBERS = (
  *("G_row", "G_column", "before_row", "start", "erase_start", "end"),
  *("beta", "own", "runs", "runs_column"),
)
# What tokens are to tokens takes these alone.
_OF_PAIRS = ("G_row", "G_column", "before_row", "own", "runs", "runs_column")
_TILE = (CHUNK, 64)
_WGMMA = plgpu.Layout.WGMMA


def base(p: Plan) -> int:
  """Tokens of the blocks on the diagonal."""
  return _BASES[p.parts][0]


def smallest_decay(p: Plan) -> float:
  """Log decays of a channel are taken for no less than this."""
  return _BASES[p.parts][1]


def approximate(p: Plan) -> plgpu.CompilerParams:
  """The processor's own exponentials, of 22 bits, for operands of 8."""
  return plgpu.CompilerParams(approx_math=p.parts == 1)


def levels(p: Plan) -> int:
  """At how many tokens are compared: within blocks of the base, then halves of blocks twice as large, up to a chunk."""
  return (CHUNK // base(p)).bit_length()


def _iota(axis: int) -> Array:
  return plgpu.broadcasted_iota(jnp.int32, _TILE, axis, layout=_WGMMA)


def of_one_block(h: int, zero: Array | int = 0) -> Array:
  """Where row and column are of one block of h, a power of two, on the diagonal."""
  return (((_iota(0) + zero) ^ _iota(1)) & -h) == 0


def of_halves(h: int | Array, zero: Array | int = 0) -> Array:
  """Where row and column are of two halves of h, a power of two, of one block on the diagonal."""
  h = jnp.broadcast_to(jnp.int32(h), _TILE)
  return (((_iota(0) + zero) ^ _iota(1)) & -h) == h


def half_of(p: Plan, level: Array) -> Array:
  """Tokens of the halves that are compared at a level from 1."""
  return lax.shift_left(jnp.int32(base(p) // 2), level)


def _spread(x: Array, axis: int) -> Array:
  """A number of each row (axis 0) or column (1), in all of a tile."""
  return plgpu.layout_cast(lax.broadcast_in_dim(x, _TILE, [axis]), _WGMMA)


def tile_of(*count: int, dtype=jnp.bfloat16):
  """Shared memory of so many tiles, as tensor cores and bulk copies want them."""
  return plgpu.SMEM((*count, *_TILE), dtype, transforms=tiles(128, dtype))


@dataclasses.dataclass(frozen=True)
class Shared:
  """What a program has in shared memory from the start, by name.

  Attributes:
    inputs: tiles of all key channels of a head, as the products take them.
    decays: likewise, in float32.
    numbers: of a token and head.
    middles: rows of ``G`` that tokens are compared through (``middle_rows``).
  """

  inputs: tuple[str, ...] = ()
  decays: tuple[str, ...] = ()
  numbers: tuple[str, ...] = ()
  middles: tuple[int, ...] = ()

  def scratch(self, blocks: int) -> dict:
    """Memory of ``blocks`` tiles each, but for the tiles of ``inputs``; and the barrier that ``_Chunk.fetch`` takes."""
    out: dict = {}
    if self.decays:
      out["decays"] = tile_of(len(self.decays) * blocks, dtype=jnp.float32)
    if self.numbers:
      out["numbers"] = plgpu.SMEM((len(self.numbers), CHUNK), jnp.float32)
    if self.middles:
      out["middles"] = plgpu.SMEM((len(self.middles), 64 * blocks), jnp.float32)
    if copies := self.copies(blocks):
      out["ready"] = plgpu.Barrier(num_arrivals=copies)
    return out

  def copies(self, blocks: int) -> int:
    return (len(self.inputs) + len(self.decays)) * blocks + len(self.numbers) + len(self.middles)


class _Chunk:
  """One program: what it reads and writes, by name, in tiles.

  Args:
    heads: of q and k; ``head``: of values.
    shared, memory: what is in shared memory, and that memory: ``tiles`` of inputs, and ``Shared.scratch``.
    first: the block of 64 key channels that it begins with there; all of them follow, or this one alone if given.
    slots: tiles that leave for global memory from there, each a list of parts.
    anew: computes addresses anew, and reads again what is in shared memory: registers are short.
  """

  def __init__(
    self, p: Plan, refs: dict, outs: dict, heads: int, *, head=None, shared=None, memory=None, first=None, slots=(),
    anew=False,
  ):  # fmt: skip
    self.p, self.refs, self.outs = p, refs, outs
    batch, n = (lax.axis_index(name) for name in ("batch", "chunk"))
    self.head = lax.axis_index("head") if head is None else head
    self.chunk = batch * p.chunks + n
    self.here = (batch * p.Hv + self.head) * p.chunks + n
    self.ratio = p.Hv // heads
    self.anew, self._zeros, self._unknown = anew, 0, refs["zero"][0] if anew else 0
    self.shared, self._memory = shared or Shared(), memory or {}
    self._first, self._blocks = (0, p.K // 64) if first is None else (first, 1)
    self._slots, self._staged = slots, 0
    self._sent: list = []

  def zero(self) -> Array | int:
    """0; where ``anew``, another one at each call, and no compiler knows.

    What is added to it, addresses of shared memory above all, is computed where it is needed, and what is read there is
    read again. Kept from use to use, such numbers were up to two thirds of all registers.
    """
    if not self.anew:
      return 0
    self._zeros += 1
    return lax.shift_right_logical(self._unknown + self._zeros, jnp.int32(30))

  @contextlib.contextmanager
  def step(self, n: Array) -> Iterator[None]:
    """Inside, what ``zero`` gives is of step n of a loop: the compiler would compute it before the loop, for all."""
    before = self._unknown
    self._unknown = before + n
    yield
    self._unknown = before

  # --- what it reads ---

  def _source(self, name: str, rows, i: int | Array, count: int = 1):
    """Of ``count`` blocks of 64 channels of this head."""
    head = lax.div(self.head, self.ratio) if name in ("q", "k") else self.head
    columns = pl.ds(head * self.p.K + 64 * i, 64 * count)
    return self.refs[name].at[self.chunk + self.zero(), rows, columns]

  def fetch(self, ready) -> None:
    """Brings what is shared, if anything; ``ready`` expects ``Shared.copies``."""
    if not self.shared.copies(self._blocks):
      return
    tiles = [(n, self._memory["tiles"], at) for at, n in enumerate(self.shared.inputs)]
    tiles += [(n, self._memory["decays"], at) for at, n in enumerate(self.shared.decays)]
    for name, memory, at in tiles:
      for j in range(self._blocks):
        source = self._source(name, slice(None), self._first + j)
        plgpu.copy_gmem_to_smem(source, memory.at[at * self._blocks + j], ready)
    for at, name in enumerate(self.shared.numbers):
      plgpu.copy_gmem_to_smem(self.refs[name].at[self.here], self._memory["numbers"].at[at], ready)
    for at, row in enumerate(self.shared.middles):
      source = self._source("G", row, self._first, self._blocks)
      plgpu.copy_gmem_to_smem(source, self._memory["middles"].at[at], ready)
    plgpu.barrier_wait(ready)

  def held(self, name: str, i: int | Array):
    """Where tile i of an input is in shared memory."""
    at = self.shared.inputs.index(name) * self._blocks
    return self._memory["tiles"].at[at + i + self.zero()]

  def tile(self, name: str, i: int | Array) -> Array:
    """Tile i of 64 channels of this head."""
    if name in self.shared.inputs:
      return self.held(name, i)[...].astype(jnp.float32)
    if name in self.shared.decays:
      at = self.shared.decays.index(name) * self._blocks
      return self._memory["decays"].at[at + i + self.zero()][...]
    source = self._source(name, slice(None), self._first + i)
    return plgpu.load(source, layout=_WGMMA, optimized=False).astype(jnp.float32)

  def middle(self, at: int | Array, i: int | Array) -> Array:
    """Of ``middle_rows``, tile i of one, in all rows."""
    source = self._memory["middles"].at[at + self.zero(), pl.ds(64 * i, 64)]
    return _spread(plgpu.load(source, layout=_WGMMA.reduce(0), optimized=False), 1)

  def last(self, i: int | Array) -> Array:
    """Tile i of the last row of ``G``, in all rows."""
    return self.middle(len(self.shared.middles) - 1, i)

  def _numbers(self, name: str, layout) -> Array:
    if name in self.shared.numbers:
      source = self._memory["numbers"].at[self.shared.numbers.index(name)]
    else:
      source = self.refs[name].at[self.here]
    return plgpu.load(source, layout=layout, optimized=False)

  def rows(self, name: str) -> Array | None:
    """A number a token and head, of a tile's rows."""
    return _spread(self._numbers(name, _WGMMA.reduce(1)), 0) if name in self.refs else None

  def columns(self, name: str) -> Array:
    return _spread(self._numbers(name, _WGMMA.reduce(0)), 1)

  # --- what it writes ---

  def stage(self, name: str, x: Array, i: int | Array = 0) -> None:
    """Puts tile i of an output where ``send`` takes it from."""
    slot = self._slots[self._staged]
    put(slot, x)
    self._sent += zip(slot, self.outs[name], [i] * len(slot), strict=True)
    self._staged += 1

  def send(self) -> None:
    """Copies to global memory what is staged."""
    plgpu.commit_smem()
    for ref, out, i in self._sent:
      plgpu.copy_smem_to_gmem(ref, out.at[self.here, :, pl.ds(64 * i, 64)])
    self._sent = []

  def free(self) -> None:
    """Waits until what was sent has left shared memory, for all threads."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    self._staged = 0


def _times(x: Array, factor: Array | None) -> Array:
  return x if factor is None else x * factor


def middle_rows(p: Plan) -> tuple[int, ...]:
  """The middles of a level's blocks, level by level, the smallest blocks first. And the last row."""
  sizes = [base(p) << level for level in range(levels(p))]
  return *(row + n // 2 - 1 for n in sizes for row in range(0, CHUNK, n)), CHUNK - 1


def _middle(c: _Chunk, level: int | Array, i: int | Array) -> Array:
  """Of the block of a level that a row is in, in all rows."""
  smallest = base(c.p) if isinstance(level, int) else 2 * base(c.p)
  blocks = 2 * (CHUNK // base(c.p))  # of all levels, and one
  first = blocks - lax.shift_right_logical(jnp.int32(blocks), jnp.int32(level))
  out, row = c.middle(first, i), _iota(0)
  for start in range(smallest, CHUNK, smallest):
    block = lax.shift_right_logical(jnp.int32(start // base(c.p)), jnp.int32(level))
    out = jnp.where(row >= start, c.middle(first + block, i), out)
  return out


def exponents(c: _Chunk, level: int | Array, i: int | Array, decays) -> dict[str, Array]:
  """Logarithms of what rows that are compared at a level are multiplied with, in tile i of channels, by decay.

  Within blocks on the diagonal, at level 0, through the decay at their middle: above zero on its other side, and what
  columns have is the opposite of "G". At other levels of a token of a block's second half the decay from its middle,
  and of one of the first half, which is a column, that to there: what columns have is "G".
  """
  middle = _middle(c, level, i)
  out = {d: c.tile(d, i) - middle for d in sorted({"G", *decays})}
  if isinstance(level, int):
    return out
  return {d: jnp.minimum(x, -x if d == "G" else 0.0) for d, x in out.items()}


def sums(count: int, steps, products_of, start=None):
  """``count`` sums of products over steps, kept where tensor cores add to them; and what a step carries on.

  ``products_of(step, carry)`` returns pairs of operands for each sum, and a function that gives the next carry.
  """

  def run(*totals):
    def step(j, carry):
      pairs, then = products_of(j, carry)
      for acc, of_sum in zip(totals, pairs, strict=True):
        multiply(acc, of_sum)
      carry = then()
      plgpu.wgmma_wait(0)
      plgpu.commit_smem()  # all warps are done with what was multiplied
      return carry

    carry = lax.fori_loop(0, steps, step, start)
    return tuple(acc[...] for acc in totals), carry

  return pl.run_scoped(run, *[plgpu.ACC(_TILE, jnp.float32)] * count)


def _compare(c: _Chunk, rows, cols: list[str], pool, kept) -> Callable[[tuple[str, str]], Array]:
  """Products of ``rows``, (name, that of their decay), with columns, under the decay between them, by pair of names.

  Without a decay a channel plain products. What lies above the diagonal means nothing. ``kept``: places in shared
  memory for results that are rounded anyway; all at once would be more than registers hold.
  """
  count, channel = c.p.K // 64, "G" in c.refs
  pairs = [(name, other) for name, _ in rows for other in cols]
  if not channel and c.shared.inputs:  # when asked for: two at once would take more registers
    return lambda pair: products(
      _TILE, *[([c.held(pair[0], i)], [c.held(pair[1], i).T]) for i in range(count)]
    )
  decays = {name: decay if channel else "G" for name, decay in rows}

  def of_tiles(level):
    """The pairs' products at a level of decays a channel."""
    column = "column" if channel and isinstance(level, int) else "G"

    def put_tiles(i):
      zero = c.zero()
      free = itertools.batched([pool.at[zero + n] for n in range(pool.shape[0])], c.p.parts)
      places: dict = {}

      def place(names):
        """Puts vectors by name with a decay, or as a "column", where they are multiplied."""
        logs = exponents(c, level, i, decays.values()) if channel else {}
        logs |= {"column": -logs["G"]} if channel else {}
        for name, which in names:
          if (name, which) not in places:
            places[name, which] = refs = list(next(free))
            put(refs, _times(c.tile(name, i), jnp.exp(logs[which]) if channel else None))

      of_columns, of_rows = [(name, column) for name in cols], list(decays.items())
      for names in [of_columns, of_rows] if c.anew else [of_columns + of_rows]:
        place(names)
      plgpu.commit_smem()
      met = [[(places[x, decays[x]], transposed(places[y, column]))] for x, y in pairs]
      return met, lambda: None

    def operands(i, _):
      with c.step(i):
        return put_tiles(i)

    return dict(zip(pairs, sums(len(pairs), count, operands)[0], strict=True))

  z = of_tiles(0)
  if not channel:
    return z.__getitem__
  here = of_one_block(base(c.p), c.zero())
  z = {pair: jnp.where(here, x, 0.0) for pair, x in z.items()}
  for pair, refs in kept.items():
    put(refs, z.pop(pair))

  def step(level, held):
    with c.step(level):
      z, here = of_tiles(level), of_halves(half_of(c.p, level), c.zero())
    for pair, refs in kept.items():
      put(refs, jnp.where(here, z[pair], joined(refs)))
    return {pair: jnp.where(here, z[pair], x) for pair, x in held.items()}

  out = lax.fori_loop(1, levels(c.p), step, z)
  return (out | {pair: joined(refs) for pair, refs in kept.items()}).__getitem__


def _inverse(L: Array, x_refs, l_refs, z_refs) -> Array:
  """``(I + L)^-1``; see ``triangular.py``: blocks are joined two by two, by products in bfloat16 parts."""
  put(l_refs, L)
  X = jnp.where(_iota(0) == _iota(1), 1.0, 0.0)
  h = 1
  while h < CHUNK:
    # Of two blocks that are halves of one. There is nothing above the diagonal.
    joint = of_halves(h)
    if h == 1:
      X = X - jnp.where(joint, L, 0.0)
    else:
      put(x_refs, X)
      plgpu.commit_smem()
      put(z_refs, jnp.where(joint, products(_TILE, (x_refs, l_refs)), 0.0))
      plgpu.commit_smem()
      X = X - products(_TILE, (z_refs, x_refs))
      plgpu.commit_smem()
    h *= 2
  return X


def _kernel(
  p: Plan, tree, heads, undecayed, bonus, shared, count, *refs, tiles, ready=None, **memory
):
  """``count``: tiles that comparisons take, after those of inputs; outputs leave from there, too."""
  own = len(shared.inputs) * (p.K // 64)
  slots = [[tiles.at[own + n + j] for j in range(p.parts)] for n in range(0, count, p.parts)]
  refs, outs = jax.tree.unflatten(tree, refs)
  c = _Chunk(p, refs, outs, heads, shared=shared, memory=memory | {"tiles": tiles}, slots=slots,
             anew=p.parts > 1 or p.erase == "low_rank")  # fmt: skip
  pool = tiles.at[pl.ds(own, count)]
  channel, scalar = "G" in c.refs, "G_row" in c.refs
  erases, corrects = {"none": (None, None), "key": ("k", None)}.get(p.erase, ("b", "a"))
  reads = "before" if bonus else "G"
  erase_reads = "before" if undecayed else "G"
  rows = [("q", reads)] + ([(erases, erase_reads)] if erases else [])
  cols = ["k"] + ([corrects] if corrects else [])
  c.fetch(ready)

  row, col = _iota(0), _iota(1)

  def seen(name):
    """The columns of rows; not computed before it is needed, for it takes registers."""
    mask = row >= col if name == "q" and not bonus else row > col
    return mask & (c.rows("runs") == c.columns("runs_column")) if "runs" in c.refs else mask

  results = {("q", "k"): "scores", ("q", corrects): "corrected", (erases, "k"): "removed"}
  erasing = (erases, cols[-1])
  # Four comparisons at once are more than registers hold.
  groups = [[x] for x in rows] if corrects else [rows]
  for some in groups if "scores" in outs else []:
    pairs = [(name, other) for (name, _), other in itertools.product(some, cols)]
    kept = dict(
      zip([x for x in pairs if x != erasing], slots[len(some) + len(cols) :], strict=False)
    )
    compared = _compare(c, some, cols, pool, kept)
    c.free()
    for name, other in pairs:
      z, decay = compared((name, other)), dict(rows)[name]
      if scalar:
        z = z * jnp.exp(jnp.minimum(c.rows(f"{decay}_row") - c.columns("G_column"), 0.0))
      z = jnp.where(seen(name), z, 0.0)
      if bonus:
        z = z + jnp.where(row == col, c.rows("own"), 0.0)
      if (name, other) != erasing:
        c.stage(results[name, other], z)
      elif "erasing" in outs:
        c.stage("erasing", z)
    c.send()

  def outputs(i):
    c.free()
    end, G = c.rows("end"), None
    if channel:
      G = c.tile("G", i)
      end = _times(jnp.exp(c.last(i) - G), end)
    c.stage("writes", _times(c.tile("k", i), end), i)
    if corrects:
      c.stage("corrections", _times(c.tile(corrects, i), end), i)

    def from_state(name, decay, start):
      x = c.tile(name, i)
      if channel:
        x = x * jnp.exp(G if decay == "G" else c.tile(decay, i))
      return _times(x, c.rows(start))

    c.stage("q", from_state("q", reads, "start"), i)
    if erases:
      erased = from_state(erases, erase_reads, "erase_start")
      if p.erase == "key":
        erased = -erased * c.rows("beta")
      c.stage("erased", erased, i)
    c.send()

  if channel:

    @pl.loop(0, p.K // 64)
    def _(i):
      with c.step(i):
        outputs(i)

  else:
    for i in range(p.K // 64):
      outputs(i)
  if "inverse" in outs:
    c.free()
    plgpu.commit_smem()  # all warps are done with inputs
    size = _INVERSE_PARTS[p.parts]
    places = [[tiles.at[n * size + j] for j in range(size)] for n in range(3)]
    X = _inverse(-z if corrects else z * c.rows("beta"), *places)
    c.stage("inverse", X)
    c.send()
  plgpu.wait_smem_to_gmem(0)


def _shared(p: Plan, arrays: dict, compares: bool, tiles: int, spare: int) -> Shared:
  """As much as fits beside ``tiles`` that are no inputs'; more where inputs' tiles serve again, ``spare`` of them."""
  blocks, channel = p.K // 64, "G" in arrays
  numbers = tuple(n for n in _NUMBERS if n in arrays)
  middles = () if not channel else middle_rows(p) if compares else (CHUNK - 1,)
  left = SMEM - 4 * (len(numbers) * CHUNK + len(middles) * p.K) - 1024
  size = CHUNK * 64 * blocks
  inputs = tuple(n for n in ("q", "k", "a", "b") if n in arrays) if p.parts == 1 else ()
  left -= max(2 * size * len(inputs) + 2 * CHUNK * 64 * tiles, 2 * CHUNK * 64 * spare)
  decays = []
  for name in ("G", "before"):
    if name in arrays and 4 * size <= left:
      decays.append(name)
      left -= 4 * size
  return Shared(inputs, tuple(decays), numbers, middles)


def operands(
  p: Plan,
  arrays: dict[str, Array],
  heads: int,
  undecayed: bool,
  names: tuple[str, ...],
  interpret,
) -> dict[str, list[Array]]:
  """Operands of ``gpu_scan`` by name, those of ``names``: all ``wide`` ones, and all that are ``square`` or none.

  And ``erasing``, for gradients: erase keys with what an erase writes along.

  Args:
    arrays: ``q``, ``k``, ``a``, ``b`` [B * N, C, heads * K]; with a decay a channel ``G``, and ``before`` where it is
      read, likewise; a number a token and head [B * Hv * N, C]: with another decay ``G_row``, ``before_row``; ``beta``;
      ``own``, what a bonus adds to the diagonal; ``start``, ``erase_start``, ``end``: factors of what reads the state
      and what writes the next; ``runs``.
    heads: of q and k.
    undecayed: whether an erase reads the state before a token's decay.
  """
  outs, compares, erases = {}, "scores" in names, p.erase != "none"
  for name in names:
    shape = p.heads * p.chunks, CHUNK, p.K if name in wide(p.erase) else CHUNK
    outs[name] = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * p.parts
  # A comparison's operands, and what leaves at once.
  compared = {"none": 3, "key": 4, "low_rank": 5}[p.erase] if "G" in arrays else 3
  count = p.parts * max(compared if compares else 1, len(wide(p.erase)))
  inverse = 3 * _INVERSE_PARTS[p.parts] if compares and erases else 0
  bonus = "own" in arrays
  if not compares:
    arrays = {name: x for name, x in arrays.items() if name not in _OF_PAIRS}
  shared = _shared(p, arrays, compares, count, inverse)
  # A low-rank erase's vectors may be wider than queries.
  arrays = arrays | {name: arrays[name].astype(jnp.bfloat16) for name in shared.inputs}
  arrays["zero"] = jnp.zeros(1, jnp.int32)
  tree = jax.tree.structure((arrays, outs))
  all_tiles = max(len(shared.inputs) * (p.K // 64) + count, inverse)
  scratch = {"tiles": tile_of(all_tiles)} | shared.scratch(p.K // 64)
  flat = plgpu.kernel(
    functools.partial(_kernel, p, tree, heads, undecayed, bonus, shared, count),
    out_type=jax.tree.leaves(outs),
    grid=(p.B, p.chunks, p.Hv),
    grid_names=("batch", "chunk", "head"),
    scratch_types=scratch,
    compiler_params=approximate(p),
    kernel_name="linear_recurrence_chunk" if compares else "linear_recurrence_operands",
    interpret=interpret,
  )(*jax.tree.leaves(arrays))
  return jax.tree.unflatten(jax.tree.structure(outs), flat)
