"""What is local to a chunk of the recurrence on a GPU, for all chunks at once: a Pallas Mosaic GPU kernel for Hopper.

A program computes, for one chunk of one head, the operands that ``gpu_scan.py`` walks with, as ``xla.local`` defines
them, and inverts the triangular system of an erase. Inputs are read in tiles of 64 x 64 straight into registers; what
tensor cores multiply goes through shared memory.

Tokens are compared under a decay a channel in blocks: the second half of a block with the first through the decay at
its middle, and small blocks on the diagonal through theirs, where factors may exceed one but not the range of a number
(``tpu_chunk.py`` has the same, and its bounds on a decay).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.linear_recurrence.gpu_scan import (
  CHUNK,
  Plan,
  parts,
  products,
  put,
  square,
  tiles,
  transposed,
  wide,
)

# As many as a program reads, or more.
ZEROS = np.zeros(64, np.int32)
# Tokens of the blocks on the diagonal, and the smallest decay of a channel, by parts of an operand.
_BASES = {1: (16, -10.0), 2: (8, -20.0)}
# Parts of the operands of a triangular inverse: 16 bits, or 24 where inputs have more than 8.
_INVERSE_PARTS = {1: 2, 2: 3}
_TILE = (CHUNK, 64)
_WGMMA = plgpu.Layout.WGMMA


def smallest_decay(p: Plan) -> float:
  """Log decays of a channel are taken for no less than this."""
  return _BASES[p.parts][1]


def _levels(p: Plan) -> list[int]:
  base = _BASES[p.parts][0]
  return [base, *(h for h in (8, 16, 32) if h >= base)]


def _iota(axis: int) -> Array:
  return plgpu.broadcasted_iota(jnp.int32, _TILE, axis, layout=_WGMMA)


def _block(axis: int, h: int, zero: Array | int = 0) -> Array:
  """Which block of h, a power of two, a row or column is in."""
  return lax.shift_right_logical(_iota(axis) + zero, jnp.int32(h.bit_length() - 1))


def within(h: int) -> Array:
  """Where row and column are of one block of h."""
  return _block(0, h) == _block(1, h)


def halves(h: int) -> Array:
  """Where they are of two blocks of h that are halves of one."""
  return (_block(0, h) != _block(1, h)) & within(2 * h)


def _load(ref) -> Array:
  return plgpu.load(ref, layout=_WGMMA, optimized=False).astype(jnp.float32)


def _of_rows(ref) -> Array:
  x = plgpu.load(ref, layout=_WGMMA.reduce(1), optimized=False)
  return plgpu.layout_cast(lax.broadcast_in_dim(x, _TILE, [0]), _WGMMA)


def _of_columns(ref) -> Array:
  x = plgpu.load(ref, layout=_WGMMA.reduce(0), optimized=False)
  return plgpu.layout_cast(lax.broadcast_in_dim(x, _TILE, [1]), _WGMMA)


class _Chunk:
  """One program: what it reads and writes, by name, in tiles."""

  def __init__(self, p: Plan, refs: dict, outs: dict, heads: int, head: Array | None = None):
    self.p, self.refs, self.outs = p, refs, outs
    batch, n = (lax.axis_index(name) for name in ("batch", "chunk"))
    self.head = lax.axis_index("head") if head is None else head
    self.chunk = batch * p.chunks + n
    self.here = (batch * p.Hv + self.head) * p.chunks + n
    self.ratio = p.Hv // heads
    self._zeros = 0

  def zero(self) -> Array | int:
    """0; where operands are many, another one at each call, which no compiler knows: it is read from ``ZEROS``.

    What is added to it, addresses of shared memory above all, is computed where it is needed. Kept from use to use,
    such numbers were up to two thirds of all registers, which a low-rank erase, and two parts of each operand, do not
    leave room for.
    """
    if self.p.parts == 1 and self.p.erase != "low_rank":
      return 0
    self._zeros += 1
    return self.refs["zeros"][self._zeros - 1]

  def tile(self, name: str, i: int | Array, row: int | Array | None = None) -> Array:
    """Tile i of 64 channels of this head; of one row of it in all rows, if given."""
    head = lax.div(self.head, self.ratio) if name in ("q", "k") else self.head
    columns = pl.ds(head * self.p.K + 64 * i, 64)
    if row is None:
      return _load(self.refs[name].at[self.chunk, :, columns])
    return _of_columns(self.refs[name].at[self.chunk, row, columns])

  def rows(self, name: str) -> Array | None:
    """A number a token and head, of a tile's rows."""
    return _of_rows(self.refs[name].at[self.here]) if name in self.refs else None

  def columns(self, name: str) -> Array:
    return _of_columns(self.refs[name].at[self.here])

  def store(self, name: str, x: Array, i: int | Array = 0) -> None:
    for j, part in enumerate(parts(x, self.p.parts)):
      self.outs[name][j][self.here, :, pl.ds(64 * i, 64)] = part


def _times(x: Array, factor: Array | None) -> Array:
  return x if factor is None else x * factor


def _middles(c: _Chunk, h: int, i: int | Array, near: bool) -> Array:
  """Of each row's block, the decay at its middle: of ``h`` rows, if ``near``, else of ``2 h``."""
  size = h if near else 2 * h
  block = lax.div(_iota(0), size)

  def select(b, middle):
    return jnp.where(block == b, c.tile("G", i, b * size + size // 2 - 1), middle)

  # A loop, so that no more than one of them takes registers.
  return lax.fori_loop(1, CHUNK // size, select, c.tile("G", i, size // 2 - 1))


def _compare(c: _Chunk, name: str, decay: str, col: str, pool) -> Array:
  """Products of what has a name with ``col`` under the decay between them, or without one a channel plain products.

  What lies above the diagonal means nothing. ``decay``: the name of the rows' cumulative decay.
  """
  count, n = c.p.K // 64, c.p.parts
  channel = "G" in c.refs
  out = None
  for level, h in enumerate(_levels(c.p) if channel else [0]):
    near = level == 0
    zero = c.zero()

    def rows(i, zero=zero):
      return [pool.at[zero + 2 * n * i + j] for j in range(n)]

    def columns(i, zero=zero):
      return [pool.at[zero + 2 * n * i + n + j] for j in range(n)]

    def factor(decay, sign, i, h=h, near=near):
      if not channel:
        return None
      difference = sign * (c.tile(decay, i) - _middles(c, h, i, near))
      return jnp.exp(difference if near else jnp.minimum(difference, 0.0))

    @pl.loop(0, count)
    def _(i, factor=factor, rows=rows, columns=columns):
      put(rows(i), _times(c.tile(name, i), factor(decay, 1.0, i)))
      put(columns(i), _times(c.tile(col, i), factor("G", -1.0, i)))

    plgpu.commit_smem()
    z = products(_TILE, *[(rows(i), transposed(columns(i))) for i in range(count)])
    # What is farther apart is another level's, which comes later.
    out = z if near else jnp.where(_block(0, h, zero) != _block(1, h), z, out)
    plgpu.commit_smem()  # all warps are done with what was multiplied
  return out


def _inverse(L: Array, x_refs, l_refs, z_refs) -> Array:
  """``(I + L)^-1``; see ``triangular.py``: blocks are joined two by two, by products in bfloat16 parts."""
  put(l_refs, L)
  X = jnp.where(within(1), 1.0, 0.0)
  h = 1
  while h < CHUNK:
    joint = halves(h)  # with nothing above the diagonal
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


def _kernel(p: Plan, tree, heads, undecayed, gradients, *refs, pool, inverse=()):
  c = _Chunk(p, *jax.tree.unflatten(tree, refs), heads)
  bonus = "own" in c.refs
  channel, scalar = "G" in c.refs, "G_row" in c.refs
  erases, corrects = {"none": (None, None), "key": ("k", None)}.get(p.erase, ("b", "a"))
  reads = "before" if bonus else "G"
  erase_reads = "before" if undecayed else "G"
  rows = [("q", reads)] + ([(erases, erase_reads)] if erases else [])
  cols = ["k"] + ([corrects] if corrects else [])

  row, col = _iota(0), _iota(1)
  same = row >= 0
  if "runs" in c.refs:
    same = c.rows("runs") == c.columns("runs_column")
  masks = [(row > col if bonus else row >= col) & same, (row > col) & same]
  # One after the other: more at once is more than registers hold.
  results = {("q", "k"): "scores", ("q", corrects): "corrected", (erases, "k"): "removed"}
  for (name, decay), mask in zip(rows, masks, strict=False):
    for other in cols:
      z = _compare(c, name, decay, other, pool)
      if scalar:
        z = z * jnp.exp(jnp.minimum(c.rows(f"{decay}_row") - c.columns("G_column"), 0.0))
      z = jnp.where(mask, z, 0.0)
      if bonus:
        z = z + jnp.where(row == col, c.rows("own"), 0.0)
      if name == "q" or other != cols[-1]:
        c.store(results[name, other], z)

  if erases:
    size = len(inverse) // 3
    refs = [inverse[i * size : (i + 1) * size] for i in range(3)]
    if gradients:
      c.store("erasing", z)
    X = _inverse(-z if corrects else z * c.rows("beta"), *refs)
    if p.erase == "key" and not gradients:
      X = X * c.columns("beta_column")
    c.store("inverse", X)

  def outputs(i):
    end = c.rows("end")
    if channel:
      end = _times(jnp.exp(c.tile("G", i, CHUNK - 1) - c.tile("G", i)), end)
    c.store("writes", _times(c.tile("k", i), end), i)
    if corrects:
      c.store("corrections", _times(c.tile(corrects, i), end), i)

    def from_state(name, decay, start):
      x = c.tile(name, i)
      return _times(x * jnp.exp(c.tile(decay, i)) if channel else x, c.rows(start))

    c.store("q", from_state("q", reads, "start"), i)
    if erases:
      erased = from_state(erases, erase_reads, "erase_start")
      if p.erase == "key":
        erased = -erased * c.rows("beta") if gradients else -erased
      c.store("erased", erased, i)

  if channel:
    pl.loop(0, p.K // 64)(outputs)
  else:
    for i in range(p.K // 64):
      outputs(i)


def operands(
  p: Plan,
  arrays: dict[str, Array],
  heads: int,
  undecayed: bool,
  interpret,
  *,
  gradients: bool = False,
) -> dict[str, list[Array]]:
  """Operands of ``gpu_scan`` by name.

  For ``gradients`` a key erase's beta is no part of ``inverse`` but of ``erased``, and there is ``erasing``: erase keys
  with what an erase writes along.

  Args:
    arrays: ``q``, ``k``, ``a``, ``b`` [B * N, C, heads * K]; with a decay a channel ``G``, and ``before`` where it is
      read, likewise; a number a token and head [B * Hv * N, C]: with another decay ``G_row``, ``before_row``; ``beta``;
      ``own``, what a bonus adds to the diagonal; ``start``, ``erase_start``, ``end``: factors of what reads the state
      and what writes the next; ``runs``.
    heads: of q and k.
    undecayed: whether an erase reads the state before a token's decay.
  """
  outs, erases = {}, p.erase != "none"
  for name in (*wide(p.erase), *square(p.erase), *(["erasing"] if gradients and erases else [])):
    shape = p.heads * p.chunks, CHUNK, p.K if name in wide(p.erase) else CHUNK
    outs[name] = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * p.parts
  arrays = arrays | {"zeros": jnp.asarray(ZEROS)}
  tree = jax.tree.structure((arrays, outs))

  def tile(count=None):
    shape = _TILE if count is None else (count, *_TILE)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiles(128))

  scratch = {"pool": tile(2 * p.parts * (p.K // 64))}
  if erases:
    scratch["inverse"] = [tile() for _ in range(3 * _INVERSE_PARTS[p.parts])]
  flat = plgpu.kernel(
    functools.partial(_kernel, p, tree, heads, undecayed, gradients),
    out_type=jax.tree.leaves(outs),
    grid=(p.B, p.chunks, p.Hv),
    grid_names=("batch", "chunk", "head"),
    scratch_types=scratch,
    kernel_name="linear_recurrence_chunk",
    interpret=interpret,
  )(*jax.tree.leaves(arrays))
  return jax.tree.unflatten(jax.tree.structure(outs), flat)
