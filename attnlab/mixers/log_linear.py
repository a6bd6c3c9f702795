"""Log-linear attention: a state for each power of two of the past (arXiv:2506.04761)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gated_deltanet import GatedDeltaNet
from attnlab.mixers.linear import LinearMixer
from attnlab.mixers.mamba2 import Mamba2
from attnlab.nn import Linear, param
from pallas_kernels.log_linear import levels_of, log_linear_gated_delta_rule, log_linear_ssd


class LogLinear(LinearMixer):
  """What the two share: weights of levels from the token, ``softplus(L * W x)``, and their states."""

  without_gradient = frozenset({"position"})
  in_parts = False

  def __init__(self, config, layer: Layer, key):
    super().__init__(config, layer, key)
    key, n = jax.random.fold_in(key, 8), config.levels
    self.level_proj = Linear(key, layer.d_model, self.Hv * n)
    ones = jax.nn.initializers.ones
    self.level_scale = param(key, ones, (self.Hv, n), ("heads", None), weight_decay=False)

  def levels(self, length: int) -> int:
    """Of a sequence of so many tokens; UserError where there are no weights for so many."""
    n = levels_of(length)
    if n > self.config.levels:
      raise UserError(
        f"mixer {self.name!r}: {length} tokens need levels={n}; got {self.config.levels}"
      )
    return n

  def signals(self, x, recent, ctx):
    self.levels(x.shape[1])
    scale = sharding.put(self.level_scale[...], "heads", None)
    raw = sharding.split(self.level_proj(x), self.Hv, self.config.levels).astype(jnp.float32)
    return super().signals(x, recent, ctx) | dict(
      weights=jax.nn.softplus(scale * raw),
      position=self.for_heads(ctx.positions),
    )

  def init_state(self, batch):
    return jnp.zeros((batch, self.Hv, self.config.levels, self.K, self.V), jnp.float32)

  def init_cache(self, batch, max_len, dtype=jnp.float32):
    """As many states as ``max_len`` tokens have levels."""
    cache = super().init_cache(batch, max_len, dtype)
    return cache | {"state": cache["state"][:, :, : self.levels(max_len)]}

  def core_flops(self, length, decode):
    return levels_of(length) * super().core_flops(length, decode)


def by_level(update, write, S, weights, position, **token):
  """A token of one head: ``update`` is the mechanism's equation, ``write`` the name of what it writes.

  S_t^l is S_{t-1}^l where 2^(l-1) does not divide t; the sum of all below where it is the greatest power of two that
  does; and empty below that. Each is then updated, only level 0 with the token's own write (section 3.1). o_t is the
  weighted sum of what they say (eq. 4).
  """
  t = position.astype(int)
  size = jnp.array([0, *(1 << i for i in range(S.shape[0] - 1))])  # 2^(l-1)
  held = (t > 0) & ((size == 0) | ((t - 1) & size > 0))
  S = jnp.where(held[:, None, None], S, 0)
  below, greatest, size = jnp.cumsum(S, axis=0) - S, t & -t, size[:, None, None]
  S = jnp.where(size > greatest, S, jnp.where(size == greatest, below, 0))
  own = {write: token[write]}
  nothing = {write: jnp.zeros_like(token[write])}
  states, o = zip(
    *(update(S_l, **token | (nothing if l else own)) for l, S_l in enumerate(S)), strict=True
  )
  return jnp.stack(states), sum(w * y for w, y in zip(weights, o, strict=True))


@register(
  "log_linear_mamba2",
  family="linear",
  paper="arXiv:2506.04761",
  title="Mamba-2 with a state for each power of two of the past",
)
class LogLinearMamba2(LogLinear, Mamba2):
  """Mamba-2 whose state is kept by level of the past, each read with a weight of the token's."""

  core = staticmethod(log_linear_ssd)
  reference = linear_references.log_linear_mamba2

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mamba2.Config):
    """Attributes:
    levels: for documents of up to 2 ** (levels - 1) tokens.
    """

    levels: int = 20

  @staticmethod
  def equation(S, weights, position, **token):
    return by_level(Mamba2.equation, "x", S, weights, position, **token)


@register(
  "log_linear_gated_deltanet",
  family="linear",
  paper="arXiv:2506.04761",
  title="Gated DeltaNet with a state for each power of two of the past",
)
class LogLinearGatedDeltaNet(LogLinear, GatedDeltaNet):
  """Gated DeltaNet whose state is kept by level of the past, each read with a weight of the token's.

  Every later token decays a level, and erases what it has under that token's key.
  """

  core = staticmethod(log_linear_gated_delta_rule)
  reference = linear_references.log_linear_gated_deltanet

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(GatedDeltaNet.Config):
    """Attributes:
    levels: for documents of up to 2 ** (levels - 1) tokens.
    """

    levels: int = 20

  @staticmethod
  def equation(S, weights, position, **token):
    return by_level(GatedDeltaNet.equation, "v", S, weights, position, **token)
