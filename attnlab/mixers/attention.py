"""What softmax mixers share: attention on each device's own heads, and the caches of keys and values.

A cache has slots, and the slots' order is the order of time: causality and windows go by them. Positions in a document,
which RoPE needs, are in the keys already.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers.base import Cache, Context
from attnlab.nn import Linear
from pallas_kernels import segments
from pallas_kernels.softmax_attention import softmax_attention

# What softmax_attention must know of cached keys, besides the keys.
Where = Mapping[str, Int[Array, "..."]]


def attend(
  q: Float[Array, "B Tq H D"],
  k: Float[Array, "B Tk Hkv D"],
  v: Float[Array, "B Tk Hkv V"],
  where: Where,
  *,
  sinks: Float[Array, " H"] | None = None,
  key_bias: Float[Array, "B Tk H"] | None = None,
  window: int | None = None,
  parts: int = 1,
) -> Float[Array, "B Tq H V"]:
  """``softmax_attention`` on each device's own sequences and heads.

  Args:
    where: its positions and segment ids, by the names that it has for them.
    parts: of each row, ``Context.parts``: keys and values are gathered, queries are not.
  """
  groups = q.shape[2] // k.shape[2]

  def core(q, k, v, sinks, bias, key_heads, where):
    k, v = own_heads(q, groups, key_heads, k, v)
    if parts > 1:
      k, v, where = all_parts(k, v, where)
      bias = None if bias is None else sharding.gather("context", bias, axis=1)
    return softmax_attention(q, k, v, sinks=sinks, key_bias=bias, window=window, **where)[0]

  heads = ("batch", None, "heads", None)
  of_sinks = None if sinks is None else ("heads",)
  of_bias = None if key_bias is None else heads[:3]
  axes = (heads, heads, heads, of_sinks, of_bias, ("heads",), axes_of(where))
  key_heads = jnp.arange(q.shape[2]) // groups
  return sharding.local(core, axes, heads)(q, k, v, sinks, key_bias, key_heads, where)


def gated(o: Float[Array, "B T H V"], x: Float[Array, "B T D"], gate: Linear | None) -> Array:
  """What attention gives, times the sigmoid of its output gate, if there is one (arXiv:2505.06708): a number for each
  head or for each of its channels."""
  if gate is None:
    return o
  number = gate.to_heads(x, o.shape[2]).astype(jnp.float32)
  return (o * jax.nn.sigmoid(number)).astype(x.dtype)


def running_sum(
  x: Float[Array, "B T H"], initial: Float[Array, "B H"] | None = None, parts: int = 1
) -> Float[Array, "B T H"]:
  """Of each head's numbers, up to each token and with its own, over whole rows where these are in parts.

  Args:
    initial: what was summed before the first token.
    parts: of each row, ``Context.parts``.
  """

  def core(x, initial):
    y = jnp.cumsum(x, axis=1)
    if parts > 1:
      sums = sharding.gather("context", y[:, -1:], axis=1)
      before = jnp.arange(parts) < sharding.part("context")
      y += jnp.sum(jnp.where(before[:, None], sums, 0), axis=1, keepdims=True)
    return y if initial is None else y + initial[:, None]

  heads = ("batch", None, "heads")
  of_initial = None if initial is None else ("batch", "heads")
  return sharding.local(core, (heads, of_initial), heads)(x, initial)


def all_parts(k: Array, v: Array, where: Where) -> tuple[Array, Array, Where]:
  """Keys and values of whole rows, and where the queries of this device's part are among them."""
  T = k.shape[1]
  k, v = (sharding.gather("context", x, axis=1) for x in (k, v))
  where = {"query_positions": sharding.part("context") * T + jnp.arange(T)} | dict(where)
  if "segment_ids" in where:
    # An id that comes back later in a row is of another document.
    runs = segments.runs(sharding.gather("context", where["segment_ids"], axis=1))
    own = jax.lax.dynamic_slice_in_dim(runs, sharding.part("context") * T, T, axis=1)
    where |= {"segment_ids": own, "key_segment_ids": runs}
  return k, v, where


def own_heads(q: Array, groups: int, key_heads: Int[Array, " H"], *keys: Array) -> list[Array]:
  """Of arrays [B, S, Hkv, D] the heads that a device's query heads read.

  Args:
    q: the device's queries [B, T, H, D].
    groups: how many query heads share a key head.
    key_heads: the number of the key head that each of the device's query heads reads.
  """
  if q.shape[2] >= groups * keys[0].shape[2]:
    return list(keys)
  # Query heads are split over devices, and the key heads, being too few, are not: take this device's.
  if groups % q.shape[2] == 0:
    return [jax.lax.dynamic_slice_in_dim(x, key_heads[0], 1, axis=2) for x in keys]
  return [x[:, :, key_heads] for x in keys]


def axes_of(where: Where) -> dict[str, tuple[str | None, ...]]:
  """The logical axes of positions and segment ids."""
  return {name: ("batch", None) if x.ndim == 2 else (None,) for name, x in where.items()}


def together(ctx: Context) -> Where:
  """Without a cache: tokens see each other."""
  return {} if ctx.segment_ids is None else {"segment_ids": ctx.segment_ids}


def new_cache(
  batch: int, slots: int, shapes: Mapping[str, Sequence[int]], dtype: jax.typing.DTypeLike
) -> Cache:
  """An empty cache.

  Args:
    slots: for how many tokens.
    shapes: of what is kept of a token, by name.
  """
  cache: Cache = {name: jnp.zeros((batch, slots, *s), dtype) for name, s in shapes.items()}
  return cache | {
    "segment_ids": jnp.zeros((batch, slots), jnp.int32),
    "length": jnp.zeros((), jnp.int32),  # tokens so far
  }


def append(cache: Cache, new: Mapping[str, Array], ctx: Context) -> tuple[Cache, Where]:
  """Puts tokens behind those of a cache. More tokens than it has slots for are the caller's error.

  Args:
    new: what is kept of the tokens, arrays [B, T, ...], by name.

  Returns:
    The cache, and what the new tokens' queries need to see it with.
  """
  tokens = _tokens(new, ctx)
  slots, T = cache["segment_ids"].shape[1], tokens["segment_ids"].shape[1]
  if T > slots:
    raise UserError(f"{T} tokens do not fit a cache of {slots}: give init_cache a larger max_len")

  def write(old, new, length):
    return {
      name: jax.lax.dynamic_update_slice_in_dim(old[name], x.astype(old[name].dtype), length, 1)
      for name, x in new.items()
    }

  length = cache["length"]
  cache = _updated(write, cache, tokens, length)
  where = {
    "query_positions": length + jnp.arange(T),
    "segment_ids": tokens["segment_ids"],
    "key_segment_ids": cache["segment_ids"],
  }
  return cache | {"length": length + T}, where


def append_to_ring(
  cache: Cache, new: Mapping[str, Array], ctx: Context
) -> tuple[Cache, dict[str, Array], Where]:
  """Puts tokens into a cache that keeps as many as it has slots: the token at position p is in slot ``p % slots``.

  Returns:
    The cache; what the new tokens' queries see, by name: the slots, or where there are several tokens, the later of
    which may have taken slots that the earlier ones see, the slots as they were and the tokens; and what they need to
    see it with.
  """
  tokens = _tokens(new, ctx)
  slots, T = cache["segment_ids"].shape[1], tokens["segment_ids"].shape[1]
  length, kept = cache["length"], min(T, slots)

  def write(old, new, length):
    where = (length + T - kept + jnp.arange(kept)) % slots
    return {
      name: old[name].at[:, where].set(x[:, T - kept :].astype(old[name].dtype))
      for name, x in new.items()
    }

  def join(old, new):
    return {
      name: jnp.concatenate([old[name], x.astype(old[name].dtype)], axis=1)
      for name, x in new.items()
    }

  def positions(length):
    """Of what is in each slot; negative where that is nothing."""
    return length - 1 - (length - 1 - jnp.arange(slots)) % slots

  after = _updated(write, cache, tokens, length)
  if T == 1:
    seen, key_positions = after, positions(length + 1)
  else:
    seen = _updated(join, cache, tokens)
    key_positions = jnp.concatenate([positions(length), length + jnp.arange(T)])
  where = {
    "query_positions": length + jnp.arange(T),
    "key_positions": key_positions,
    "segment_ids": tokens["segment_ids"],
    "key_segment_ids": seen["segment_ids"],
  }
  return after | {"length": length + T}, seen, where


def _tokens(new: Mapping[str, Array], ctx: Context) -> dict[str, Array]:
  """What a cache keeps of the tokens."""
  return {**new, "segment_ids": document_ids(ctx)}


def document_ids(ctx: Context) -> Int[Array, "B T"]:
  """The segment ids, as caches hold them. Without any all are of one document: 1, as after a padded prompt."""
  ids = jnp.ones_like(ctx.positions) if ctx.segment_ids is None else ctx.segment_ids
  return ids.astype(jnp.int32)


def _updated(fn, cache: Cache, tokens: dict[str, Array], *scalars: Array) -> Cache:
  """``fn`` of the cache's arrays, the tokens and scalars, on each device's own sequences and heads."""

  def axes(x):
    return (
      ("batch", None, "heads", None)[: x.ndim]
      if x.ndim == 4
      else ("batch",) + (None,) * (x.ndim - 1)
    )

  old = {name: cache[name] for name in tokens}
  one = jax.tree.map(axes, tokens)
  return sharding.local(fn, (one, one, *[()] * len(scalars)), one)(old, tokens, *scalars)
