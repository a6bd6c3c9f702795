"""Scores of keys by an indexer's heads."""

from pallas_kernels.index_scores.api import index_scores

__all__ = ["index_scores"]
