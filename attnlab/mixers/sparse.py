"""What sparse mixers share: summarise the past, select blocks of it, attend to those, combine.

A mechanism is softmax attention's projections and output around ``mix``, which runs on each device's own sequences and
heads. There ``Place`` knows where the queries stand, in a training batch with its documents or behind a cache, so that
``mix`` is written once for both. Blocks are counted from a document's first token.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab import sharding
from attnlab.mixers.attention import Where, append, axes_of, new_cache, together
from attnlab.mixers.base import Cache, Context, MixerOutput
from attnlab.mixers.softmax import SoftmaxAttention
from attnlab.nn import expand_heads, rope_heads
from pallas_kernels.block_sparse import Layout, block_sparse_attention
from pallas_kernels.softmax_attention import softmax_attention

Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Pools:
  """Summaries of the complete pools of tokens.

  Attributes:
    values: by name, [B, N, heads, ...], those of all documents of a row one after another.
    first: the number of the first one of each query's document, [B, T].
    complete: how many of its document's end up to each query, [B, T].
    columns: the first token of each, [B, N]; None behind a cache.
  """

  values: Arrays
  first: Int[Array, "B T"]
  complete: Int[Array, "B T"]
  columns: Int[Array, "B N"] | None = None

  def visible(self, first: Int[Array, "B t"], complete: Int[Array, "B t"]) -> Array:
    """[B, t, N]: the pools that queries of this ``first`` and ``complete`` see."""
    number = jnp.arange(jax.tree.leaves(self.values)[0].shape[1]) - first[..., None]
    return (number >= 0) & (number < complete[..., None])


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the queries of one call stand.

  Attributes:
    where: as ``softmax_attention`` is told.
    layout: as ``block_sparse_attention`` is told.
    options: its arguments for that.
    new: how many tokens a cache has been given in this call; None without a cache.
    dense: see everything, whatever is selected.
  """

  where: Where
  layout: Layout
  options: Mapping[str, Array | None]
  new: int | None
  dense: bool = False

  @classmethod
  def of(cls, where: Where, batch: int, length: int, dense: bool = False) -> "Place":
    """From what ``attention.together`` or ``attention.append`` says."""
    if "query_positions" not in where:
      ids = where.get("segment_ids")
      return cls(where, Layout.together(batch, length, ids), {"segment_ids": ids}, None, dense)
    positions = where["query_positions"]
    # Padding is on the left, and slots that are not filled have its id too.
    starts = positions[-1] + 1 - jnp.sum(where["key_segment_ids"] > 0, axis=1, dtype=jnp.int32)
    options = {"query_positions": positions, "starts": starts}
    return cls(where, Layout.cached(positions, starts), options, length, dense)

  def attend(self, q, k, v, indices, block_size: int, **options) -> tuple[Array, Array]:
    """``block_sparse_attention`` of queries that stand here, or full attention where that is asked for: o and lse."""
    if self.dense:
      options.pop("window", None)
      if not isinstance(v, int):
        return self.full(q, k, v, **options)
      # Keys are values as they are, without a copy of some channels.
      o, lse = self.full(q, k, k, **options)
      return o[..., :v], lse
    options = dict(self.options) | options
    return block_sparse_attention(q, k, v, indices, block_size=block_size, **options)

  def full(self, q, k, v, **options) -> tuple[Array, Array]:
    """``softmax_attention`` of queries that stand here: o and lse."""
    return softmax_attention(q, k, v, **self.where, **options)

  def pools(
    self,
    summarise: Callable[[Arrays], Arrays],
    tokens: Arrays,
    size: int,
    stride: int,
    cache: Arrays | None = None,
    offset: int | Array = 0,
  ) -> Pools:
    """Summaries of pools of ``size`` tokens, one each ``stride``.

    Args:
      summarise: from the tokens of pools [B, n, size, heads, ...] to [B, n, heads, ...], by name.
      tokens: [B, Tk, heads, ...] by name.
      cache: the summaries so far, where there is a cache: those that end in this call are added.
      offset: the position of the first of ``tokens``, where there is a cache.
    """
    complete = self.layout.complete(size, stride)
    if cache is None:
      columns, first = self.layout.table(size, stride)
      return Pools(summarise(_take(tokens, columns, size)), first, complete, columns)
    positions, starts = self.layout.positions, self.layout.starts[:, 0]
    before = jnp.maximum((positions[0] - starts - size) // stride + 1, 0)
    number = before[:, None] + jnp.arange(self.new // stride + 1)  # of those that may end here
    columns = starts[:, None] + number * stride - offset
    new = summarise(_take(tokens, columns, size))
    slots = jax.tree.leaves(cache)[0].shape[1]
    ends = (number < complete[:, -1:]) & (number < slots)
    number = jnp.where(ends, number, slots)

    def put(old, new):
      return jax.vmap(lambda o, i, n: o.at[i].set(n.astype(o.dtype), mode="drop"))(old, number, new)

    return Pools(jax.tree.map(put, cache, new), jnp.zeros_like(complete), complete)

  def blocks(self, tokens: Arrays, size: int) -> Pools:
    """The tokens themselves, [B, N, size, heads, ...], by complete blocks; behind a cache by all that there may be."""
    complete = self.layout.complete(size, size)
    if self.new is None:
      columns, first = self.layout.table(size, size)
    else:
      count = max(jax.tree.leaves(tokens)[0].shape[1] // size, 1)
      columns = self.layout.starts[:, :1] + jnp.arange(count) * size
      first = jnp.zeros_like(complete)
    return Pools(_take(tokens, columns, size), first, complete, columns)


def _take(tokens: Arrays, columns: Int[Array, "B n"], size: int) -> Arrays:
  """The tokens of pools from each first column on: [B, n, size, ...]. What lies outside is anything."""
  rows = columns[..., None] + jnp.arange(size)
  return {
    name: jax.vmap(lambda x, i: x.at[i].get(mode="clip"))(x, rows) for name, x in tokens.items()
  }


def extend_tails(tails: Arrays, new: Arrays) -> tuple[Arrays, Arrays]:
  """Tokens [B, T, heads, ...] behind the last ones of earlier calls: all of them, and the new last ones."""
  tokens = {n: jnp.concatenate([sharding.like(tails[n], x), x], axis=1) for n, x in new.items()}
  last = {n: tokens[n][:, tokens[n].shape[1] - x.shape[1] :] for n, x in tails.items()}
  return tokens, jax.tree.map(sharding.like, last, tails)


def grouped(q: Float[Array, "B T H K"], groups: int) -> Float[Array, "B T G R K"]:
  """Query heads by the group that they belong to."""
  return q.reshape(*q.shape[:2], groups, -1, q.shape[-1])


def products(
  q: Float[Array, "B T G R K"], k: Float[Array, "B N G K"], scale: float = 1.0
) -> Float[Array, "B G R T N"]:
  """``scale q . k`` in float32 (float64 for float64 inputs)."""
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum(
    "btgrk,bngk->bgrtn", q, k.astype(q.dtype), precision="highest", preferred_element_type=dtype
  )
  return scale * logits


def by_document(
  scores: Float[Array, "B G T N"], first: Int[Array, "B T"], fill: float = 0.0
) -> Float[Array, "B G T N"]:
  """Scores of pools, numbered from the first of each query's document; ``fill`` past the end."""
  number = first[..., None] + jnp.arange(scores.shape[-1])
  number = jnp.broadcast_to(number[:, None], scores.shape)
  return jnp.take_along_axis(scores, number, axis=-1, mode="fill", fill_value=fill)


class SparseCore:
  """What lies between the projections of a mixer, whose query heads are ``H`` and key heads ``Hkv``."""

  in_parts = False  # A query chooses among all before it.
  H: int
  Hkv: int
  sinks: Any = None

  def weights(self) -> Any:
    """Parameters that ``mix`` needs."""
    return {}

  def summarise(
    self, place: Place, tokens: Arrays, cache: Arrays | None, weights: Any
  ) -> Pools | None:
    """Summaries of the tokens' pools (``Place.pools``); None where a mechanism has none.

    Args:
      tokens: k, v and ``kept`` of all tokens that there are.
      cache: the summaries so far; None without a cache.
      weights: of ``weights``.
    """
    del place, tokens, cache, weights

  def mix(
    self, place: Place, q: Array, signals: Arrays, tokens: Arrays, pools: Any, weights: Any
  ) -> tuple[Array, Arrays]:
    """Selects, attends and combines.

    Returns:
      o [B, T, H, V], and what ``results`` names: scalars for ``MixerOutput.aux``, which are means over the tokens, or
      arrays of tokens.
    """
    raise NotImplementedError

  def pool_shapes(self, max_len: int) -> dict[str, tuple[int, ...]]:
    """Of the summaries that a cache has, without [B]."""
    del max_len
    return {}

  def sparse(
    self, q: Array, signals: Arrays, new: Arrays, others: Arrays, ctx: Context, cache: Cache | None
  ) -> tuple[Array, Cache | None, Arrays]:
    """Everything between the projections: o [B, T, H, V], the new cache, and ``results``.

    Args:
      new: what a cache keeps of the tokens.
      others: further arrays for ``summarise``, which are not kept.
    """
    if cache is None:
      tokens, where, pools = new, together(ctx), None
    else:
      grown, where = append(cache, new, ctx)
      cache = cache | grown
      tokens = {name: cache[name].astype(q.dtype) for name in new}
      pools = cache["pools"]
    o, pools, aux = self.run(q, signals, tokens | others, where, pools, ctx.dense)
    return o, (None if cache is None else cache | {"pools": pools}), aux

  def results(self, dense: bool, cached: bool) -> dict[str, tuple]:
    """The logical axes of what ``mix`` returns besides o, by name; those of a scalar are ()."""
    del dense, cached
    return {}

  @property
  def head_axis(self) -> str | None:
    """The logical axis of query heads. A group of them chooses together: its heads stay on one device."""
    return "heads" if self.Hkv % sharding.size("heads") == 0 else None

  def run(
    self, q: Array, signals: Arrays, tokens: Arrays, where: Where, cache: Arrays | None, dense: bool
  ) -> tuple[Array, Arrays | None, Arrays]:
    """``summarise`` and ``mix`` on each device's own sequences and heads: o, the cache's summaries, ``results``."""
    axis, results = self.head_axis, self.results(dense, cache is not None)

    def axes(x):
      return ("batch", None, axis if x.shape[2] > 1 else None) + (None,) * (x.ndim - 3)

    def core(q, signals, tokens, where, cache, weights):
      place = Place.of(where, *q.shape[:2], dense)
      pools = self.summarise(place, tokens, cache, weights)
      o, aux = self.mix(place, q, signals, tokens, pools, weights)
      mean = lambda x: sharding.mean_over("batch", sharding.mean_over("heads", x))  # noqa: E731
      aux = {name: aux[name] if axes else mean(aux[name]) for name, axes in results.items()}
      return o, (cache if pools is None or cache is None else pools.values), aux

    weights = self.weights()
    weight_axes = jax.tree.map(lambda w: (None,) * w.ndim, weights)
    if self.sinks is not None:
      weights = weights | {"sinks": sharding.put(self.sinks[...], axis)}
      weight_axes = weight_axes | {"sinks": (axis,)}
    trees = q, signals, tokens
    cache_axes = jax.tree.map(axes, cache)
    in_axes = (*jax.tree.map(axes, trees), axes_of(where), cache_axes, weight_axes)
    run = sharding.local(core, in_axes, (axes(q), cache_axes, results))
    o, cache, aux = run(*trees, where, cache, weights)
    return sharding.put(o, "batch", None, "heads", None), cache, aux


class SparseMixer(SparseCore, SoftmaxAttention):
  """Base of the sparse mixers over softmax attention's heads."""

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SoftmaxAttention.Config):
    """Attributes:
    block_size: tokens of a block.
    top_k: blocks of a query, forced ones among them.
    """

    block_size: int = 64
    top_k: int = 16

  def split_heads(self):
    """The heads of a group choose together: they stay on one device."""
    return super().split_heads() | {"num_kv_heads": self.Hkv}

  # Heads lie side by side until they are split, and again behind the kernels. That softmax attention's come first saves
  # copies. Here it has not been tried: when a kernel put heads first, libtpu's XLA made no program of NSA at 16384
  # tokens ("TransformWindow: split of a padded window dim is not supported").

  def heads_of(self, x, ctx):
    c = self.config
    q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    if c.qk_norm:
      q, k = self.q_norm.heads(q), self.k_norm.heads(k)
    turn = (ctx.positions, self.K, c.rope_theta, c.rope_fraction, c.rope_scaling)
    q, k = rope_heads(q, *turn), rope_heads(k, *turn)
    heads = (q, self.H), (k, self.Hkv), (v, self.Hkv)
    return tuple(sharding.split(y, count, self.K) for y, count in heads)

  def output(self, o, x):
    o = sharding.merge(o, 2)
    if self.gate_proj is not None:
      gate = jax.nn.sigmoid(self.gate_proj(x).astype(jnp.float32))
      gate = expand_heads(gate, self.K) if self.gate_width == 1 else gate
      o = (o * gate).astype(x.dtype)
    return self.out_proj(o)

  def kept(self, x: Float[Array, "B T D"], ctx: Context) -> Arrays:
    """What a cache keeps of each token besides k and v: [B, T, heads, ...] by name."""
    del x, ctx
    return {}

  def signals(self, x: Float[Array, "B T D"], ctx: Context) -> Arrays:
    """What ``mix`` needs of each query besides q: [B, T, heads, ...] by name."""
    del x, ctx
    return {}

  def select(self, place: Place, q: Array, signals: Arrays, tokens: Arrays, pools: Any) -> Array:
    """The blocks of each query, as ``block_sparse_attention`` takes them.

    Args:
      q, signals: [B, T, heads, ...].
      pools: of ``summarise``.
    """
    raise NotImplementedError

  def mix(
    self, place: Place, q: Array, signals: Arrays, tokens: Arrays, pools: Any, weights: Any
  ) -> tuple[Array, Arrays]:
    indices = self.select(place, q, signals, tokens, pools)
    options = {"sinks": weights.get("sinks")}
    size = self.config.block_size
    return place.attend(q, tokens["k"], tokens["v"], indices, size, **options)[0], {}

  def kept_shapes(self) -> dict[str, tuple[int, ...]]:
    """Of k, v and ``kept``, without [B, T]."""
    return {"k": (self.Hkv, self.K), "v": (self.Hkv, self.K)}

  def init_cache(
    self, batch: int, max_len: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> Cache:
    shapes = self.pool_shapes(max_len).items()
    pools = {name: jnp.zeros((batch, *s), dtype) for name, s in shapes}
    return new_cache(batch, max_len, self.kept_shapes(), dtype) | {"pools": pools}

  def __call__(
    self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None = None
  ) -> MixerOutput:
    q, k, v = self.heads_of(x, ctx)
    new = {"k": k, "v": v} | self.kept(x, ctx)
    o, cache, aux = self.sparse(q, self.signals(x, ctx), new, {}, ctx, cache)
    return MixerOutput(self.output(o, x), cache, aux)

  def selected(self, length):
    seen = min(self.config.block_size * self.config.top_k, length)
    return {"k": seen, "v": seen}

  def scored(self) -> tuple[int, int]:
    """What selection compares a query with, for ``core_flops``: channels, and tokens between one score and the next."""
    raise NotImplementedError

  def core_flops(self, length: int, decode: bool) -> float:
    """Of the logits and weighted sums over selected tokens, and of the scores."""
    c = self.config
    chosen = min(c.block_size * c.top_k, length)
    seen = chosen if decode else chosen - chosen * (chosen - 1) / 2 / length
    channels, stride = self.scored()
    return 4.0 * self.H * self.K * seen + 2.0 * channels * length / stride / (1 if decode else 2)
