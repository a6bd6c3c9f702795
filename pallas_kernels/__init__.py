"""Kernels for efficient attention: arrays in, arrays out. Needs jax alone."""

from pallas_kernels.block_sparse import block_sparse_attention, merge_attention
from pallas_kernels.delta_values import delta_values
from pallas_kernels.linear_recurrence import (
  KeyErase,
  LowRankErase,
  Recurrence,
  linear_recurrence,
  linear_recurrence_step,
)
from pallas_kernels.log_linear import log_linear_gated_delta_rule, log_linear_ssd
from pallas_kernels.mechanisms import (
  comba,
  delta_rule,
  gated_delta_product,
  gated_delta_rule,
  gdn2,
  gla,
  kda,
  lightning_attention,
  linear_attention,
  mamba3,
  mixture_of_memories,
  retention,
  rwkv6,
  rwkv7,
  ssd,
)
from pallas_kernels.mesa import mesa
from pallas_kernels.pool_attention import pool_attention, pool_weights
from pallas_kernels.simplicial_attention import simplicial_attention
from pallas_kernels.softmax_attention import softmax_attention

__all__ = [
  "KeyErase",
  "LowRankErase",
  "Recurrence",
  "block_sparse_attention",
  "comba",
  "delta_rule",
  "delta_values",
  "gated_delta_product",
  "gated_delta_rule",
  "gdn2",
  "gla",
  "kda",
  "lightning_attention",
  "linear_attention",
  "linear_recurrence",
  "linear_recurrence_step",
  "log_linear_gated_delta_rule",
  "log_linear_ssd",
  "mamba3",
  "merge_attention",
  "mesa",
  "mixture_of_memories",
  "pool_attention",
  "pool_weights",
  "retention",
  "rwkv6",
  "rwkv7",
  "simplicial_attention",
  "softmax_attention",
  "ssd",
]
