"""The definition: a dense mask and all logits at once. Memory grows with Tq Tk; JAX differentiates it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_sparse.layout import Layout
from pallas_kernels.softmax_attention.reference import attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
  """What each query sees: the arguments of ``block_sparse_attention`` that are not q, k, v and sinks."""

  indices: Int[Array, "B G Tb S"]
  layout: Layout
  size: int = dataclasses.field(metadata=dict(static=True))
  query_block: int = dataclasses.field(default=1, metadata=dict(static=True))
  window: int = dataclasses.field(default=0, metadata=dict(static=True))

  def mask(self, Tk: int) -> Bool[Array, "B G Tq Tk"]:
    """True where a query of a group sees a key."""
    layout, count = self.layout, -(-Tk // self.size)
    numbers = self.indices[..., None] == jnp.arange(count)
    chosen = jnp.repeat(jnp.any(numbers, axis=3), self.query_block, axis=2)
    chosen = chosen[:, :, : layout.positions.shape[0]]
    keys, starts = jnp.arange(Tk), layout.starts[:, :, None]
    causal = (keys >= starts) & (keys <= layout.positions[:, None])
    block = jnp.clip((keys - starts) // self.size, 0, count - 1)
    block = jnp.broadcast_to(block[:, None], (*chosen.shape[:3], Tk))
    near = keys > layout.positions[:, None] - self.window
    return causal[:, None] & (jnp.take_along_axis(chosen, block, axis=3) | near)

  def last_seen(self, T: int) -> Int[Array, "B T"]:
    """The last key that each query sees of its blocks, -1 where none; padded to T queries."""
    layout = self.layout
    last = jnp.where(layout.positions >= 0, layout.positions - self.window, -1)
    last = jnp.where(last >= layout.starts, last, -1)
    return jnp.pad(last, ((0, 0), (0, T - last.shape[1])), constant_values=-1).astype(jnp.int32)


def values_of(k: Float[Array, "B Tk Hkv D"], v: Array | int) -> Float[Array, "B Tk Hkv V"]:
  """The values, where they may be given as a number: so many channels of the keys."""
  return k[..., :v] if isinstance(v, int) else v


def check(*args) -> None:
  """Serves every call."""


def forward(
  q: Float[Array, "B Tq H D"],
  k: Float[Array, "B Tk Hkv D"],
  v: Float[Array, "B Tk Hkv V"] | int,
  sinks: Float[Array, " H"] | None,
  blocks: Blocks,
  scale: float,
) -> tuple[Float[Array, "B Tq H V"], Float[Array, "B Tq H"]]:
  """Softmax attention of each query over its blocks and window: the outputs, and lse. v as in ``values_of``."""
  mask = blocks.mask(k.shape[1])
  mask = jnp.repeat(mask, q.shape[2] // mask.shape[1], axis=1)
  return attend(q, k, values_of(k, v), sinks, mask, scale)
