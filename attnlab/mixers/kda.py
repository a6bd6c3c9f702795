"""Kimi Delta Attention (arXiv:2510.26692)."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gates import inverse_softplus_step, log_uniform_rate, softplus_decay, step_size
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Linear, LowRank, by_channel, param
from attnlab.settings import Range
from pallas_kernels import kda


@register(
  "kda",
  family="linear",
  paper="arXiv:2510.26692",
  title="delta rule, decay a channel",
  variants={
    "safe_gate": dict(decay_gate="safe"),
    "negative": dict(negative_eigenvalues=True),
    "whole_gates": dict(low_rank_gates=False),
  },
)
class KDA(LinearMixer):
  """Gated DeltaNet with a decay rate for each channel of the key; gates of low rank; sigmoid at the output.

  Where several value heads share a key head each has rates of its own (in flash-linear-attention they share them).
  """

  erase = "key"
  core = staticmethod(kda)
  reference = linear_references.kda
  gate_activation = staticmethod(jax.nn.sigmoid)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    decay_gate: "softplus", ``-exp(A_log) softplus(f + dt_bias)``, or "safe", which is bounded,
      ``lower_bound sigmoid(exp(A_log) (f + dt_bias))``. Different parameterisations: a trained model has one of them.
    lower_bound: the most negative log decay of the safe gate.
    negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    low_rank_gates: whether what decay and output gate are made of goes through as few channels as a head's value has;
      False: through one projection each (Ling 3.0).
    gate_bias: whether the output gate has a bias, as in flash-linear-attention; Kimi Linear's has none.
    """

    decay_gate: Literal["softplus", "safe"] = "softplus"
    lower_bound: Annotated[float, Range(below=0)] = -5.0
    negative_eigenvalues: bool = False
    low_rank_gates: bool = True
    gate_bias: bool = True

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    D, keys = layer.d_model, jax.random.split(jax.random.fold_in(key, 1), 4)
    safe = config.decay_gate == "safe"
    rate = jax.nn.initializers.zeros if safe else log_uniform_rate(1, 16)
    self.f_proj = self._gate(keys[0], D, self.Hv * self.K)
    self.b_proj = Linear(keys[1], D, self.Hv)
    self.A_log = param(keys[2], rate, (self.Hv,), ("heads",))
    shape, axes = (self.Hv, self.K), ("heads", None)
    # As Mamba-2 and Gated DeltaNet begin: steps of 1e-3 to 0.1, after which something is left. (fla's KDA layer has
    # zeros, steps of 0.7.)
    self.dt_bias = param(keys[3], inverse_softplus_step(), shape, axes, weight_decay=False)

  def make_gate(self, d_model, key):
    bias = jax.nn.initializers.zeros if self.config.gate_bias else None
    return self._gate(key, d_model, self.Hv * self.V, bias)

  def _gate(self, key, inputs, outputs, bias=None):
    if self.config.low_rank_gates:
      return LowRank(key, inputs, self.V, outputs, bias=bias)
    return Linear(key, inputs, outputs, bias=bias)

  def signals(self, x, recent, ctx):
    q, k, v = self.qkv(x, recent)
    # In [B, T, heads * K] as long as possible, for the reason of attnlab.nn's norms of heads.
    f, A_log, dt_bias = self.f_proj(x), by_channel(self.A_log, self.K), by_channel(self.dt_bias)
    if self.config.decay_gate == "safe":
      gate = jax.nn.sigmoid(jnp.exp(A_log) * (f.astype(jnp.float32) + dt_bias))
      g = self.config.lower_bound * gate
    else:
      g = softplus_decay(f, A_log, dt_bias)
    g = sharding.split(g, self.Hv, self.K)
    beta = step_size(self.b_proj(x), self.config.negative_eigenvalues)
    return dict(q=q, k=k, v=v, g=g, beta=beta)

  @staticmethod
  def equation(S, q, k, v, g, beta):
    """Eq. 1: S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t."""
    I = jnp.eye(k.shape[0])
    S = (I - beta * jnp.outer(k, k)) @ jnp.diag(jnp.exp(g)) @ S + beta * jnp.outer(k, v)
    return S, S.T @ (q * k.shape[0] ** -0.5)
