"""Comba (arXiv:2506.02475)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from attnlab.errors import UserError
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gated_deltanet import GatedDeltaNet
from attnlab.nn import by_channel, param
from attnlab.settings import Range
from pallas_kernels import comba


@register(
  "comba",
  family="linear",
  paper="arXiv:2506.02475",
  title="delta rule on the undecayed state, corrected output",
  variants={"grouped": dict(num_heads=2, num_value_heads=4)},
)
class Comba(GatedDeltaNet):
  """Gated DeltaNet that erases under a weaker key ``p = sigmoid(c) k``, reads with ``q - D p``, and gates by a sigmoid.

  q and k are normalised first. fla normalises p as well, and q after its correction, so that c has no effect there.
  Eigenvalues of ``alpha - beta sigmoid(c)`` are above -1 for steps up to 1 alone: what is erased is read from the state
  before its decay, so with steps up to 2 the state of one token that comes again grows without bound.
  """

  core = staticmethod(comba)
  reference = linear_references.comba
  gate_activation = staticmethod(jax.nn.sigmoid)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(GatedDeltaNet.Config):
    """Attributes:
    correction: D at the start; the paper takes 0.02 for small models.
    """

    correction: Annotated[float, Range()] = 1.0

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    if config.negative_eigenvalues:
      raise UserError(
        f"mixer {self.name!r}: negative_eigenvalues=True is not possible: its state would grow without bound"
      )
    constant = jax.nn.initializers.constant
    self.c = param(key, constant(1.0), (self.H,), ("heads",))
    self.D = param(key, constant(config.correction), (self.H,), ("heads",))

  def qkv(self, x, recent):
    q, k, v = self.side_by_side(x, recent)
    weight = by_channel(self.D, self.K) * jax.nn.sigmoid(by_channel(self.c, self.K))
    return self.in_heads((q - weight * k).astype(x.dtype), k, v)

  def signals(self, x, recent, ctx):
    c = by_channel(jax.nn.sigmoid(self.c[...]), self.Hv // self.H)
    return super().signals(x, recent, ctx) | dict(c=c)

  @staticmethod
  def equation(S, q, k, v, g, beta, c):
    """S_t = alpha_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T, p = c k, o_t = S_t^T q_t; S undecayed."""
    p = c * k
    S = jnp.exp(g) * S + beta * jnp.outer(k, v - S.T @ p)
    return S, S.T @ (q * k.shape[0] ** -0.5)
