"""Comba (arXiv:2506.02475)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gated_deltanet import GatedDeltaNet
from attnlab.nn import param
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
class Comba(GatedDeltaNet):
  """Gated DeltaNet that erases under a weaker key ``p = sigmoid(c) k``, reads with ``q - D p``, and gates by a sigmoid.

  q and k are normalised first. fla normalises p as well, and q after its correction, so that c has no effect there.
  """

  core = staticmethod(comba)
  gate_activation = staticmethod(jax.nn.sigmoid)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(GatedDeltaNet.Config):
    """Attributes:
    correction: D at the start; the paper takes 0.02 for small models.
    """

    correction: Annotated[float, Range()] = 1.0

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    constant = jax.nn.initializers.constant
    self.c = param(key, constant(1.0), (self.H,), ("heads",))
    self.D = param(key, constant(config.correction), (self.H,), ("heads",))

  def signals(self, x, recent, ctx):
    signals = super().signals(x, recent, ctx)
    q, k, c = signals["q"], signals["k"], jax.nn.sigmoid(self.c[...])
    D = sharding.put(self.D[...], "heads") * sharding.put(c, "heads")
    c = jnp.repeat(sharding.put(c, None), self.Hv // self.H)
    q = (q - D[:, None] * k).astype(x.dtype)
    return signals | dict(q=q, c=sharding.put(c, "heads"))

  @staticmethod
  def equation(S, q, k, v, g, beta, c):
    """S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T, p = c k, o_t = S_t^T q_t; S undecayed."""
    p = c * k
    S = jnp.exp(g) * S + beta * jnp.outer(k, v - S.T @ p)
    return S, S.T @ (q * k.shape[0] ** -0.5)
