"""MoBA, mixture of block attention (arXiv:2502.13189)."""

import dataclasses

from attnlab.mixers import sparse_references
from attnlab.mixers.base import register
from attnlab.mixers.sparse import SparseMixer, grouped, products
from pallas_kernels.block_sparse import at_a_time, over_queries, select_blocks


@register(
  "moba",
  family="sparse",
  paper="arXiv:2502.13189",
  title="each head's blocks by their mean keys",
  variants={"gqa": dict(num_heads=4, num_kv_heads=2, rope_fraction=0.0, sinks=True)},
)
class MoBA(SparseMixer):
  """A head's query attends to the block it is in, and to the earlier blocks whose mean key has the largest product with
  it (equations 5 and 6). No parameters beyond full attention's."""

  reference = sparse_references.moba

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SparseMixer.Config):
    """The defaults are those of the paper's scaling laws (section 3.1): blocks of 512, and 3 of them.

    Attributes:
      block_size: tokens of a block.
      top_k: blocks of a query, its own among them.
    """

    block_size: int = 512
    top_k: int = 3

  def pool_shapes(self, max_len):
    return {"k": (max(max_len // self.config.block_size, 1), self.Hkv, self.K)}

  def scored(self):
    return self.H * self.K, self.config.block_size

  def summarise(self, place, tokens, cache, weights):
    size = self.config.block_size
    mean = lambda blocks: {"k": blocks["k"].mean(axis=2)}  # noqa: E731
    return place.pools(mean, {"k": tokens["k"]}, size, size, cache)

  def select(self, place, q, signals, tokens, pools):
    c, keys = self.config, pools.values["k"]
    B, N, Hkv = keys.shape[:3]

    def some(q, first, complete, within):
      scores = products(grouped(q, Hkv), keys)
      scores = scores.reshape(B, -1, *scores.shape[3:])
      current = within // c.block_size
      chosen = select_blocks(scores, first, complete, current, top_k=c.top_k, local=1)
      return chosen.swapaxes(1, 2)

    rows = at_a_time(4 * B * q.shape[2] * N)
    args = q, pools.first, pools.complete, place.layout.within
    return over_queries(some, rows, *args, checkpoint=False).swapaxes(1, 2)
