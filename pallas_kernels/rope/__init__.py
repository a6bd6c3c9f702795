"""Rotary position embedding."""

from pallas_kernels.rope.api import rope, rope_heads
from pallas_kernels.rope.frequencies import Scaling

__all__ = ["Scaling", "rope", "rope_heads"]
