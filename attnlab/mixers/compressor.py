"""One key for several tokens, as DeepSeek-V4 makes it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnlab import sharding
from attnlab.nn import Linear, RMSNorm, param
from pallas_kernels.rope import rope

Arrays = dict[str, Array]


def rope_last(
  x: Float[Array, "B T H D"], positions: Int[Array, "B T"], size: int, theta: float
) -> Float[Array, "B T H D"]:
  """RoPE of the last ``size`` channels."""
  if not size:
    return x
  # By XLA, as a part of something: a kernel would have it cut out first.
  turned = rope(x[..., -size:], positions, theta, backend="xla")
  return jnp.concatenate([x[..., :-size], turned], axis=-1)


class Compressor(nnx.Module):
  """Entries, one for ``m`` tokens: by channel the softmax of a gate, to which a token's place adds, weighs values.

  With overlap a token has two halves, and an entry is made of the first halves of the ``m`` tokens before its own, and
  of the second halves of its own.
  """

  def __init__(
    self, key: Array, d_model: int, channels: int, m: int, overlap: bool, rope_dim: int, eps: float
  ):
    a, b, c = jax.random.split(key, 3)
    self.m, self.overlap, self.channels, self.rope_dim = m, overlap, channels, rope_dim
    self.width = channels * (1 + overlap)
    self.kv_proj = Linear(a, d_model, self.width, ("embed", None))
    self.gate_proj = Linear(b, d_model, self.width, ("embed", None))
    zeros = jax.nn.initializers.zeros
    self.places = param(c, zeros, (m, self.width), (None, None), weight_decay=False)
    self.norm = RMSNorm(channels, eps)

  @property
  def reach(self) -> int:
    """How many tokens before its last one an entry is made of."""
    return self.m * (1 + self.overlap) - 1

  def tokens(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Arrays:
    """What entries are made of: values and gates, [B, T, 1, width]."""
    numbers = jnp.asarray(positions, jnp.int32) % self.m
    place = sharding.look_up(self.places[...], numbers, x.dtype)
    return {"c": self.kv_proj(x)[:, :, None], "z": (self.gate_proj(x) + place)[:, :, None]}

  def with_before(self, tokens: Arrays) -> Arrays:
    """The tokens with those ``m`` earlier beside them, where they are needed."""
    if not self.overlap:
      return tokens
    pad = ((0, 0), (self.m, 0), (0, 0), (0, 0))
    before = {f"{n}_before": jnp.pad(y, pad)[:, : y.shape[1]] for n, y in tokens.items()}
    return tokens | before

  def entries(self, pools: Arrays, position: Array, norm: Array, theta: float) -> Array:
    """[B, n, 1, channels] of the tokens of pools [B, n, m, 1, width], whose first one is at ``position`` [B, n]."""
    c, z, d = pools["c"], pools["z"].astype(jnp.float32), self.channels
    if self.overlap:
      c = jnp.concatenate([pools["c_before"][..., :d], c[..., d:]], axis=2)
      any_before = (position >= self.m)[:, :, None, None, None]
      before = jnp.where(any_before, pools["z_before"][..., :d].astype(jnp.float32), -jnp.inf)
      z = jnp.concatenate([before, z[..., d:]], axis=2)
    y = jnp.sum(jax.nn.softmax(z, axis=2) * c.astype(jnp.float32), axis=2)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.norm.eps) * norm
    return rope_last(y.astype(c.dtype), position, self.rope_dim, theta)
