"""The definition: all logits at once. Memory grows with Tq Tk; JAX differentiates it, any number of times."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.softmax_attention.visibility import Visibility


def forward(
  q: Float[Array, "B Tq H D"],
  k: Float[Array, "B Tk Hkv D"],
  v: Float[Array, "B Tk Hkv V"],
  sinks: Float[Array, " H"] | None,
  seen: Visibility,
  scale: float,
) -> tuple[Float[Array, "B Tq H V"], Float[Array, "B Tq H"]]:
  """``attend`` to what is seen."""
  return attend(q, k, v, sinks, seen.mask()[:, None], scale)


def attend(
  q: Float[Array, "B Tq H D"],
  k: Float[Array, "B Tk Hkv D"],
  v: Float[Array, "B Tk Hkv V"],
  sinks: Float[Array, " H"] | None,
  mask: Bool[Array, "#B #H Tq Tk"],
  scale: float,
) -> tuple[Float[Array, "B Tq H V"], Float[Array, "B Tq H"]]:
  """``o_t = sum_s exp(scale q_t . k_s - lse_t) v_s``, ``lse_t = log(sum_s exp(scale q_t . k_s) + exp(sink))``.

  The sums are over the keys s for which the mask is set.
  """
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  groups = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x.astype(dtype), groups, axis=2) for x in (k, v))
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


def check(*args) -> None:
  """Serves every call."""
