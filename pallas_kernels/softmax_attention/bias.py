"""Biases of keys as channels of q and k, so that any kernel serves them, those of libraries too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def as_channels(
  q: Float[Array, "B Tq H D"],
  k: Float[Array, "B Tk Hkv D"],
  bias: Float[Array, "B Tk H"],
  scale: float,
) -> tuple[Float[Array, "B Tq H E"], Float[Array, "B Tk Hkv E"]]:
  """q and k of which ``q . k`` is ``scale q . k + bias``.

  Each query head that shares a key head has channels of its own, in which q is 1 for this head and 0 for the others.
  The bias is there in three parts of 8 bits each, which together are its float32: products of bfloat16, which kernels
  may make of float32 inputs too, keep it whole. (float64 is taken as it is.) Its gradient is that of the first part.
  """
  H, Hkv, dtype = q.shape[2], k.shape[2], jnp.result_type(k)
  groups = H // Hkv
  exact = bias.dtype == jnp.float64 == dtype
  parts = [bias] if exact else _parts(bias.astype(jnp.float32))
  channels = [x.reshape(*x.shape[:2], Hkv, groups).astype(dtype) for x in parts]
  own = jnp.tile(jnp.eye(groups, dtype=q.dtype), (Hkv, len(parts)))
  own = jnp.broadcast_to(own, (*q.shape[:2], *own.shape))
  scaled = (q * jnp.asarray(scale, jnp.promote_types(q.dtype, jnp.float32))).astype(q.dtype)
  return jnp.concatenate([scaled, own], axis=-1), jnp.concatenate([k, *channels], axis=-1)


def _parts(x: Array) -> list[Array]:
  """Three numbers of 8 bits whose sum is x; the gradient is the first's."""
  rest, parts = jax.lax.stop_gradient(x), []
  own = x - rest  # zero
  for _ in range(3):
    # XLA may leave out a cast there and back.
    parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
    rest = rest - parts[-1]
  return [parts[0] + own, *parts[1:]]
