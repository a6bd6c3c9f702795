"""Gated DeltaNet (arXiv:2412.06464)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gates import inverse_softplus_step, log_uniform_rate, softplus_decay, step_size
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Linear, param
from pallas_kernels import gated_delta_rule


@register(
  "gated_deltanet",
  family="linear",
  paper="arXiv:2412.06464",
  title="delta rule, decay a head",
  aliases=("gdn",),
  variants={
    "negative": dict(negative_eigenvalues=True),
    "grouped": dict(num_heads=2, num_value_heads=4),
  },
)
class GatedDeltaNet(LinearMixer):
  """Decay the state by a rate of the head, then the delta rule.

  Defaults are of flash-linear-attention: head_dim 256 with values twice as wide, ``W_a``, ``W_b`` without bias.
  """

  erase = "key"
  core = staticmethod(gated_delta_rule)
  reference = linear_references.gated_deltanet

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    """

    head_dim: int | None = 256
    expand_k: float = 0.75
    expand_v: float = 1.5
    negative_eigenvalues: bool = False

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    keys = jax.random.split(jax.random.fold_in(key, 1), 4)
    self.a_proj = Linear(keys[0], layer.d_model, self.Hv)
    self.b_proj = Linear(keys[1], layer.d_model, self.Hv)
    self.A_log = param(keys[2], log_uniform_rate(0, 16), (self.Hv,), ("heads",))
    self.dt_bias = param(keys[3], inverse_softplus_step(), (self.Hv,), ("heads",))

  def signals(self, x, recent, ctx):
    q, k, v = self.qkv(x, recent)
    A_log, dt_bias = (sharding.put(p[...], "heads") for p in (self.A_log, self.dt_bias))
    g = softplus_decay(self.a_proj(x), A_log, dt_bias)
    beta = step_size(self.b_proj(x), self.config.negative_eigenvalues)
    return dict(q=q, k=k, v=v, g=g, beta=beta)

  @staticmethod
  def equation(S, q, k, v, g, beta):
    """Eq. 10, transposed: S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T."""
    I = jnp.eye(k.shape[0])
    S = jnp.exp(g) * (I - beta * jnp.outer(k, k)) @ S + beta * jnp.outer(k, v)
    return S, S.T @ (q * k.shape[0] ** -0.5)
