"""DeepSeek sparse attention: latent attention to the tokens that a lightning indexer chooses (arXiv:2512.02556)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import sparse_references
from attnlab.mixers.attention import gated, new_cache
from attnlab.mixers.base import MixerOutput, register
from attnlab.mixers.indexer import all_weights, chosen_weights, kl, recall, sampled
from attnlab.mixers.mla import MultiHeadLatentAttention
from attnlab.mixers.sparse import SparseCore, extend_tails
from attnlab.nn import Linear, param, rope_heads
from attnlab.settings import Natural, Weight
from pallas_kernels.block_sparse import at_a_time, over_queries, select_blocks
from pallas_kernels.index_scores import index_scores
from pallas_kernels.pool_attention import weights_at_a_time


class LayerNorm(nnx.Module):
  """``(x - mean) / std * scale + bias`` over the last axis, in float32 (arXiv:1607.06450)."""

  def __init__(self, size: int, eps: float = 1e-6):
    self.eps, key = eps, jax.random.key(0)
    self.scale = param(key, jax.nn.initializers.ones, (size,), (None,))
    self.bias = param(key, jax.nn.initializers.zeros, (size,), (None,))

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    y = y * sharding.put(self.scale[...], None) + sharding.put(self.bias[...], None)
    return y.astype(x.dtype)


class LightningIndexer(nnx.Module):
  """``I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s)`` (equation 1): heads of queries, one key.

  With pools (GLM-5-Next) ``pool`` tokens have one key: the softmax of a gate over them, by channel, weighs theirs.
  """

  def __init__(self, config, inputs: int, d_model: int, key):
    c, keys = config, jax.random.split(key, 5)
    self.config = config
    self.q_proj = Linear(keys[0], inputs, c.index_heads * c.index_dim, ("embed", None))
    self.k_proj = Linear(keys[1], d_model, c.index_dim, ("embed", None))
    self.k_norm = LayerNorm(c.index_dim)
    self.w_proj = Linear(keys[2], d_model, c.index_heads, ("embed", None))
    if c.pool > 1:
      self.gate_proj = Linear(keys[3], d_model, c.index_dim, ("embed", None))
      zeros = jax.nn.initializers.zeros
      self.places = param(keys[4], zeros, (c.pool, c.index_dim), (None, None), weight_decay=False)

  def queries(self, x, query_input, ctx):
    """Queries [B, T, 1, heads, dim] and their weights [B, T, 1, heads], scaled."""
    c, x, y = self.config, *map(jax.lax.stop_gradient, (x, query_input))
    q = self.rotated(self.q_proj(y), ctx).reshape(*x.shape[:2], 1, c.index_heads, c.index_dim)
    w = self.w_proj(x).astype(jnp.float32) * (c.index_heads * c.index_dim) ** -0.5
    return {"index_q": q, "index_w": w[:, :, None]}

  def keys(self, x, ctx):
    """Of tokens: keys [B, T, 1, dim], and gates if they are pooled."""
    x = jax.lax.stop_gradient(x)
    out = {"index_k": self.rotated(self.k_norm(self.k_proj(x)), ctx)[:, :, None]}
    return out if self.config.pool == 1 else out | {"index_u": self.gate_proj(x)[:, :, None]}

  def rotated(self, y, ctx):
    c, fraction = self.config, self.config.index_rope_dim / self.config.index_dim
    turn = (c.rope_theta, fraction, c.rope_scaling)
    return rope_heads(y, ctx.positions, c.index_dim, *turn, axis=None)

  @staticmethod
  def pooled(weights, tokens):
    """The key of each pool, from its tokens [B, n, pool, 1, dim]."""
    if "index_u" not in tokens:
      return {"k": tokens["index_k"][:, :, 0]}
    gate = (tokens["index_u"] + weights["places"][:, None]).astype(jnp.float32)
    gate = jax.nn.softmax(gate, axis=2).astype(tokens["index_k"].dtype)
    return {"k": jnp.sum(gate * tokens["index_k"], axis=2)}

  @staticmethod
  def scores_of_own(q, w, k):
    """[B, t, n] of queries [B, t, heads, dim] and their weights with keys that each has for itself, [B, t, n, dim]."""
    dot = jnp.einsum("bthd,btnd->bthn", q, k, precision="highest", preferred_element_type=w.dtype)
    return jnp.einsum("bthn,bth->btn", jax.nn.relu(dot), w, precision="highest")


@register(
  "dsa",
  family="sparse",
  paper="arXiv:2512.02556",
  title="latent attention to tokens chosen by an indexer",
  variants={
    "gated": dict(output_gate="head"),
    "pooled_nope": dict(pool=2, top_k=4, q_lora_rank=8, rope_dim=0, index_rope_dim=0),
    "shared": dict(share="give"),
  },
)
class DeepSeekSparseAttention(SparseCore, MultiHeadLatentAttention):
  """Multi-query attention on the latents of chosen tokens.

  Choosing has no gradient: the indexer, whose input is detached, learns from its own loss alone, the divergence of its
  softmax from the mean weights of the attention heads: over everything where ``Context.dense`` is set (equation 3, the
  warm-up, where everything else is frozen), over the chosen tokens otherwise (equation 4).
  """

  reference = sparse_references.dsa

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(MultiHeadLatentAttention.Config):
    """The indexer of DeepSeek-V3.2; the rest is ``MultiHeadLatentAttention.Config``'s.

    Attributes:
      top_k: tokens that a query attends to.
      index_heads, index_dim, index_rope_dim: the indexer's heads, their channels, and those of them with RoPE.
      index_weight: of the indexer's loss.
      pool: tokens that have one key and are chosen together; those of a pool that is not full yet, always
        (GLM-5-Next: 16).
      share: "give": hand the choice on; "take": have no indexer, and the choice that the last such layer gave (GLM).
    """

    top_k: int = 2048
    index_heads: int = 64
    index_dim: int = 128
    index_rope_dim: Natural = 64
    index_weight: Weight = 1.0
    pool: int = 1
    share: Literal["none", "give", "take"] = "none"

  own_loss = ("indexer",)
  Hkv = 1
  head_axis = "heads"

  def __init__(self, config, layer, key):
    c = config
    if c.top_k % c.pool:
      raise UserError(f"mixer {self.name!r}: top_k={c.top_k} is not a multiple of pool={c.pool}")
    super().__init__(config, layer, key)
    self.K = c.kv_lora_rank + c.rope_dim
    inputs = c.q_lora_rank or layer.d_model
    key = jax.random.fold_in(key, 1)
    takes = c.share == "take"
    self.indexer = None if takes else LightningIndexer(c, inputs, layer.d_model, key)

  @classmethod
  def shared(cls, config, d_model):
    slots = config.top_k // config.pool + (config.pool > 1)
    return {} if config.share == "none" else {"dsa_chosen_ids": (slots,)}

  def selected(self, length):
    return {"k": min(self.config.top_k, length)}

  def core_flops(self, length, decode):
    """Of attention in latent space, and of the indexer."""
    c = self.config
    n = min(c.top_k, length)
    seen = n if decode else n - n * (n - 1) / 2 / length
    index = 0 if c.share == "take" else 2.0 * c.index_heads * c.index_dim * length / c.pool
    return 2.0 * self.H * (2 * c.kv_lora_rank + c.rope_dim) * seen + index / (1 if decode else 2)

  def init_cache(self, batch, max_len, dtype=jnp.float32):
    """Latents, the indexer's keys, one for a pool, and what the next pool needs."""
    c = self.config
    cache = new_cache(batch, max_len, {"k": (1, self.K)}, dtype) | {"pools": {}, "tail": {}}
    if self.indexer is not None:
      names = ("index_k", "index_u")[: 1 + (c.pool > 1)]
      empty = lambda n: jnp.zeros((batch, n, 1, c.index_dim), dtype)  # noqa: E731
      cache["pools"] = {"k": empty(max(max_len // c.pool, 1))}
      cache["tail"] = {name: empty(c.pool - 1) for name in names}
    return cache

  def weights(self):
    pooled = self.indexer is not None and self.config.pool > 1
    return {"places": sharding.put(self.indexer.places[...], None, None)} if pooled else {}

  def results(self, dense, cached):
    out = {"chosen": ("batch", None, None)} if self.config.share == "give" else {}
    if not cached and self.indexer is not None:
      out |= {"indexer_loss": (), "indexer_recall": ()}
    return out

  def __call__(self, x, ctx, cache=None):
    c = self.config
    q, latent = self.projected(x, ctx)
    if self.indexer is None:
      signals, index = {"chosen": ctx.shared["dsa_chosen_ids"][:, :, None]}, {}
    else:
      signals = self.indexer.queries(x, self.query_input(x), ctx)
      index = self.indexer.keys(x, ctx)
      if cache is not None:
        index, tail = extend_tails(cache["tail"], index)
        cache = cache | {"tail": tail}
    q = self.into_latent(q)
    o, cache, aux = self.sparse(q, signals, {"k": latent[:, :, None]}, index, ctx, cache)
    o = gated(self.out_of_latent(o), x, self.gate_proj)
    # Numbers from 1: what no layer has handed on is zero.
    shared = {"dsa_chosen_ids": aux.pop("chosen") + 1} if c.share == "give" else {}
    return MixerOutput(self.out_proj(sharding.merge(o, 2)), cache, aux, shared)

  def summarise(self, place, tokens, cache, weights):
    if self.indexer is None:
      return None
    pool = self.config.pool
    index = {name: y for name, y in tokens.items() if name.startswith("index_")}
    make = lambda pools: LightningIndexer.pooled(weights, pools)  # noqa: E731
    offset = place.layout.positions[0] - pool + 1
    return place.pools(make, index, pool, pool, cache, offset)

  def select(self, place, signals, pools):
    """The chosen pools, and the one that is not full: [B, T, 1, S]."""
    c = self.config
    if self.indexer is None:
      return signals["chosen"] - 1
    keys = pools.values["k"][:, :, 0]
    B, N = keys.shape[:2]

    def some(q, w, first, complete, within):
      end = jnp.max(first + complete)
      scores = index_scores(q[:, :, 0], w[:, :, 0], keys, end)[:, None]
      current = within // c.pool
      chosen = select_blocks(scores, first, complete, current, top_k=c.top_k // c.pool)[:, 0]
      if c.pool > 1:
        rest = jnp.where((within + 1) % c.pool > 0, current, -1)
        chosen = jnp.concatenate([chosen, rest[..., None]], axis=-1)
      return chosen[:, :, None]

    args = signals["index_q"], signals["index_w"], pools.first, pools.complete, place.layout.within
    rows = at_a_time(4 * B * N)
    chosen = over_queries(some, rows, *args, checkpoint=False)
    if c.share == "give":
      missing = self.shared(c, 0)["dsa_chosen_ids"][0] - chosen.shape[-1]
      chosen = jnp.pad(chosen, ((0, 0),) * 3 + ((0, missing),), constant_values=-1)
    return chosen

  def mix(self, place, q, signals, tokens, pools, weights):
    c, k = self.config, tokens["k"]
    chosen = self.select(place, signals, pools)
    options = dict(block_size=c.pool, scale=self.scale)
    o, lse = place.attend(q, k, c.kv_lora_rank, chosen.swapaxes(1, 2), **options)
    out = {"chosen": chosen[:, :, 0]}
    if place.new is None and self.indexer is not None:
      out |= self.losses(place, q, k, lse, chosen, signals, pools)
    return o, out

  def losses(self, place, q, k, lse, chosen, signals, pools):
    """The indexer's loss, and how much of the best it chooses: of all queries if they see everything, else of some."""
    c, layout, keys = self.config, place.layout, pools.values["k"][:, :, 0]
    (B, _, H, L), N = q.shape, keys.shape[1]
    q, k, lse = (jax.lax.stop_gradient(y) for y in (q, k, lse))
    index = signals["index_q"][:, :, 0], signals["index_w"][:, :, 0]
    places = pools.first, pools.complete, layout.starts, layout.within

    def of_chosen(q, lse, chosen, index, places):
      first, complete, starts, within = places
      p, _ = chosen_weights(q, k, lse, chosen, c.pool, starts, within, self.scale)
      p = sharding.mean_over("heads", p.sum(axis=-1)[:, :, 0])
      chosen = chosen[:, :, 0]
      own = jax.vmap(lambda keys, i: keys.at[i].get(mode="clip"))
      scores = LightningIndexer.scores_of_own(*index, own(keys, first[..., None] + chosen))
      return kl(p, scores, (chosen >= 0) & (chosen < complete[..., None]))

    def of_all(q, index, places):
      first, complete, starts, within = places
      p, _ = all_weights(q, k, starts, within, self.scale)
      rows = pools.columns[..., None] + jnp.arange(c.pool)
      p = jax.vmap(lambda p, rows: p.at[:, rows].get(mode="clip"))(p[:, 0], rows).sum(axis=-1)
      p = sharding.mean_over("heads", p)
      scores = index_scores(*index, keys, jnp.max(first + complete))

      def best(scores):
        options = dict(top_k=c.top_k // c.pool)
        return select_blocks(scores[:, None], first, complete, within // c.pool, **options)

      found = recall(best(scores), best(p), N)[:, 0]
      return kl(p, scores, pools.visible(first, complete)), found

    every = q, index, places
    if place.dense:
      loss, found = over_queries(of_all, weights_at_a_time(q, k), *every)
    else:
      row = 4 * B * chosen.shape[-1] * c.pool * (L + H)
      loss = over_queries(of_chosen, at_a_time(row), q, lse, chosen, index, places)
      _, found = over_queries(of_all, weights_at_a_time(q, k), *sampled(every))
    return {"indexer_loss": c.index_weight * loss.mean(), "indexer_recall": found.mean()}
