"""Attention of each query to summaries of complete pools of tokens, and what it weighs them with."""

from pallas_kernels.pool_attention.api import pool_attention, pool_weights, weights_at_a_time

__all__ = ["pool_attention", "pool_weights", "weights_at_a_time"]
