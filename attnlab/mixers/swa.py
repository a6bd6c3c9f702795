"""Sliding-window attention (arXiv:2004.05150)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.mixers import references
from attnlab.mixers.attention import append_to_ring
from attnlab.mixers.base import Cache, register
from attnlab.mixers.softmax import SoftmaxAttention


@register(
  "swa",
  family="softmax",
  paper="arXiv:2004.05150",
  title="attention over a sliding window",
  variants={"sinks": dict(num_heads=4, num_kv_heads=2, sinks=True)},
)
class SlidingWindowAttention(SoftmaxAttention):
  """Softmax attention in which a token sees the last ``window`` tokens, itself included; the cache is their ring."""

  reference = references.sliding_window

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SoftmaxAttention.Config):
    """Attributes:
    window: how many tokens a token sees.
    """

    window: int = 128

  def __init__(self, config: Config, layer, key):
    super().__init__(config, layer, key)
    self.window = config.window

  def init_cache(
    self, batch: int, max_len: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> Cache:
    return super().init_cache(batch, self.window, dtype)

  def remember(self, cache, k, v, ctx):
    cache, seen, where = append_to_ring(cache, {"k": k, "v": v}, ctx)
    return cache, seen["k"], seen["v"], where
