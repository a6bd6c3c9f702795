"""Gated DeltaNet-2 (arXiv:2605.22791)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gates import inverse_softplus_step, log_uniform_rate, softplus_decay, step_size
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Linear, LowRank, by_channel, param
from pallas_kernels import gdn2


@register(
  "gdn2",
  family="linear",
  paper="arXiv:2605.22791",
  title="erase a key channel, write a value channel, decay a channel",
  variants={
    "negative": dict(negative_eigenvalues=True),
    "grouped": dict(num_heads=2, num_value_heads=4),
  },
)
class GatedDeltaNet2(LinearMixer):
  """KDA whose step size is two gates: what is erased, a key channel, and what is written, a value channel.

  Where several value heads share a key head each has rates and gates of its own, as in our KDA.
  """

  erase = "low_rank"
  core = staticmethod(gdn2)
  reference = linear_references.gdn2
  gate_activation = staticmethod(jax.nn.sigmoid)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    negative_eigenvalues: the erase gate in (0, 2) instead of (0, 1).
    """

    negative_eigenvalues: bool = False

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    D, keys = layer.d_model, jax.random.split(jax.random.fold_in(key, 1), 5)
    self.f_proj = LowRank(keys[0], D, self.V, self.Hv * self.K)
    self.b_proj = Linear(keys[1], D, self.Hv * self.K)
    self.w_proj = Linear(keys[2], D, self.Hv * self.V)
    self.A_log = param(keys[3], log_uniform_rate(1, 16), (self.Hv,), ("heads",))
    shape, axes = (self.Hv, self.K), ("heads", None)
    self.dt_bias = param(keys[4], inverse_softplus_step(), shape, axes, weight_decay=False)

  def make_gate(self, d_model, key):
    return LowRank(key, d_model, self.V, self.Hv * self.V, bias=jax.nn.initializers.zeros)

  def signals(self, x, recent, ctx):
    q, k, v = self.qkv(x, recent)
    A_log, dt_bias = by_channel(self.A_log, self.K), by_channel(self.dt_bias)
    g = softplus_decay(self.f_proj(x), A_log, dt_bias)
    b = step_size(self.b_proj(x), self.config.negative_eigenvalues)
    w = sharding.split(step_size(self.w_proj(x), False), self.Hv, self.V)
    g, b = (sharding.split(y, self.Hv, self.K) for y in (g, b))
    return dict(q=q, k=k, v=v, g=g, b=b, w=w)

  @staticmethod
  def equation(S, q, k, v, g, b, w):
    """S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T, o_t = S_t^T q_t."""
    I = jnp.eye(k.shape[0])
    S = (I - jnp.outer(k, b * k)) @ jnp.diag(jnp.exp(g)) @ S + jnp.outer(k, w * v)
    return S, S.T @ (q * k.shape[0] ** -0.5)
