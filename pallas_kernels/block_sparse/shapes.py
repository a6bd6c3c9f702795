"""The real shapes that tests, costs and benchmarks share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
  """One block-sparse attention as a model runs it.

  Attributes:
    heads, kv_heads: of queries, and of keys and values.
    groups: of query heads that share a choice of blocks.
    key_dim, value_dim: channels of a head.
    block_size, top_k: tokens of a block, and blocks a query.
    window: that the same softmax sees besides.
    batch, length: B and T where none are asked for.
  """

  heads: int
  kv_heads: int
  groups: int
  key_dim: int
  value_dim: int
  block_size: int
  top_k: int
  window: int = 0
  batch: int = 1
  length: int = 65536


SHAPES = {
  "nsa": Shape(64, 4, 4, 192, 128, 64, 16),  # NSA 27B's selection branch, arXiv:2502.11089
  "moba": Shape(32, 8, 32, 128, 128, 4096, 12),  # MoBA's Llama-8B-1M, arXiv:2502.13189
  "infllm_v2": Shape(32, 2, 2, 128, 128, 64, 96),  # MiniCPM4 8B, arXiv:2509.24663
  "dsa": Shape(128, 1, 1, 576, 512, 1, 2048),  # DeepSeek-V3.2 in latent space, arXiv:2512.02556
  "minimax_m3": Shape(64, 4, 4, 128, 128, 128, 16),  # MiniMax-M3's block indexer
  # For a laptop.
  "cpu_nsa": Shape(4, 1, 1, 64, 64, 64, 4, length=2048),
}
