"""DeltaNet (arXiv:2102.11174, 2406.06484)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gates import step_size
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Linear
from pallas_kernels import delta_rule


@register(
  "deltanet",
  family="linear",
  paper="arXiv:2406.06484",
  title="delta rule",
  variants={"negative": dict(negative_eigenvalues=True)},
)
class DeltaNet(LinearMixer):
  """The delta rule without decay: what a key holds is replaced, by a step size a head. No output gate."""

  erase = "key"
  core = staticmethod(delta_rule)
  reference = linear_references.deltanet
  gate_activation = None

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    """

    negative_eigenvalues: bool = False

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    self.b_proj = Linear(jax.random.fold_in(key, 8), layer.d_model, self.Hv)

  def signals(self, x, recent, ctx):
    q, k, v = self.qkv(x, recent)
    beta = step_size(self.b_proj(x), self.config.negative_eigenvalues)
    return dict(q=q, k=k, v=v, beta=beta)

  @staticmethod
  def equation(S, q, k, v, beta):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t (2406.06484, section 2.2)."""
    I = jnp.eye(k.shape[0])
    S = (I - beta * jnp.outer(k, k)) @ S + beta * jnp.outer(k, v)
    return S, S.T @ (q * k.shape[0] ** -0.5)
