"""Block-sparse attention to gathered blocks, those of some queries at a time: in plain jax.numpy, on any platform.

Memory is linear in Tq and Tk: the gathered blocks of one chunk of queries are all there is besides inputs and outputs.
The backward pass gathers again, and adds the gradients of gathered blocks to those of k and v where they came from.
Values that are channels of the keys are gathered, and their gradients added, with them. For few queries the chosen
rows alone are read.

What is made of gathered keys is a parameter: einsums here, and on TPUs kernels (``tpu_rows.py``), which
hold the logits that einsums write to memory.

Tokens that are chosen one by one are rows, not parts of tiles: DeepSeek-V3.2's 2048 of 65536 tokens, latents of 576
channels for 128 heads, are 2.4 MB and 0.6 GFLOP a query; in tiles of 16 tokens as much if 128 tiles hold them all, and
38 MB and 9.1 GFLOP if each is in a tile of its own.
"""

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.block_sparse.reference import Blocks

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def check(*args) -> None:
  """Serves every call."""


def few(q, k, blocks: Blocks) -> bool:
  """Whether queries have fewer keys to gather, of all their groups and blocks, than there are."""
  chosen = blocks.indices.shape[1] // k.shape[2] * blocks.indices.shape[3] * blocks.size
  return q.shape[1] * chosen <= k.shape[1]


@runtime_checkable
class Core(Protocol):
  """What is made of the keys and values of some queries, [B, Hkv, groups, rows, keys, D]: v None are the keys.

  Queries are [B, Hkv, groups, rows, heads of a group, D], masks [B, Hkv, groups, rows, 1, keys].
  """

  def forward(self, q, k, v, mask, scale: float) -> tuple[Array, Array]:
    """Outputs, and lse in float32 or more."""
    ...

  def backward(self, q, do, lse, delta, k, v, mask, scale: float):
    """The gradients of queries, and, in float32 or more, of keys and values (None: they are in the keys')."""
    ...


def forward(q, k, v, blocks: Blocks, scale: float):
  """As ``reference.forward``, without sinks and the keys of the window."""
  return attend(q, k, v, blocks, scale, Einsums())


def attend(q, k, v, blocks: Blocks, scale: float, core: Core):
  """``forward``, by any core."""
  width = v if isinstance(v, int) else None
  return _attend(q, k, None if width else v, blocks, scale, width, core)


def _product(dtype, subscripts: str, x: Array, y: Array) -> Array:
  """A product of the inputs' own precision, x being rounded to y's, with sums of ``dtype``."""
  return _einsum(subscripts, x.astype(y.dtype), y, preferred_element_type=dtype)


def _gather(x: Array, first: Array, size: int) -> Array:
  """``size`` rows of x [B, h, T, D] from each ``first`` [B, h, n] on: [B, h, n, size, D]."""
  rows = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, size), (None, 0))
  return jax.vmap(jax.vmap(rows))(x, first)


def _rows(x: Array, first: Array, size: int) -> Array:
  """``_gather`` from x [B, T, h, D] as it lies; past its end the last row."""
  rows = first[..., None] + jnp.arange(size)
  heads = jnp.arange(x.shape[2])[:, None, None]
  return jax.vmap(lambda x, rows: x.at[rows, heads].get(mode="clip"))(x, rows)


def _scatter_add(x: Array, first: Array, rows: Array) -> Array:
  """x [B, h, T, D] with rows [B, h, n, size, D] added where ``_gather`` took them from."""
  B, h, T, D = x.shape
  if rows.shape[3] == 1:
    # Rows by number, which TPUs sort and add up at once; of windows of a row XLA makes a loop with a turn for each.
    first = first + T * jnp.arange(B * h).reshape(B, h, 1)
    return x.reshape(-1, D).at[first.ravel()].add(rows.reshape(-1, D)).reshape(x.shape)
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
  )
  add = functools.partial(jax.lax.scatter_add, dimension_numbers=numbers)
  return jax.vmap(jax.vmap(lambda x, i, rows: add(x, i[:, None], rows)))(x, first, rows)


class _Chunks:
  """Queries in chunks: [chunks, B, Hkv, groups of a key head, queries, heads of a group, ...]; keys [B, Hkv, T, D].

  Args:
    v: None: the keys.
    once: nothing is added where it was gathered, so that few rows need no copy of all keys.
  """

  def __init__(self, q, k, v, blocks: Blocks, once: bool):
    (self.B, self.Tq, H, _), (_, self.Tk, self.Hkv, _) = q.shape, k.shape
    G, S = blocks.indices.shape[1], blocks.indices.shape[3]
    self.groups, self.heads, self.size = G // self.Hkv, H // G, blocks.size
    self.keys = S * blocks.size
    channels = k.shape[3] + (0 if v is None else v.shape[3])
    row = self.B * G * self.keys * channels * jnp.result_type(k).itemsize
    self.rows = min(self.Tq, dispatch.at_a_time(row))
    self.count = -(-self.Tq // self.rows)
    self.in_place = once and few(q, k, blocks)
    self.k, self.v = (x if x is None or self.in_place else self._padded_keys(x) for x in (k, v))
    indices = blocks.indices.reshape(self.B, self.Hkv, self.groups, -1, S)
    indices = jnp.repeat(indices, blocks.query_block, axis=3)[:, :, :, : self.Tq]
    layout = blocks.layout
    self.blocks = (
      self._cut(indices, 3, -1),
      self._cut(layout.starts, 1),
      self._cut(layout.positions, 0, -1),
    )
    self.window = blocks.window

  def _padded_keys(self, x):
    # A block at the end may reach past the last key.
    return jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, self.size - 1), (0, 0)))

  def _cut(self, x: Array, axis: int, fill=0) -> Array:
    """Whole chunks along the axis of queries, the chunks first."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, self.count * self.rows - self.Tq)
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(
      x.reshape(*x.shape[:axis], self.count, self.rows, *x.shape[axis + 1 :]), axis, 0
    )

  def queries(self, x: Array, fill=0) -> Array:
    """[B, Tq, H, ...] in chunks."""
    shape = (self.B, self.Tq, self.Hkv, self.groups, self.heads, *x.shape[3:])
    return self._cut(jnp.moveaxis(x.reshape(shape), 1, 3), 3, fill)

  def join(self, x: Array) -> Array:
    """The inverse of ``queries``."""
    x = jnp.moveaxis(x, (0, 4), (1, 2))
    x = x.reshape(self.B, self.count * self.rows, -1, *x.shape[6:])
    return x[:, : self.Tq]

  def first(self, blocks) -> Array:
    """The first key of each block of a chunk, 0 where there is none: [B, Hkv, groups * rows * S]."""
    indices, starts, _ = blocks
    first = starts[:, None, None, :, None] + indices * self.size
    first = jnp.where(indices >= 0, jnp.minimum(first, self.Tk - 1), 0)
    return first.reshape(self.B, self.Hkv, -1)

  def take(self, first: Array, dtype) -> tuple[Array, Array | None]:
    """The keys and values of all blocks of each query: [B, Hkv, groups, rows, keys, D].

    Of keys that are values all channels, and no values: some of them would be a copy.
    """
    k, v = (None if x is None else self._take(x, first, dtype) for x in (self.k, self.v))
    return k, v

  def _take(self, x: Array, first: Array, dtype) -> Array:
    x = _rows(x, first, self.size) if self.in_place else _gather(x, first, self.size)
    return x.reshape(self.B, self.Hkv, self.groups, self.rows, self.keys, -1).astype(dtype)

  def mask(self, blocks) -> Array:
    """[B, Hkv, groups, rows, 1, keys]: what each query sees of its blocks."""
    indices, starts, positions = blocks
    # Counted from the document's start, where no block can reach too far.
    keys = indices[..., None] * self.size + jnp.arange(self.size)
    last = (positions - starts)[:, None, None, :, None, None] - self.window
    seen = (indices[..., None] >= 0) & (keys <= last) & (positions >= 0)[:, None, None]
    return seen.reshape(*indices.shape[:4], 1, self.keys)


def _inputs(q, k, v):
  return jnp.result_type(q, k, *(() if v is None else (v,)))


@dataclasses.dataclass(frozen=True)
class Einsums:
  """``Core``."""

  def forward(self, q, k, v, mask, scale):
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = scale * _product(dtype, "bhgqrd,bhgqkd->bhgqrk", q, k)
    logits = jnp.where(mask, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1)
    top = jnp.where(top == -jnp.inf, 0, top)
    p = jnp.exp(logits - top[..., None])
    total = jnp.sum(p, axis=-1)
    some = total > 0
    total = jnp.where(some, total, 1)
    o = _product(dtype, "bhgqrk,bhgqkv->bhgqrv", p, k if v is None else v) / total[..., None]
    return o, jnp.where(some, top + jnp.log(total), -jnp.inf)

  def backward(self, q, do, lse, delta, k, v, mask, scale):
    dtype, values = lse.dtype, k if v is None else v
    logits = scale * _product(dtype, "bhgqrd,bhgqkd->bhgqrk", q, k)
    p = jnp.where(mask, jnp.exp(jnp.where(mask, logits - lse[..., None], 0)), 0)
    dp = _product(dtype, "bhgqrv,bhgqkv->bhgqrk", do, values)
    dlogits = scale * p * (dp - delta[..., None])
    dq = _product(dtype, "bhgqrk,bhgqkd->bhgqrd", dlogits, k)
    dk = _product(dtype, "bhgqrk,bhgqrd->bhgqkd", dlogits, q)
    dv = _product(dtype, "bhgqrk,bhgqrv->bhgqkv", p, do)
    return dq, *((dk + dv, None) if v is None else (dk, dv))


def _forward(q, k, v, blocks, scale, width, core):
  inputs = _inputs(q, k, v)
  chunks = _Chunks(q, k, v, blocks, once=True)

  def one(xs):
    q, blocks = xs
    keys, values = chunks.take(chunks.first(blocks), inputs)
    o, lse = core.forward(q.astype(inputs), keys, values, chunks.mask(blocks), scale)
    return o[..., :width].astype(q.dtype), lse

  o, lse = jax.lax.map(one, (chunks.queries(q), chunks.blocks))
  return chunks.join(o), chunks.join(lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, blocks, scale, width, core):
  return _forward(q, k, v, blocks, scale, width, core)


def _attend_forward(q, k, v, blocks, scale, width, core):
  o, lse = _forward(q, k, v, blocks, scale, width, core)
  return (o, lse), (q, k, v, blocks, o, lse)


def _attend_backward(scale, width, core, residuals, cotangents):
  q, k, v, blocks, o, lse = residuals
  do, dlse = cotangents
  dtype, inputs, given = lse.dtype, _inputs(q, k, v), q.dtype
  chunks = _Chunks(q, k, v, blocks, once=False)
  # The softmax's derivative: dlogits = p (do . v - delta).
  delta = jnp.sum(do.astype(dtype) * o.astype(dtype), axis=-1) - dlse

  def one(carry, xs):
    q, do, lse, delta, blocks = xs
    first = chunks.first(blocks)
    keys, values = chunks.take(first, inputs)
    q, do = q.astype(inputs), do.astype(inputs)
    dq, *rows = core.backward(q, do, lse, delta, keys, values, chunks.mask(blocks), scale)

    def add(x, rows):
      return _scatter_add(x, first, rows.reshape(*first.shape, chunks.size, -1))

    carry = [x if x is None else add(x, r) for x, r in zip(carry, rows, strict=True)]
    return carry, dq.astype(given)

  if width is not None:
    do = jnp.pad(do, ((0, 0),) * 3 + ((0, k.shape[3] - width),))
  zeros = [x if x is None else jnp.zeros(x.shape, dtype) for x in (chunks.k, chunks.v)]
  # A padding query sees nothing: whatever finite lse it has.
  finite = jnp.where(lse == -jnp.inf, 0, lse)
  xs = *(chunks.queries(x) for x in (q, do, finite, delta)), chunks.blocks
  (dk, dv), dq = jax.lax.scan(one, zeros, xs)

  def as_given(dx, x):
    return jnp.moveaxis(dx[:, :, : chunks.Tk], 1, 2).astype(x.dtype)

  dk, dv = as_given(dk, k), None if v is None else as_given(dv, v)
  return chunks.join(dq), dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)
