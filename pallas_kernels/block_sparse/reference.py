"""The definition: a dense mask and all logits at once. Memory grows with Tq Tk; JAX differentiates it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.block_sparse.layout import Layout


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


def check(*args) -> None:
  """Serves every call."""


def forward(
  q: Float[Array, "B Tq H D"],
  k: Float[Array, "B Tk Hkv D"],
  v: Float[Array, "B Tk Hkv V"],
  sinks: Float[Array, " H"] | None,
  blocks: Blocks,
  scale: float,
) -> tuple[Float[Array, "B Tq H V"], Float[Array, "B Tq H"]]:
  """``o_t = sum_s exp(scale q_t . k_s - lse_t) v_s`` over the keys s of t's blocks and window."""
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  H = q.shape[2]
  k, v = (jnp.repeat(x.astype(dtype), H // x.shape[2], axis=2) for x in (k, v))
  mask = blocks.mask(k.shape[1])
  mask = jnp.repeat(mask, H // mask.shape[1], axis=1)
  logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q.astype(dtype), k, precision="highest")
  logits = jnp.where(mask, logits, -jnp.inf)
  top = jnp.max(logits, axis=-1)
  if sinks is not None:
    sinks = sinks.astype(dtype)[:, None]
    top = jnp.maximum(top, sinks)
  # A row that sees nothing: finite numbers all the way, so that gradients are too, and zeros at the end.
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
  p = jnp.where(mask, jnp.exp(jnp.where(mask, logits, 0) - top[..., None]), 0)
  total = jnp.sum(p, axis=-1) + (0 if sinks is None else jnp.exp(sinks - top))
  some = total > 0
  total = jnp.where(some, total, 1)
  o = jnp.einsum("bhqk,bkhv->bqhv", p / total[..., None], v, precision="highest")
  lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
  return o.astype(q.dtype), jnp.swapaxes(lse, 1, 2)
