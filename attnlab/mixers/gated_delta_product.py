"""Gated DeltaProduct (arXiv:2502.10297)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gates import inverse_softplus_step, log_uniform_rate, softplus_decay, step_size
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Linear, l2norm_heads, param
from pallas_kernels import gated_delta_product


@register(
  "gated_delta_product",
  family="linear",
  paper="arXiv:2502.10297",
  title="several delta-rule steps a token, decay a head",
  variants={
    "three": dict(steps=3, negative_eigenvalues=False),
    "ungated": dict(forget_gate=False),
    "grouped": dict(num_heads=2, num_value_heads=4),
  },
)
class GatedDeltaProduct(LinearMixer):
  """Gated DeltaNet with several keys, values and step sizes a token: a transition of higher rank."""

  erase = "key"
  core = staticmethod(gated_delta_product)
  reference = linear_references.gated_delta_product

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    steps: delta-rule steps a token.
    negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    forget_gate: decay the state, once a token.
    """

    head_dim: int | None = 256
    expand_k: float = 0.75
    expand_v: float = 1.5
    steps: int = 2
    negative_eigenvalues: bool = True
    forget_gate: bool = True

  def make_projections(self, layer: Layer, keys):
    D, n = layer.d_model, self.config.steps
    widths = dict(q=self.H * self.K, k=self.H * n * self.K, v=self.Hv * n * self.V)
    self.make_convolved(D, keys, widths)
    more = jax.random.split(jax.random.fold_in(keys[0], 1), 4)
    self.b_proj = Linear(more[0], D, self.Hv * n)
    if self.config.forget_gate:
      self.a_proj = Linear(more[1], D, self.Hv)
      self.A_log = param(more[2], log_uniform_rate(0, 16), (self.Hv,), ("heads",))
      self.dt_bias = param(more[3], inverse_softplus_step(), (self.Hv,), ("heads",))

  @property
  def steps(self) -> int:
    return self.config.steps

  def signals(self, x, recent, ctx):
    n = self.config.steps
    q, k = (l2norm_heads(self.project(name, x, recent), self.K) for name in ("q", "k"))
    q, k = sharding.split(q, self.H, self.K), sharding.split(k, self.H, n, self.K)
    v = self.project("v", x, recent, self.Hv, n, self.V)
    beta = step_size(sharding.split(self.b_proj(x), self.Hv, n), self.config.negative_eigenvalues)
    signals = dict(q=q, k=k, v=v, beta=beta)
    if self.config.forget_gate:
      A_log, dt_bias = (sharding.put(p[...], "heads") for p in (self.A_log, self.dt_bias))
      signals["g"] = softplus_decay(self.a_proj(x), A_log, dt_bias)
    return signals

  @staticmethod
  def equation(S, q, k, v, beta, g=0.0):
    """H_0 = alpha_t S_{t-1}; H_j = (I - beta_j k_j k_j^T) H_{j-1} + beta_j k_j v_j^T for j = 1..n; S_t = H_n."""
    I = jnp.eye(q.shape[0])
    S = jnp.exp(g) * S
    for k_j, v_j, beta_j in zip(k, v, beta, strict=True):
      S = (I - beta_j * jnp.outer(k_j, k_j)) @ S + beta_j * jnp.outer(k_j, v_j)
    return S, S.T @ (q * q.shape[0] ** -0.5)
