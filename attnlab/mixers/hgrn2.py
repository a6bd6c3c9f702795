"""HGRN2 (arXiv:2404.07904)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, Mixer, register
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Constant, HeadNorm, by_channel, param
from attnlab.settings import Natural
from pallas_kernels import gla


def _hgrn2(q, v, g, **options):
  """``gla`` with the keys ``1 - exp(g)``."""
  return gla(q, -jnp.expm1(g).astype(v.dtype), v, g, **options)


@register(
  "hgrn2", family="linear", paper="arXiv:2404.07904", title="decay a channel, keys from the decay"
)
class HGRN2(LinearMixer):
  """A forget gate a channel with a learned lower bound, higher in later layers; what it forgets is what it writes.

  The bounds start at layer / layers, as a cumulative softmax of equal logits over the layers does, which is how the
  paper ties them. Here each layer has logits of its own, so that mixers stay independent of each other.
  """

  core = staticmethod(_hgrn2)
  reference = linear_references.hgrn2
  qkv_activation = gate_activation = None
  qk_norm = False

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Attributes:
    num_heads: None: as many as make d_model channels.
    head_dim: channels of q and of the forget gate in a head ("expand ratio"); None: d_model / num_heads.
    value_dim: channels of v in a head; None: d_model / num_heads.
    conv_size: taps of a short convolution on q, the gate and v; 0: none.
    """

    num_heads: int | None = None
    head_dim: int | None = 128
    value_dim: int | None = None
    conv_size: Natural = 0

  @classmethod
  def sizes(cls, config: Config, d_model: int):
    shape = LinearMixer.Config(num_heads=config.num_heads, head_dim=config.head_dim)
    H, K, _, _ = super().sizes(shape, d_model)
    if config.value_dim is None and d_model % H:
      raise UserError(
        f"mixer {cls.name!r}: {H} heads do not divide d_model={d_model}; set value_dim"
      )
    return H, K, H, config.value_dim or d_model // H

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    bound = jnp.log(jnp.maximum(layer.index, 0.5) / (layer.count - layer.index))
    shape, axes = (self.H, self.K), ("heads", None)
    self.bound = param(key, lambda *_: jnp.full(shape, bound), shape, axes, weight_decay=False)
    first = jnp.asarray(layer.index == 0, jnp.float32)
    self.first = Constant(first)  # its bound is zero

  def make_norm(self, layer: Layer):
    return HeadNorm(self.Hv, self.V, groups=1, eps=layer.norm_eps)

  def signals(self, x, recent, ctx):
    q, f, v = self.side_by_side(x, recent)
    free, bound = jax.nn.log_sigmoid(f.astype(jnp.float32)), by_channel(self.bound)
    bounded = jnp.logaddexp(jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + free)
    g = jnp.where(self.first[...] > 0, free, bounded)
    q, g, v = self.in_heads(jax.nn.silu(q), g, v)
    return dict(q=q, v=v, g=g)

  @staticmethod
  def equation(S, q, v, g):
    """h_t = Diag(f_t) h_{t-1} + (1 - f_t) i_t^T, o_t = h_t^T q_t; f = exp(g), i = v. q is scaled as fla does."""
    f = jnp.exp(g)
    S = jnp.diag(f) @ S + jnp.outer(1 - f, v)
    return S, S.T @ (q * q.shape[0] ** -0.5)
