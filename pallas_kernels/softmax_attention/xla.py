"""Attention in blocks of queries and keys, in plain jax.numpy: any platform, any shape.

The softmax is taken online (FlashAttention, arXiv:2205.14135) over the blocks of keys that a block of queries can see:
none after it, before its window, or of other documents. Which they are is found from positions and segments at run
time, and the loop is over them alone. The backward pass starts from q, k, v, o and lse.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import dispatch
from pallas_kernels.softmax_attention.visibility import Visibility

# Queries and keys in a block. On a CPU the logits of a block should stay in its cache; elsewhere a step should be worth
# its launch. Few queries, as in decoding, have more keys, up to a limit: a cache is read in whole blocks.
_CPU, _ELSEWHERE = (128, 256), (512, 512)
_MOST_KEYS = 2048
# The smallest block of a window: smaller ones compute less that is masked, but slower.
_WINDOW = 128

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def check(*args) -> None:
  """Serves every call."""


def forward(q, k, v, sinks, seen: Visibility, scale: float):
  """As ``reference.forward``, in memory linear in Tq and Tk."""
  return _attend(q, k, v, sinks, seen, scale)


def block_sizes(Tq: int, Tk: int, window: int | None) -> tuple[int, int]:
  """Queries and keys in a block."""
  rows, columns = _CPU if dispatch.platform() == "cpu" else _ELSEWHERE
  near = max(_WINDOW, 1 << (window - 1).bit_length()) if window else max(Tq, Tk)
  queries = min(Tq, rows, near)
  return queries, min(Tk, _MOST_KEYS, rows * columns // queries, near)


class _Blocks:
  """Queries, padded to whole blocks, and keys, whose last block reaches back over the one before it.

  A cache is thus never copied; the keys that a block shares with the one before are hidden in the later one.
  """

  def __init__(self, Tq: int, Tk: int, seen: Visibility):
    self.Tq, self.Tk = Tq, Tk
    self.queries, self.keys = block_sizes(Tq, Tk, seen.window)
    self.query_count, self.key_count = -(-Tq // self.queries), -(-Tk // self.keys)
    self.seen = dataclasses.replace(
      seen,
      query_positions=jnp.pad(seen.query_positions, (0, self._pad), constant_values=-1),
      query_segments=self.pad(seen.query_segments),
    )
    self.first, self.end = self._reach()

  @property
  def _pad(self) -> int:
    return self.query_count * self.queries - self.Tq

  def pad(self, x: Array | None) -> Array | None:
    """An array [B, Tq, ...], of the queries, with whole blocks."""
    if x is None or not self._pad:
      return x
    return jnp.pad(x, ((0, 0), (0, self._pad)) + ((0, 0),) * (x.ndim - 2))

  def query(self, x: Array, i, axis: int = 1) -> Array:
    """Block i of an array of the (padded) queries."""
    return jax.lax.dynamic_slice_in_dim(x, i * self.queries, self.queries, axis)

  def key_start(self, j):
    return jnp.minimum(j * self.keys, self.Tk - self.keys)

  def key(self, x: Array, j, axis: int = 1) -> Array:
    """Block j of an array of the keys."""
    return jax.lax.dynamic_slice_in_dim(x, self.key_start(j), self.keys, axis)

  def add(self, total: Array, x: Array, j) -> Array:
    """``total`` [B, Tk, ...] with x added to block j of the keys."""
    x = self.key(total, j) + x
    return jax.lax.dynamic_update_slice_in_dim(total, x, self.key_start(j), axis=1)

  def _fresh_positions(self, j) -> Int[Array, " keys"]:
    fresh = self.key_start(j) + jnp.arange(self.keys) >= j * self.keys
    return jnp.where(fresh, self.key(self.seen.key_positions, j, axis=0), -1)

  def mask(self, i, j) -> Array:
    """[#B, 1, 1, queries, keys]: who sees whom in a pair of blocks."""
    segments = {}
    if self.seen.query_segments is not None:
      segments["query_segments"] = self.query(self.seen.query_segments, i)
      segments["key_segments"] = self.key(self.seen.key_segments, j)
    block = dataclasses.replace(
      self.seen,
      query_positions=self.query(self.seen.query_positions, i, axis=0),
      key_positions=self._fresh_positions(j),
      **segments,
    )
    return block.mask()[:, None, None]

  def _reach(self) -> tuple[Int[Array, " query_count"], Int[Array, " query_count"]]:
    """The first, and the last plus one, of the blocks of keys of which each block of queries may see any."""
    far = jnp.iinfo(jnp.int32).max

    def span(positions):
      valid = positions >= 0
      least = jnp.min(jnp.where(valid, positions, far), axis=-1)
      return least, jnp.max(jnp.where(valid, positions, -1), axis=-1)

    blocks = jnp.arange(self.key_count)
    queries = self.seen.query_positions.reshape(self.query_count, self.queries)
    first_query, last_query = (x[:, None] for x in span(queries))
    first_key, last_key = span(jax.vmap(self._fresh_positions)(blocks))
    any_seen = (first_key <= last_query) & (last_key >= 0)
    if self.seen.window is not None:
      any_seen &= last_key > first_query - self.seen.window
    if self.seen.query_segments is not None:
      ids = self.seen.query_segments
      ids = ids.reshape(-1, self.query_count, 1, self.queries)
      key_ids = jax.vmap(functools.partial(self.key, self.seen.key_segments), out_axes=1)(blocks)
      key_ids = key_ids[:, None]
      same = (jnp.min(key_ids, -1) <= jnp.max(ids, -1)) & (jnp.max(key_ids, -1) >= jnp.min(ids, -1))
      any_seen &= jnp.any(same, axis=0)
    first = jnp.argmax(any_seen, axis=1)
    end = self.key_count - jnp.argmax(any_seen[:, ::-1], axis=1)
    return first, jnp.where(jnp.any(any_seen, axis=1), end, first)

  def over_keys(self, i, body, carry):
    """Folds ``body(j, carry)`` over the blocks of keys that block i of queries may see."""
    if self.key_count == 1:
      return body(0, carry)
    return jax.lax.fori_loop(self.first[i], self.end[i], body, carry)

  def over_queries(self, body, carry):
    """Scans ``body(carry, i)`` over the blocks of queries; its outputs [B, queries, ...] are joined and unpadded."""
    if self.query_count == 1:
      carry, out = body(carry, 0)
      return carry, out
    carry, out = jax.lax.scan(body, carry, jnp.arange(self.query_count))

    def join(x):
      x = jnp.moveaxis(x, 0, 1)
      return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.Tq]

    return carry, jax.tree.map(join, out)


def _grouped(x: Array, Hkv: int) -> Array:
  """[B, T, H, ...] -> [B, T, Hkv, G, ...]."""
  return x.reshape(*x.shape[:2], Hkv, -1, *x.shape[3:])


def _rows(x: Array, Hkv: int) -> Array:
  """[B, T, H] -> [B, Hkv, G, T], as logits have their rows."""
  return jnp.moveaxis(_grouped(x, Hkv), 1, 3)


def _product(dtype, subscripts: str, x: Array, y: Array) -> Array:
  """A product of the inputs' own precision, x being rounded to y's, with sums of ``dtype``."""
  return _einsum(subscripts, x.astype(jnp.result_type(y)), y, preferred_element_type=dtype)


def _forward(q, k, v, sinks, seen, scale):
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  inputs = jnp.result_type(q, k, v)
  (B, Tq, H, _), Hkv = q.shape, k.shape[2]
  blocks = _Blocks(Tq, k.shape[1], seen)
  q = blocks.pad(q)
  rows = (B, Hkv, H // Hkv, blocks.queries)

  def of_queries(_, i):
    q_i = _grouped(blocks.query(q, i), Hkv).astype(inputs)

    def with_keys(j, carry):
      top, total, o = carry
      k_j, v_j = (blocks.key(x, j).astype(inputs) for x in (k, v))
      logits = scale * _product(dtype, "bqhgd,bkhd->bhgqk", q_i, k_j)
      logits = jnp.where(blocks.mask(i, j), logits, -jnp.inf)
      new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
      finite = jnp.where(new_top == -jnp.inf, 0, new_top)
      p = jnp.exp(logits - finite[..., None])
      before = jnp.exp(top - finite)
      total = total * before + jnp.sum(p, axis=-1)
      o = o * before[..., None] + _product(dtype, "bhgqk,bkhv->bhgqv", p, v_j)
      return new_top, total, o

    if sinks is None:
      top, total = jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype)
    else:
      top = jnp.broadcast_to(sinks.astype(dtype).reshape(Hkv, -1, 1), rows)
      total = jnp.ones(rows, dtype)
    o = jnp.zeros((*rows, v.shape[-1]), dtype)
    top, total, o = blocks.over_keys(i, with_keys, (top, total, o))
    some = total > 0
    total = jnp.where(some, total, 1)
    o = jnp.moveaxis(o / total[..., None], 3, 1).astype(q.dtype)
    lse = jnp.moveaxis(jnp.where(some, top + jnp.log(total), -jnp.inf), 3, 1)
    return None, (o.reshape(B, -1, H, v.shape[-1]), lse.reshape(B, -1, H))

  return blocks.over_queries(of_queries, None)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, sinks, seen, scale):
  return _forward(q, k, v, sinks, seen, scale)


def _attend_forward(q, k, v, sinks, seen, scale):
  o, lse = _forward(q, k, v, sinks, seen, scale)
  return (o, lse), (q, k, v, sinks, seen, o, lse)


def _attend_backward(scale, residuals, cotangents):
  q, k, v, sinks, seen, o, lse = residuals
  do, dlse = cotangents
  dtype, inputs = lse.dtype, jnp.result_type(q, k, v)
  Hkv = k.shape[2]
  blocks = _Blocks(q.shape[1], k.shape[1], seen)
  # The softmax's derivative: dlogits = p (do . v - delta).
  delta = jnp.sum(do.astype(dtype) * o.astype(dtype), axis=-1) - dlse
  dsinks = None
  if sinks is not None:
    # Where nothing is seen and the sink is -inf, so is lse.
    share = jnp.where(lse == -jnp.inf, 0, jnp.exp(sinks.astype(dtype) - lse))
    dsinks = -jnp.sum(share * delta, axis=(0, 1)).astype(sinks.dtype)
  q_, do_, lse_, delta_ = (blocks.pad(x) for x in (q, do, lse, delta))

  def of_queries(carry, i):
    q_i, do_i = (_grouped(blocks.query(x, i), Hkv).astype(inputs) for x in (q_, do_))
    lse_i, delta_i = (_rows(blocks.query(x, i), Hkv)[..., None] for x in (lse_, delta_))

    def with_keys(j, carry):
      dq_i, dk, dv = carry
      k_j, v_j = (blocks.key(x, j).astype(inputs) for x in (k, v))
      logits = scale * _product(dtype, "bqhgd,bkhd->bhgqk", q_i, k_j)
      p = jnp.where(blocks.mask(i, j), jnp.exp(logits - lse_i), 0)
      dp = _product(dtype, "bqhgv,bkhv->bhgqk", do_i, v_j)
      dlogits = scale * p * (dp - delta_i)
      dv = blocks.add(dv, _product(dtype, "bhgqk,bqhgv->bkhv", p, do_i), j)
      dk = blocks.add(dk, _product(dtype, "bhgqk,bqhgd->bkhd", dlogits, q_i), j)
      return dq_i + _product(dtype, "bhgqk,bkhd->bqhgd", dlogits, k_j), dk, dv

    dq_i, *carry = blocks.over_keys(i, with_keys, (jnp.zeros(q_i.shape, dtype), *carry))
    return tuple(carry), dq_i.reshape(*dq_i.shape[:2], *q.shape[2:]).astype(q.dtype)

  zeros = jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
  (dk, dv), dq = blocks.over_queries(of_queries, zeros)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), dsinks, None


_attend.defvjp(_attend_forward, _attend_backward)
