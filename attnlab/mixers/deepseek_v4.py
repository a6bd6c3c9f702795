"""DeepSeek-V4's attention to a window and to compressed entries, all (HCA) or chosen ones (CSA).

After the released model's code (huggingface/transformers, deepseek_v4).
"""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import sparse_references
from attnlab.mixers.attention import append_to_ring, axes_of, new_cache, together
from attnlab.mixers.base import Mixer, MixerOutput, register
from attnlab.mixers.compressor import Compressor, rope_last
from attnlab.mixers.dsa import LightningIndexer
from attnlab.mixers.indexer import chosen_weights, kl, recall, sampled
from attnlab.mixers.sparse import SparseCore, extend_tails
from attnlab.nn import Linear, RMSNorm, fan_in, param
from attnlab.settings import Natural, Weight
from pallas_kernels.block_sparse import (
  at_a_time,
  block_sparse_attention,
  merge_attention,
  over_queries,
  select_blocks,
)
from pallas_kernels.index_scores import index_scores
from pallas_kernels.pool_attention import pool_attention, pool_weights, weights_at_a_time
from pallas_kernels.softmax_attention import softmax_attention


class CompressedAttention(SparseCore, Mixer):
  """One head is key and value of all query heads. A query sees a window of tokens, and entries that each stand for
  several tokens, once the last of these is visible, in one softmax, with a sink for each head. Values carry RoPE, which
  is taken off the output; the output's heads are projected in groups."""

  reference = sparse_references.deepseek_v4

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Sizes, by default those of the released model, but for ``out_groups``: it has 8, of 8 heads each. Its YaRN, for
    rows longer than 65536 tokens, is not here.

    Attributes:
      num_heads: None: ``d_model / head_dim``, at least one.
      head_dim: channels of a head.
      rope_dim: the last of them, which have RoPE.
      q_lora_rank: channels of the queries' latent.
      window: tokens that are seen as they are.
      compress: tokens that an entry stands for.
      out_groups, out_rank: groups of heads that are projected together, and to how many channels each.
      rope_theta: the base of RoPE.
    """

    num_heads: int | None = None
    head_dim: int = 512
    rope_dim: Natural = 64
    q_lora_rank: int = 1024
    window: int = 128
    compress: int = 128
    out_groups: int = 1
    out_rank: int = 1024
    rope_theta: float = 160000.0

  Hkv = 1
  head_axis = "heads"
  overlap = False

  def __init__(self, config, layer, key):
    c, D = config, layer.d_model
    self.config = config
    self.K, self.H = c.head_dim, c.num_heads or max(1, D // c.head_dim)
    if self.H % c.out_groups:
      raise UserError(
        f"mixer {self.name!r}: out_groups={c.out_groups} does not divide num_heads={self.H}"
      )
    keys = jax.random.split(key, 7)
    self.q_down = Linear(keys[0], D, c.q_lora_rank, ("embed", None))
    self.q_norm = RMSNorm(c.q_lora_rank, layer.norm_eps)
    self.q_up = Linear(keys[1], c.q_lora_rank, self.H * self.K, (None, "heads"))
    self.head_norm = RMSNorm(self.K, layer.norm_eps, scale=False)
    self.kv_proj = Linear(keys[2], D, self.K, ("embed", None))
    self.kv_norm = RMSNorm(self.K, layer.norm_eps)
    self.sink = param(keys[3], jax.nn.initializers.zeros, (self.H,), ("heads",))
    sizes = (c.compress, self.overlap, c.rope_dim, layer.norm_eps)
    self.compressor = Compressor(keys[4], D, self.K, *sizes)
    shape = (c.out_groups, self.H // c.out_groups * self.K, c.out_rank)
    self.group_proj = param(keys[5], fan_in(stacked=1), shape, ("heads", None, None))
    self.out_proj = Linear(keys[6], c.out_groups * c.out_rank, D, ("heads", "embed"))

  def core_flops(self, length, decode):
    """Of attention to the window and all entries."""
    w = min(self.config.window, length)
    near = w if decode else w - w * (w - 1) / 2 / length
    return 4.0 * self.H * self.K * (near + self.entries_seen(length, decode))

  def entries_seen(self, length, decode):
    """How many a query attends to."""
    return length / self.config.compress / (1 if decode else 2)

  def compressors(self) -> dict[str, Compressor]:
    """By the name of their entries."""
    return {"k": self.compressor}

  def init_cache(self, batch, max_len, dtype=jnp.float32):
    """The window, the entries so far, and what the next one needs."""
    near = new_cache(batch, self.config.window, {"k": (1, self.K)}, dtype)
    pools, tail = {}, {}
    for name, make in self.compressors().items():
      pools[name] = jnp.zeros((batch, max(max_len // make.m, 1), 1, make.channels), dtype)
      for part in ("c", "z"):
        tail[f"{name}_{part}"] = jnp.zeros((batch, make.reach, 1, make.width), dtype)
    tail["position"] = jnp.zeros((batch, self.compressor.reach, 1, 1), jnp.int32)
    return new_cache(batch, max_len, {}, dtype) | {"near": near, "pools": pools, "tail": tail}

  def weights(self):
    return {n: sharding.put(make.norm.scale[...], None) for n, make in self.compressors().items()}

  def __call__(self, x, ctx, cache=None):
    c = self.config
    q_input = self.q_norm(self.q_down(x))
    q = self.head_norm(sharding.split(self.q_up(q_input), self.H, self.K))
    q = rope_last(q, ctx.positions, c.rope_dim, c.rope_theta)
    k = self.kv_norm(self.kv_proj(x))[:, :, None]
    near = {"k": rope_last(k, ctx.positions, c.rope_dim, c.rope_theta)}
    tokens = {"position": ctx.positions[:, :, None, None].astype(jnp.int32)}
    for name, make in self.compressors().items():
      y = x if make is self.compressor else jax.lax.stop_gradient(x)
      tokens |= {f"{name}_{part}": z for part, z in make.tokens(y, ctx.positions).items()}
    where = together(ctx)
    if cache is not None:
      ring, near, where = append_to_ring(cache["near"], near, ctx)
      tokens, tail = extend_tails(cache["tail"], tokens)
      cache = cache | {"near": ring, "tail": tail}
    o, lse = self.window(q, near["k"].astype(q.dtype), where)
    signals = {"near": o, "near_lse": lse[..., None]} | self.signals(x, q_input, ctx)
    o, cache, aux = self.sparse(q, signals, {}, tokens, ctx, cache)
    o = rope_last(o, -ctx.positions, c.rope_dim, c.rope_theta)
    return MixerOutput(self.out_proj(sharding.merge(self.by_group(o), 2)), cache, aux)

  def window(self, q, k, where):
    """Attention to the window, with the sinks: o and lse."""

    def core(q, k, sinks, where):
      # Not ``with_lse``, for which XLA attends alone: HCA's memory on a v6e is less then, but 948 MiB for 8192 tokens
      # and 2124 for twice as many (with the library's kernel beside it 1203 and 2111).
      return softmax_attention(q, k, k, window=self.config.window, sinks=sinks, **where)

    heads, one = ("batch", None, "heads", None), ("batch", None, None, None)
    run = sharding.local(core, (heads, one, ("heads",), axes_of(where)), (heads, heads[:3]))
    return run(q, k, sharding.put(self.sink[...], "heads"), where)

  def by_group(self, o):
    """[B, T, groups, out_rank]."""

    def core(o, w):
      return jnp.einsum("btgi,gir->btgr", o.reshape(*o.shape[:2], w.shape[0], -1), w)

    axis = "heads" if self.config.out_groups % sharding.size("heads") == 0 else None
    heads, groups = ("batch", None, axis, None), (axis, None, None)
    weight = sharding.put(self.group_proj[...], *groups).astype(o.dtype)
    return sharding.local(core, (heads, groups), heads)(o, weight)

  def signals(self, x, q_input, ctx):
    """What ``far`` needs of each query besides q."""
    return {}

  def summarise(self, place, tokens, cache, weights):
    m, pools = self.config.compress, {"position": tokens["position"]}
    for name, make in self.compressors().items():
      parts = make.with_before({part: tokens[f"{name}_{part}"] for part in ("c", "z")})
      pools |= {f"{name}_{part}": y for part, y in parts.items()}

    def entries(pools):
      position, out = pools["position"][:, :, 0, 0, 0], {}
      for name, make in self.compressors().items():
        parts = {
          n.removeprefix(f"{name}_"): y for n, y in pools.items() if n.startswith(f"{name}_")
        }
        out[name] = make.entries(parts, position, weights[name], self.config.rope_theta)
      return out

    offset = place.layout.positions[0] - self.compressor.reach
    return place.pools(entries, pools, m, m, cache, offset)

  def mix(self, place, q, signals, tokens, pools, weights):
    near = signals["near"], signals["near_lse"][..., 0]
    far, losses = self.far(place, q, near, signals, pools)
    return merge_attention(near, far)[0], losses

  def far(self, place, q, near, signals, pools):
    """Attention to the entries, o and lse, and the mixer's losses."""
    k = pools.values["k"]
    return pool_attention(q, k, k, pools.first, pools.complete, scale=self.K**-0.5), {}


@register(
  "hca",
  family="sparse",
  paper="DeepSeek-V4",
  title="a window, and heavily compressed keys, all of them",
  variants={"groups": dict(num_heads=4, out_groups=2)},
)
class HeavilyCompressedAttention(CompressedAttention):
  """An entry for every 128 tokens; all are seen."""


@register(
  "csa",
  family="sparse",
  paper="DeepSeek-V4",
  title="a window, and compressed keys chosen by an indexer",
  variants={"groups": dict(num_heads=4, out_groups=2)},
)
class CompressedSparseAttention(CompressedAttention):
  """An entry for every 4 tokens, made of 8; a lightning indexer with entries of its own chooses some.

  The indexer learns as in DSA (arXiv:2512.02556): the released code does not train.
  """

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(CompressedAttention.Config):
    """Attributes:
    top_k: entries that a query attends to.
    index_heads, index_dim, index_rope_dim: the indexer's heads, their channels, and the last of them, with RoPE.
    index_weight: of the indexer's loss.
    """

    compress: int = 4
    top_k: int = 512
    index_heads: int = 64
    index_dim: int = 128
    index_rope_dim: Natural = 64
    index_weight: Weight = 1.0

  overlap = True
  own_loss = ("index_",)

  def __init__(self, config, layer, key):
    super().__init__(config, layer, key)
    c, D = config, layer.d_model
    a, b, d = jax.random.split(jax.random.fold_in(key, 1), 3)
    self.index_q = Linear(a, c.q_lora_rank, c.index_heads * c.index_dim, (None, None))
    self.index_w = Linear(b, D, c.index_heads, ("embed", None))
    sizes = (c.compress, True, c.index_rope_dim, layer.norm_eps)
    self.index_compressor = Compressor(d, D, c.index_dim, *sizes)

  def compressors(self):
    return {"k": self.compressor, "index": self.index_compressor}

  def selected(self, length):
    return {"pools/k": min(self.config.top_k, length // self.config.compress)}

  def core_flops(self, length, decode):
    c = self.config
    index = 2.0 * c.index_heads * c.index_dim * super().entries_seen(length, decode)
    return super().core_flops(length, decode) + index

  def entries_seen(self, length, decode):
    return min(self.config.top_k, super().entries_seen(length, decode))

  def results(self, dense, cached):
    return {} if cached else {"indexer_loss": (), "indexer_recall": ()}

  def signals(self, x, q_input, ctx):
    c, x, y = self.config, *map(jax.lax.stop_gradient, (x, q_input))
    q = self.index_q(y).reshape(*x.shape[:2], c.index_heads, c.index_dim)
    q = rope_last(q, ctx.positions, c.index_rope_dim, c.rope_theta)
    w = self.index_w(x).astype(jnp.float32) * (c.index_heads * c.index_dim) ** -0.5
    return {"index_q": q[:, :, None], "index_w": w[:, :, None]}

  def far(self, place, q, near, signals, pools):
    c, k, keys = self.config, pools.values["k"], pools.values["index"][:, :, 0]
    (B, T), N = q.shape[:2], k.shape[1]
    index = signals["index_q"][:, :, 0], signals["index_w"][:, :, 0]
    places = pools.first, pools.complete
    if place.dense:
      out, loss, found = self.all_entries(q, near[1], index, keys, pools)
      return out, {"indexer_loss": c.index_weight * loss.mean(), "indexer_recall": found.mean()}

    def some(index, places):
      first, complete = places
      scores = index_scores(*index, keys, jnp.max(first + complete))[:, None]
      return select_blocks(scores, first, complete, complete - 1, top_k=c.top_k)[:, 0]

    rows = at_a_time(4 * B * N)
    chosen = over_queries(some, rows, index, places, checkpoint=False)
    # Entries have no place in time here: all that is chosen is seen.
    numbers = jnp.where(chosen >= 0, pools.first[..., None] + chosen, -1)[:, None]
    last = jnp.full(T, N - 1, jnp.int32)
    o, lse = block_sparse_attention(q, k, self.K, numbers, block_size=1, query_positions=last)
    if place.new is not None:
      return (o, lse), {}
    _, total = merge_attention(near, (o, lse))

    def of_chosen(q, total, chosen, index, places):
      first, complete = places
      choice = chosen[:, :, None], 1, first, complete - 1
      p, _ = chosen_weights(q, frozen, total, *choice, self.K**-0.5)
      p = sharding.mean_over("heads", p[:, :, 0, :, 0])
      own = jax.vmap(lambda keys, i: keys.at[i].get(mode="clip"))
      scores = LightningIndexer.scores_of_own(*index, own(keys, first[..., None] + chosen))
      return kl(p, scores, chosen >= 0)

    q, frozen, total = (jax.lax.stop_gradient(y) for y in (q, k, total))
    rows = at_a_time(4 * B * chosen.shape[-1] * (self.K + self.H))
    loss = over_queries(of_chosen, rows, q, total, chosen, index, places)
    few, some_near, some_index, (first, complete) = sampled((q, near[1], index, places))
    values = jax.lax.stop_gradient(pools.values)
    few_pools = dataclasses.replace(pools, values=values, first=first, complete=complete)
    _, _, found = self.all_entries(
      few, some_near, some_index, jax.lax.stop_gradient(keys), few_pools
    )
    return (o, lse), {"indexer_loss": c.index_weight * loss.mean(), "indexer_recall": found.mean()}

  def all_entries(self, q, near_lse, index, keys, pools):
    """Attention to all entries, the indexer's loss over them, and how much of the best it chooses."""
    c = self.config
    k, places, scale = pools.values["k"], (pools.first, pools.complete), self.K**-0.5
    o, lse = pool_attention(q, k, k, *places, scale=scale)

    def teach(q, total, first, complete, index):
      p = pool_weights(q, frozen, first, complete, scale=scale, lse=total)
      target = sharding.mean_over("heads", p.sum(axis=1) / q.shape[2])
      scores = index_scores(*index, keys, jnp.max(first + complete))

      def best(scores):
        return select_blocks(scores[:, None], first, complete, complete - 1, top_k=c.top_k)

      found = recall(best(scores), best(target), keys.shape[1])[:, 0]
      return kl(target, scores, pools.visible(first, complete)), found

    frozen, *args = jax.lax.stop_gradient((k, q, jnp.logaddexp(lse, near_lse)))
    loss, found = over_queries(teach, weights_at_a_time(q, k), *args, *places, index)
    return (o, lse), loss, found
