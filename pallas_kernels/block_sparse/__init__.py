"""Attention of each query to blocks of keys that were chosen for it, and the choice of blocks."""

from pallas_kernels.block_sparse.api import block_sparse_attention, merge_attention
from pallas_kernels.block_sparse.layout import Layout
from pallas_kernels.block_sparse.select import over_queries, select_blocks
from pallas_kernels.dispatch import at_a_time

__all__ = [
  "Layout",
  "at_a_time",
  "block_sparse_attention",
  "merge_attention",
  "over_queries",
  "select_blocks",
]
