"""Comba (arXiv:2506.02475)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gates import inverse_softplus_step, log_uniform_rate, softplus_decay, step_size
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Linear, param
from attnlab.settings import Range
from pallas_kernels import comba


@register(
  "comba",
  family="linear",
  paper="arXiv:2506.02475",
  title="delta rule on the undecayed state, corrected output",
  variants={
    "negative": dict(negative_eigenvalues=True),
    "grouped": dict(num_heads=2, num_value_heads=4),
  },
)
class Comba(LinearMixer):
  """Gated DeltaNet that erases under a weaker key ``p = sigmoid(c) k``, reads with ``q - D p``, and gates by a sigmoid.

  q and k are normalised first. fla normalises p as well, and q after its correction, so that c has no effect there.
  """

  erase = "key"
  core = staticmethod(comba)
  gate_activation = staticmethod(jax.nn.sigmoid)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    correction: D at the start; the paper takes 0.02 for small models.
    """

    head_dim: int | None = 256
    expand_k: float = 0.75
    expand_v: float = 1.5
    negative_eigenvalues: bool = False
    correction: Annotated[float, Range()] = 1.0

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    keys = jax.random.split(jax.random.fold_in(key, 1), 4)
    constant = jax.nn.initializers.constant
    self.a_proj = Linear(keys[0], layer.d_model, self.Hv)
    self.b_proj = Linear(keys[1], layer.d_model, self.Hv)
    self.A_log = param(keys[2], log_uniform_rate(0, 16), (self.Hv,), ("heads",))
    self.dt_bias = param(keys[3], inverse_softplus_step(), (self.Hv,), ("heads",))
    self.c = param(key, constant(1.0), (self.H,), ("heads",))
    self.D = param(key, constant(config.correction), (self.H,), ("heads",))

  def signals(self, x, recent, ctx):
    q, k, v = self.qkv(x, recent)
    A_log, dt_bias, D = (sharding.put(p[...], "heads") for p in (self.A_log, self.dt_bias, self.D))
    g = softplus_decay(self.a_proj(x), A_log, dt_bias)
    beta = step_size(self.b_proj(x), self.config.negative_eigenvalues)
    c = jax.nn.sigmoid(self.c[...])
    q = (q - (D * sharding.put(c, "heads"))[:, None] * k).astype(x.dtype)
    c = jnp.repeat(sharding.put(c, None), self.Hv // self.H)
    return dict(q=q, k=k, v=v, g=g, beta=beta, c=sharding.put(c, "heads"))

  @staticmethod
  def equation(S, q, k, v, g, beta, c):
    """S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T, p = c k, o_t = S_t^T q_t; S undecayed."""
    p = c * k
    S = jnp.exp(g) * S + beta * jnp.outer(k, v - S.T @ p)
    return S, S.T @ (q * k.shape[0] ** -0.5)
