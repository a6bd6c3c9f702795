"""InfLLM-V2, attention that is dense or sparse with the same weights (arXiv:2509.24663)."""

import dataclasses

import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.mixers import sparse_references
from attnlab.mixers.base import register
from attnlab.mixers.sparse import (
  Pools,
  SparseMixer,
  by_document,
)
from attnlab.settings import Natural
from pallas_kernels.block_sparse import over_queries, select_blocks
from pallas_kernels.pool_attention import pool_attention, pool_weights, weights_at_a_time


@register(
  "infllm2",
  family="sparse",
  paper="arXiv:2509.24663",
  title="a group's blocks by attention to pooled keys",
  aliases=("infllm_v2",),
  variants={"gqa": dict(num_heads=4, num_kv_heads=2, qk_norm=True, output_gate="element")},
)
class InfLLMV2(SparseMixer):
  """Selection without parameters (section 3): each head's softmax over the means of overlapping pools of keys, summed
  over the heads of a group; a block's score is the largest of the pools that reach into it. The first and the last
  blocks are always chosen. ``Context.dense`` switches to full attention, with the same keys and values."""

  reference = sparse_references.infllm2

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SparseMixer.Config):
    """The paper's sizes (section 4.1): of 96 blocks the first and the last 32 are forced.

    Attributes:
      block_size: tokens of a block.
      top_k: blocks of a query, forced ones among them.
      pool_size: tokens of a pool of keys, a multiple of pool_stride.
      pool_stride: tokens from one pool to the next; block_size is a multiple of it too.
      initial, local: blocks always chosen at the document's start, and up to the query's own.
      coarse_size: tokens of coarser pools, one each half of that, whose sum of exponentials is taken for the pools' own
        (the paper's LSE approximation: 128); None: no approximation. A query that sees no such pool does without.
    """

    block_size: int = 64
    top_k: int = 96
    pool_size: int = 32
    pool_stride: int = 16
    initial: Natural = 1
    local: int = 32
    coarse_size: int | None = None

  def __init__(self, config, layer, key):
    check_sizes(self.name, config, config.pool_size, config.pool_stride)
    coarse, size, stride = config.coarse_size, config.pool_size, config.pool_stride
    if coarse and (coarse % size or coarse % (2 * stride)):
      raise UserError(
        f"mixer {self.name!r}: coarse_size={coarse} must be a multiple of pool_size={size} and of"
        f" twice pool_stride={stride}"
      )
    super().__init__(config, layer, key)

  def pool_shapes(self, max_len):
    return {"k": (max(max_len // self.config.pool_stride, 1), self.Hkv, self.K)}

  def scored(self):
    return self.H * self.K, self.config.pool_stride

  def summarise(self, place, tokens, cache, weights):
    c = self.config
    mean = lambda pools: {"k": pools["k"].mean(axis=2)}  # noqa: E731
    return place.pools(mean, {"k": tokens["k"]}, c.pool_size, c.pool_stride, cache)

  def select(self, place, q, signals, tokens, pools):
    c, keys, scale = self.config, pools.values["k"], self.K**-0.5
    coarse = self.coarse(place, tokens, pools) if c.coarse_size else None

    def lse(q, keys, first, complete):
      return pool_attention(q, keys, keys[..., :1], first, complete, scale=scale)[1]

    def weights(q, first, complete, coarse_first=None, coarse_complete=None):
      norm = None
      if coarse is not None:
        norm = lse(q, coarse.values["k"], coarse_first, coarse_complete)
        without = jnp.where(coarse_complete > 0, 0, complete)
        norm = jnp.where(norm > -jnp.inf, norm, lse(q, keys, first, without))
      return pool_weights(q, keys, first, complete, scale=scale, lse=norm)

    def some(q, first, complete, within, *coarse_places):
      scores = by_document(weights(q, first, complete, *coarse_places), first)
      current = within // c.block_size
      best = largest_overlapping(scores, c.pool_size, c.pool_stride, c.block_size)
      forced = dict(initial=c.initial, local=c.local)
      zero = jnp.zeros_like(first)
      return select_blocks(best, zero, current + 1, current, top_k=c.top_k, **forced).swapaxes(1, 2)

    rows = weights_at_a_time(q, keys)
    args = q, pools.first, pools.complete, place.layout.within
    args += () if coarse is None else (coarse.first, coarse.complete)
    return over_queries(some, rows, *args, checkpoint=False).swapaxes(1, 2)

  def coarse(self, place, tokens, pools):
    """The coarser pools; behind a cache they are means of those that it has, of a document that begins with it."""
    c, size, stride = self.config, self.config.coarse_size, self.config.coarse_size // 2
    if place.new is None:
      mean = lambda pools: {"k": pools["k"].mean(axis=2)}  # noqa: E731
      return place.pools(mean, {"k": tokens["k"]}, size, stride)
    fine = pools.values["k"]
    first = jnp.arange(max(fine.shape[1] * c.pool_stride // stride, 1)) * (stride // c.pool_stride)
    parts = jnp.arange(size // c.pool_size) * (c.pool_size // c.pool_stride)
    keys = fine.at[:, first[:, None] + parts].get(mode="clip").mean(axis=2)
    complete = place.layout.complete(size, stride)
    return Pools({"k": keys}, jnp.zeros_like(complete), complete)


def check_sizes(name: str, config, size: int, stride: int) -> None:
  """UserError where blocks and pools do not fit, or more blocks are forced than chosen."""
  c = config
  if size % stride or c.block_size % stride:
    raise UserError(
      f"mixer {name!r}: pool_stride={stride} must divide pool_size={size} and "
      f"block_size={c.block_size}"
    )
  if c.initial + c.local > c.top_k:
    forced = c.initial + c.local
    raise UserError(f"mixer {name!r}: top_k={c.top_k} must be at least initial + local = {forced}")


def overlapping(scores, size: int, stride: int, block: int):
  """Scores [..., N] of pools as [..., blocks, w]: those of the w pools that reach into each block; of none, 0."""
  before, each = size // stride - 1, block // stride
  count = -(-scores.shape[-1] // each) + 1  # a last block may be reached into alone
  end = count * each - scores.shape[-1]
  padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(before, end)])
  return padded[..., jnp.arange(count)[:, None] * each + jnp.arange(before + each)]


def largest_overlapping(scores, size: int, stride: int, block: int):
  """The largest score of the pools that reach into each block."""
  return overlapping(scores, size, stride, block).max(axis=-1)
