"""Patterns that do not look at the tokens, made causal: Longformer (arXiv:2004.05150), BigBird (arXiv:2007.14062)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from attnlab import sharding
from attnlab.mixers import sparse_references
from attnlab.mixers.base import register
from attnlab.mixers.softmax import SoftmaxAttention
from attnlab.mixers.sparse import SparseMixer
from attnlab.nn import Constant
from attnlab.settings import Natural
from pallas_kernels.block_sparse import at_a_time, over_queries, select_blocks


@register(
  "longformer",
  family="sparse",
  paper="arXiv:2004.05150",
  title="a window, which may be dilated, and global tokens",
  variants={"dilated": dict(num_heads=4, num_kv_heads=2, dilation=2)},
)
class Longformer(SparseMixer):
  """A query sees ``window`` tokens, itself and those one, two, ... dilations before it, and the first tokens of its
  document, which are global (section 3.1); that those see all that is before them is no more than causal attention."""

  reference = sparse_references.longformer

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SoftmaxAttention.Config):
    """Attributes:
    window: tokens that the window shows.
    dilation: the distance between them.
    initial: global tokens at a document's start.
    """

    window: int = 512
    dilation: int = 1
    initial: Natural = 1

  def selected(self, length):
    seen = min(self.config.window + self.config.initial, length)
    return {"k": seen, "v": seen}

  def core_flops(self, length, decode):
    w = min(self.config.window + self.config.initial, length)
    return 4.0 * self.H * self.K * (w if decode else w - w * (w - 1) / 2 / length)

  def mix(self, place, q, signals, tokens, pools, weights):
    c, within, k = self.config, place.layout.within, tokens["k"]
    first = jnp.arange(max(c.initial, 1))  # the kernel wants one
    seen = (first < c.initial) & (first <= within[..., None])
    chosen = jnp.where(seen, first, -1)
    options = {"sinks": weights.get("sinks"), "window": c.window}
    if c.dilation > 1:
      near = within[..., None] - c.dilation * jnp.arange(c.window)
      near = jnp.where(near >= c.initial, near, -1)  # a token counts once
      chosen = jnp.concatenate([chosen, near], axis=-1)
      del options["window"]
    B, T, S = chosen.shape
    indices = jnp.broadcast_to(chosen[:, None], (B, k.shape[2], T, S))
    return place.attend(q, k, tokens["v"], indices, 1, **options)[0], {}


@register(
  "bigbird",
  family="sparse",
  paper="arXiv:2007.14062",
  title="blocks: a window, global ones, random ones",
  variants={"gqa": dict(num_heads=4, num_kv_heads=2, sinks=True)},
)
class BigBird(SparseMixer):
  """A query sees its block and the last ones before it, its document's first blocks, and random blocks (section 2): for
  each block of a document others, in each layer others, in all heads and calls the same."""

  reference = sparse_references.bigbird

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SoftmaxAttention.Config):
    """The paper's base model (appendix E).

    Attributes:
      block_size: tokens of a block.
      initial, local, random: blocks at the document's start, up to the query's own, and anywhere between.
    """

    block_size: int = 64
    initial: Natural = 2
    local: int = 3
    random: Natural = 3

  def __init__(self, config, layer, key):
    super().__init__(config, layer, key)
    self.layer = Constant(jnp.asarray(layer.index, jnp.uint32))

  @property
  def top_k(self) -> int:
    """Blocks of a query."""
    return self.config.initial + self.config.local + self.config.random

  def selected(self, length):
    seen = min(self.top_k * self.config.block_size, length)
    return {"k": seen, "v": seen}

  def core_flops(self, length, decode):
    w = min(self.top_k * self.config.block_size, length)
    return 4.0 * self.H * self.K * (w if decode else w - w * (w - 1) / 2 / length)

  def weights(self):
    return {"layer": sharding.put(self.layer[...])}

  def mix(self, place, q, signals, tokens, pools, weights):
    c, k = self.config, tokens["k"]
    N = -(-k.shape[1] // c.block_size)

    def some(within):
      current = within // c.block_size
      scores = noise(current, jnp.arange(N), weights["layer"])
      options = dict(top_k=self.top_k, initial=c.initial, local=c.local)
      zero = jnp.zeros_like(current)
      chosen = select_blocks(scores[:, None], zero, current + 1, current, **options)
      return chosen.swapaxes(1, 2)

    rows = at_a_time(4 * q.shape[0] * N)
    chosen = over_queries(some, rows, place.layout.within, checkpoint=False).swapaxes(1, 2)
    indices = jnp.broadcast_to(chosen, (q.shape[0], k.shape[2], *chosen.shape[2:]))
    options = {"sinks": weights.get("sinks")}
    return place.attend(q, k, tokens["v"], indices, c.block_size, **options)[0], {}


def noise(
  block: Int[Array, "B T"], other: Int[Array, " N"], layer: UInt32[Array, ""]
) -> Float[Array, "B T N"]:
  """A number in [0, 1) for each pair of blocks of a layer, the same in every call: a hash (that of MurmurHash3)."""
  x = block.astype(jnp.uint32)[..., None] * jnp.uint32(0x9E3779B1) + other.astype(jnp.uint32)
  x = x + layer * jnp.uint32(0x85EBCA77)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return (x >> 8).astype(jnp.float32) * 2.0**-24
