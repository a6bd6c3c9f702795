"""Mamba-2 (arXiv:2405.21060)."""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, Mixer, register
from attnlab.mixers.gates import inverse_softplus_step, log_uniform_rate
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import HeadNorm, Linear, by_channel, param
from attnlab.settings import Natural, Range
from pallas_kernels import ssd


@register(
  "mamba2",
  family="linear",
  paper="arXiv:2405.21060",
  title="state space duality: decay and step a head",
  variants={"groups": dict(num_heads=4, groups=2, dt_limit=(0.01, 0.5))},
)
class Mamba2(LinearMixer):
  """Values x, keys B and queries C; a step Delta a head scales both the decay and the write.

  In the terms of the base class C and B are q and k: their heads are the groups, and K is the size of the state.
  """

  core = staticmethod(ssd)
  reference = linear_references.mamba2

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Attributes:
    num_heads: heads of x; None: expand * d_model / head_dim.
    head_dim: channels of an x head.
    state_dim: channels of B and C in a group.
    groups: how many B and C there are; divides num_heads.
    expand: channels of x over d_model.
    conv_size: taps of the short convolution on x, B and C; 0: none.
    dt_limit: bounds of the step.
    """

    num_heads: int | None = None
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    expand: float = 2.0
    conv_size: Natural = 4
    dt_limit: Annotated[tuple[float, float], Range(least=0)] = (0.0, math.inf)

  @classmethod
  def sizes(cls, config: Config, d_model: int):
    heads = config.num_heads or inner_heads(cls, config.expand * d_model, config.head_dim)
    if config.dt_limit[0] > config.dt_limit[1]:
      raise UserError(f"mixer {cls.name!r}: dt_limit={config.dt_limit} must be (lowest, highest)")
    return config.groups, config.state_dim, heads, config.head_dim

  def split_heads(self):
    return {"num_heads": self.Hv}

  def make_projections(self, layer: Layer, keys):
    D = layer.d_model
    widths = dict(x=self.Hv * self.V, B=self.H * self.K, C=self.H * self.K)
    self.make_convolved(D, keys, widths, bias=True)
    more = jax.random.split(jax.random.fold_in(keys[0], 1), 4)
    self.dt_proj = Linear(more[0], D, self.Hv)
    self.dt_bias = param(more[1], inverse_softplus_step(), (self.Hv,), ("heads",))
    self.A_log = param(more[2], log_uniform_rate(1, 16), (self.Hv,), ("heads",))
    self.D = param(more[3], jax.nn.initializers.ones, (self.Hv,), ("heads",))

  def make_norm(self, layer: Layer):
    return HeadNorm(self.Hv, self.V, groups=self.config.groups, eps=layer.norm_eps)

  def signals(self, x, recent, ctx):
    A_log, dt_bias = (sharding.put(p[...], "heads") for p in (self.A_log, self.dt_bias))
    dt = jax.nn.softplus(self.dt_proj(x).astype(jnp.float32) + dt_bias)
    return dict(
      x=self.project("x", x, recent, self.Hv, self.V),
      dt=jnp.clip(dt, *self.config.dt_limit),
      A=-jnp.exp(A_log),
      B=self.project("B", x, recent, self.H, self.K),
      C=self.project("C", x, recent, self.H, self.K),
    )

  def output(self, o, x, signals):
    """``W_o norm((o + D x) * silu(z))``: the norm is after the gate."""
    D, z = by_channel(self.D, self.V), self.gate_proj(x).astype(jnp.float32)
    y = (sharding.merge(o, 2) + D * sharding.merge(signals["x"], 2)) * jax.nn.silu(z)
    return self.out_proj(self.out_norm.heads(y).astype(x.dtype))

  @staticmethod
  def equation(S, x, dt, A, B, C):
    """h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t^T, y_t = C_t^T h_t (section 2, A a scalar times the identity)."""
    S = jnp.exp(dt * A) * S + dt * jnp.outer(B, x)
    return S, S.T @ C


def inner_heads(cls: type[Mixer], width: float, head_dim: int) -> int:
  """How many heads make ``width`` channels; UserError where they do not."""
  if width % head_dim:
    raise UserError(
      f"mixer {cls.name!r}: head_dim={head_dim} does not divide expand * d_model = {width:g}; "
      "choose another head_dim, or set num_heads"
    )
  return int(width // head_dim)
