"""Gated Linear Attention (arXiv:2312.06635)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import LowRank
from attnlab.settings import Natural
from pallas_kernels import gla


@register("gla", family="linear", paper="arXiv:2312.06635", title="decay a channel")
class GLA(LinearMixer):
  """A decay for each channel of the key, from a low-rank projection, its logarithm divided by 16.

  A short convolution, which the paper's has not, comes without an activation (flash-linear-attention's with SiLU).
  """

  core = staticmethod(gla)
  reference = linear_references.gla
  qkv_activation, qk_norm = None, False

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    gate_rank: of the projection of the decay.
    gate_normalizer: divides the log decay: the larger, the longer the memory at the start.
    """

    num_heads: int | None = 4
    head_dim: int | None = None
    expand_k: float = 0.5
    conv_size: Natural = 0
    gate_rank: int = 16
    gate_normalizer: float = 16.0

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    key, zeros = jax.random.fold_in(key, 1), jax.nn.initializers.zeros
    self.g_proj = LowRank(key, layer.d_model, config.gate_rank, self.Hv * self.K, bias=zeros)

  def signals(self, x, recent, ctx):
    q, k, v = self.qkv(x, recent)
    g = jax.nn.log_sigmoid(self.g_proj(x).astype(jnp.float32)) / self.config.gate_normalizer
    return dict(q=q, k=k, v=v, g=sharding.split(g, self.Hv, self.K))

  @staticmethod
  def equation(S, q, k, v, g):
    """Eq. 3: S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t; alpha = exp(g)."""
    S = jnp.diag(jnp.exp(g)) @ S + jnp.outer(k, v)
    return S, S.T @ (q * k.shape[0] ** -0.5)
