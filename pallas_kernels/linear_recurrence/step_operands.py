"""One token of a recurrence as the TPU kernel of a single step takes it."""

import jax.numpy as jnp

from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence


def operands(r: Recurrence) -> tuple[dict, dict, dict]:
  """What the kernel takes of each head, [B, Hv, D] float32: of key channels, of value channels, and single numbers."""
  groups = r.v.shape[2] // r.k.shape[2]

  def token(x):
    return x[:, 0].astype(jnp.float32)

  def of_value_heads(x):
    return jnp.repeat(token(x), groups, axis=1)

  keys = {"q": of_value_heads(r.q), "k": of_value_heads(r.k)}
  numbers = {}
  if r.decay == "constant":
    decay = jnp.exp(r.log_decay.astype(jnp.float32))
    numbers["decay"] = jnp.broadcast_to(decay[:, None], (r.v.shape[0], *decay.shape, 1))
  elif r.log_decay is not None:
    (keys if r.decay == "channel" else numbers)["decay"] = jnp.exp(token(r.log_decay))
  if isinstance(r.erase, KeyErase):
    numbers["beta"] = token(r.erase.beta)[..., None]
  elif isinstance(r.erase, LowRankErase):
    keys |= {"a": token(r.erase.a), "b": token(r.erase.b)}
  if r.bonus is not None:
    u = jnp.repeat(r.bonus.astype(jnp.float32), groups, axis=0)
    numbers["own"] = jnp.sum(keys["q"] * u * keys["k"], axis=-1, keepdims=True)
  return keys, {"v": token(r.v)}, numbers
