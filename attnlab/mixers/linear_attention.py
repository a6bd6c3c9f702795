"""Linear attention (arXiv:2006.16236)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from attnlab.mixers import linear_references
from attnlab.mixers.base import register
from attnlab.mixers.linear import LinearMixer
from attnlab.settings import Natural
from pallas_kernels import linear_attention

FEATURES = {
  "elu": lambda x: jax.nn.elu(x) + 1,
  "relu": jax.nn.relu,
  "identity": lambda x: x,
}


@register(
  "linear_attention",
  family="linear",
  paper="arXiv:2006.16236",
  title="sum of keys times values",
  variants={"identity": dict(feature_map="identity")},
)
class LinearAttention(LinearMixer):
  """Keys times values, summed, under a feature map of q and k; an RMSNorm instead of the paper's denominator."""

  core = staticmethod(linear_attention)
  reference = linear_references.linear_attention
  qkv_activation = gate_activation = None
  qk_norm = False

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    feature_map: "elu" (elu(x) + 1, the paper's), "relu" or "identity".
    """

    conv_size: Natural = 0
    feature_map: Literal["elu", "relu", "identity"] = "elu"

  def signals(self, x, recent, ctx):
    q, k, v = self.side_by_side(x, recent)
    features = FEATURES[self.config.feature_map]
    q, k, v = self.in_heads(features(q), features(k), v)
    return dict(q=q, k=k, v=v)

  @staticmethod
  def equation(S, q, k, v):
    """Eqs. 18 and 20 without the denominator: S_i = S_{i-1} + phi(k_i) v_i^T, o_i = S_i^T phi(q_i)."""
    S = S + jnp.outer(k, v)
    return S, S.T @ (q * k.shape[0] ** -0.5)
