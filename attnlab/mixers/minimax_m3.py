"""MiniMax sparse attention: each group's blocks by an indexer (arXiv:2606.13392, MiniMax-M3)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import sparse_references
from attnlab.mixers.base import register
from attnlab.mixers.indexer import (
  all_weights,
  chosen_keys,
  chosen_weights,
  kl,
  recall,
  sampled,
)
from attnlab.mixers.sparse import SparseMixer, products
from attnlab.nn import Linear, RMSNorm, rope_heads
from attnlab.settings import Weight
from pallas_kernels.block_sparse import at_a_time, over_queries, select_blocks
from pallas_kernels.pool_attention import weights_at_a_time


@register(
  "minimax_m3",
  family="sparse",
  paper="arXiv:2606.13392",
  title="a group's blocks by an indexer's largest product",
  aliases=("msa",),
  variants={"gqa": dict(num_heads=4, num_kv_heads=2, rope_fraction=0.5)},
)
class MiniMaxM3(SparseMixer):
  """Grouped heads with norm and RoPE; an indexer has a query for each group and one key for all. A block's score is the
  largest product over its keys; the query's own block is always chosen.

  Choosing has no gradient: the indexer learns, from its own loss alone and with its input detached, to give tokens the
  weights that attention gives them, over the chosen blocks, or over everything where ``Context.dense`` is set: the
  first stage of its training. The loss's form is DSA's (arXiv:2512.02556, equations 3 and 4).
  """

  reference = sparse_references.minimax_m3

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SparseMixer.Config):
    """MiniMax-M3's sizes.

    Attributes:
      block_size: tokens of a block.
      top_k: blocks of a query, its own among them.
      index_dim: channels of the indexer's queries and keys.
      index_weight: of the indexer's loss.
    """

    block_size: int = 128
    top_k: int = 16
    qk_norm: bool = True
    index_dim: int = 128
    index_weight: Weight = 1.0

  own_loss = ("index_",)

  def __init__(self, config, layer, key):
    super().__init__(config, layer, key)
    d = config.index_dim
    a, b = jax.random.split(jax.random.fold_in(key, 1))
    self.index_q_proj = Linear(a, layer.d_model, self.Hkv * d)
    self.index_k_proj = Linear(b, layer.d_model, d, ("embed", None))
    self.index_q_norm, self.index_k_norm = (RMSNorm(d, layer.norm_eps) for _ in range(2))

  def _turned(self, y, ctx, axis):
    c = self.config
    turn = (c.rope_theta, c.rope_fraction, c.rope_scaling)
    return rope_heads(y, ctx.positions, c.index_dim, *turn, axis)

  def signals(self, x, ctx):
    q = self.index_q_norm.heads(self.index_q_proj(jax.lax.stop_gradient(x)))
    q = self._turned(q, ctx, "heads")
    return {"index_q": sharding.split(q, self.Hkv, self.config.index_dim)}

  def kept(self, x, ctx):
    k = self.index_k_norm(self.index_k_proj(jax.lax.stop_gradient(x)))
    return {"index_k": self._turned(k, ctx, None)[:, :, None]}

  def kept_shapes(self):
    return super().kept_shapes() | {"index_k": (1, self.config.index_dim)}

  def scored(self):
    return self.Hkv * self.config.index_dim, 1

  def results(self, dense, cached):
    return {} if cached else {"indexer_loss": (), "indexer_recall": ()}

  def index(self, q, k):
    """Scores [B, G, t, N] of keys [B, N, 1, d]."""
    k = jnp.broadcast_to(k, (*k.shape[:2], q.shape[2], k.shape[3]))
    return products(q[:, :, :, None], k, q.shape[-1] ** -0.5)[:, :, 0]

  def select(self, place, q, signals, tokens, pools):
    c, index_q = self.config, signals["index_q"]
    blocks = place.blocks({"k": tokens["index_k"]}, c.block_size)
    keys = blocks.values["k"]
    B, N, size = keys.shape[:3]

    def some(q, first, complete, within):
      scores = self.index(q, keys.reshape(B, N * size, 1, -1))
      scores = scores.reshape(*scores.shape[:3], N, size).max(axis=-1)
      current = within // size
      chosen = select_blocks(scores, first, complete, current, top_k=c.top_k, local=1)
      return chosen.swapaxes(1, 2)

    rows = at_a_time(4 * B * index_q.shape[2] * N * size)
    args = index_q, blocks.first, blocks.complete, place.layout.within
    return over_queries(some, rows, *args, checkpoint=False).swapaxes(1, 2)

  def mix(self, place, q, signals, tokens, pools, weights):
    c, k = self.config, tokens["k"]
    indices = self.select(place, q, signals, tokens, pools)
    options = {"sinks": weights.get("sinks")}
    o, lse = place.attend(q, k, tokens["v"], indices, c.block_size, **options)
    if place.new is not None:
      return o, {}
    index_k, scale = tokens["index_k"], self.K**-0.5
    layout, G = place.layout, k.shape[2]

    def of_chosen(q, index_q, lse, indices, starts, within):
      spot = indices, c.block_size, starts
      p, seen = chosen_weights(q, k, lse, *spot, within, scale)
      keys = jnp.broadcast_to(index_k, (*index_k.shape[:2], G, c.index_dim))
      keys = chosen_keys(keys, *spot)
      scores = jnp.einsum(
        "btgd,btgspd->btgsp", index_q, keys, precision="highest", preferred_element_type=p.dtype
      )
      flat = lambda x: x.reshape(*x.shape[:3], -1)  # noqa: E731
      return kl(flat(p), flat(scores) * c.index_dim**-0.5, flat(seen))

    columns, first = layout.table(c.block_size, c.block_size)
    rows = columns[..., None] + jnp.arange(c.block_size)
    places = first, layout.complete(c.block_size, c.block_size), layout.starts, layout.within

    def of_all(q, index_q, places):
      first, complete, starts, within = places
      p, seen = all_weights(q, k, starts, within, scale)
      scores, current = self.index(index_q, index_k), within // c.block_size

      def best(blocks):
        """Besides the query's own."""
        chosen = select_blocks(blocks, first, complete, current, top_k=c.top_k, local=1)
        return jnp.where(chosen == current[:, None, :, None], -1, chosen)

      by_block = jax.vmap(lambda x, rows: x.at[:, :, rows].get(mode="clip"))
      heaviest, largest = by_block(p, rows).sum(axis=-1), by_block(scores, rows).max(axis=-1)
      found = recall(best(largest), best(heaviest), rows.shape[1])
      return kl(p, scores, seen[:, None]).swapaxes(1, 2), found.swapaxes(1, 2)

    q, k, lse = (jax.lax.stop_gradient(y) for y in (q, k, lse))
    B, T, H = q.shape[:3]
    every = q, signals["index_q"], places
    if place.dense:
      loss, found = over_queries(of_all, weights_at_a_time(q, k), *every)
    else:
      args = q, signals["index_q"], lse, indices.swapaxes(1, 2), layout.starts, layout.within
      row = 4 * B * G * indices.shape[-1] * c.block_size * (self.K + H // G)
      loss = over_queries(of_chosen, at_a_time(row), *args)
      _, found = over_queries(of_all, weights_at_a_time(q, k), *sampled(every))
    return o, {"indexer_loss": c.index_weight * loss.mean(), "indexer_recall": found.mean()}
