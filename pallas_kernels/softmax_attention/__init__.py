"""Causal softmax attention."""

from pallas_kernels.softmax_attention.api import softmax_attention

__all__ = ["softmax_attention"]
