"""What mixers with a trained indexer share: the loss that teaches it what attention sees, some queries at a time, and
how much of the best it chooses."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnlab.mixers.sparse import grouped
from pallas_kernels.pool_attention import pool_weights

# Queries of a row, evenly spaced, whose recall is measured where attention is sparse: it takes all of their logits.
SAMPLED = 16


def sampled(tree: Any, count: int = SAMPLED) -> Any:
  """Of arrays [B, T, ...] what stands at ``count`` places of T, the last one among them; without gradient."""

  def take(x):
    T = x.shape[1]
    n = min(count, T)
    return jax.lax.stop_gradient(x)[:, [(i + 1) * T // n - 1 for i in range(n)]]

  return jax.tree.map(take, tree)


def kl(
  target: Float[Array, "... N"], scores: Float[Array, "... N"], seen: Bool[Array, "... N"]
) -> Float[Array, "..."]:
  """``KL(p || softmax(scores))`` over what is seen, p the target with its sum made 1; zero where that is zero.

  No gradient reaches the target.
  """
  target = jax.lax.stop_gradient(jnp.where(seen, target, 0))
  total = target.sum(axis=-1, keepdims=True)
  p = target / jnp.where(total > 0, total, 1)
  scores = jnp.where(seen, scores, 0)
  top = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1, keepdims=True)
  scores = scores - jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
  norm = jnp.sum(jnp.where(seen, jnp.exp(scores), 0), axis=-1, keepdims=True)
  log_q = scores - jnp.log(jnp.where(norm > 0, norm, 1))
  return jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - log_q), 0), axis=-1)


def chosen_keys(
  x: Float[Array, "B Tk G D"], indices: Int[Array, "B t G S"], size: int, starts
) -> Float[Array, "B t G S size D"]:
  """The rows of x in the chosen blocks of some queries, whose documents begin at ``starts`` [B, t]."""
  first = starts[:, :, None, None] + jnp.maximum(indices, 0) * size
  rows = first[..., None] + jnp.arange(size)
  groups = jnp.arange(x.shape[2])[:, None, None]
  return jax.vmap(lambda x, rows: x.at[rows, groups].get(mode="clip"))(x, rows)


def chosen_weights(
  q: Float[Array, "B t H D"],
  k: Float[Array, "B Tk G D"],
  lse: Float[Array, "B t H"],
  indices: Int[Array, "B t G S"],
  size: int,
  starts: Int[Array, "B t"],
  within: Int[Array, "B t"],
  scale: float,
) -> tuple[Float[Array, "B t G S size"], Bool[Array, "B t G S size"]]:
  """The weights that attention gives to its chosen blocks, the mean over the heads of a group, and what is seen."""
  G = k.shape[2]
  keys = chosen_keys(k, indices, size, starts)
  logits = scale * jnp.einsum(
    "btgrd,btgspd->btgrsp",
    grouped(q, G),
    keys,
    precision="highest",
    preferred_element_type=lse.dtype,
  )
  inside = indices[..., None] * size + jnp.arange(size)
  seen = (indices[..., None] >= 0) & (inside <= within[:, :, None, None, None])
  lse = lse.reshape(*lse.shape[:2], G, -1)[..., None, None]
  p = jnp.where(seen[:, :, :, None], jnp.exp(logits - lse), 0)
  return p.mean(axis=3), seen


def all_weights(
  q: Float[Array, "B t H D"],
  k: Float[Array, "B Tk G D"],
  starts: Int[Array, "B t"],
  within: Int[Array, "B t"],
  scale: float,
) -> tuple[Float[Array, "B G t Tk"], Bool[Array, "B t Tk"]]:
  """The weights of full attention of some queries, the mean over the heads of a group, and what is seen."""
  number = jnp.arange(k.shape[1]) - starts[..., None]
  seen = (number >= 0) & (number <= within[..., None])
  p = pool_weights(q, k, starts, within + 1, scale=scale)
  return p * (k.shape[2] / q.shape[2]), seen


def recall(
  chosen: Int[Array, "B G t S"], best: Int[Array, "B G t S"], count: int
) -> Float[Array, "B G t"]:
  """The share of the best of ``count`` numbers (-1: none) that is among the chosen; 1 where there are none."""
  member = jnp.zeros((*chosen.shape[:-1], count + 1), bool)
  at = jnp.where(chosen < 0, count, chosen)
  member = jnp.put_along_axis(member, at, True, axis=-1, inplace=False)
  hit = jnp.take_along_axis(member, jnp.maximum(best, 0), axis=-1) & (best >= 0)
  total = jnp.sum(best >= 0, axis=-1)
  return jnp.where(total > 0, hit.sum(axis=-1) / jnp.maximum(total, 1), 1.0)
