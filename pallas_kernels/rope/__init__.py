"""Rotary position embedding."""

from pallas_kernels.rope.api import rope, rope_heads

__all__ = ["rope", "rope_heads"]
