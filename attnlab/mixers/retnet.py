"""RetNet's multi-scale retention (arXiv:2307.08621)."""

import dataclasses

import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import register
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import rope_heads
from attnlab.settings import Fraction, Natural
from pallas_kernels import retention


@register(
  "retnet", family="linear", paper="arXiv:2307.08621", title="constant decay a head, rotary keys"
)
class RetNet(LinearMixer):
  """A constant decay a head, ``1 - 2^(-5-h)``, and rotary positions on q and k.

  A short convolution, which the paper's has not, comes without an activation (flash-linear-attention's with SiLU).
  """

  core = staticmethod(retention)
  reference = linear_references.retnet
  qkv_activation, qk_norm = None, False

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    rope_fraction: how much of each head of q and k is rotated; 0: no positions but the decay.
    rope_theta: base of the rotary frequencies.
    """

    num_heads: int | None = 8
    head_dim: int | None = None
    expand_v: float = 2.0
    conv_size: Natural = 0
    rope_fraction: Fraction = 1.0
    rope_theta: float = 10000.0

  def signals(self, x, recent, ctx):
    c, (q, k, v) = self.config, self.side_by_side(x, recent)
    turn = (ctx.positions, self.K, c.rope_theta, c.rope_fraction)
    q, k, v = self.in_heads(rope_heads(q, *turn), rope_heads(k, *turn), v)
    g = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.Hv))))
    return dict(q=q, k=k, v=v, g=sharding.put(g, "heads"))

  @staticmethod
  def equation(S, q, k, v, g):
    """Eq. 6: S_n = gamma S_{n-1} + k_n v_n^T, o_n = S_n^T q_n; gamma = exp(g)."""
    S = jnp.exp(g) * S + jnp.outer(k, v)
    return S, S.T @ (q * k.shape[0] ** -0.5)
