"""MesaNet (arXiv:2506.05233)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gates import step_size
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Linear, l2norm_heads, param
from pallas_kernels.mesa import ITERATIONS, mesa

# The least regularisation, and the one at the start.
_LEAST, _START = 0.25, 1.0
_zeros = jax.nn.initializers.zeros


@register(
  "mesanet",
  family="linear",
  paper="arXiv:2506.05233",
  title="the least squares fit of values to all keys so far, decay a head",
  aliases=("mesa",),
  variants={"grouped": dict(num_heads=2, num_value_heads=4, output_gate=True)},
)
class MesaNet(LinearMixer):
  """What a ridge regression from keys to values, fitted again at every token, says of the query; see
  ``pallas_kernels.mesa``.

  The state is twice linear attention's: sums of values under keys, and of keys under keys.
  """

  core = staticmethod(mesa)
  reference = linear_references.mesanet
  sums_of_squares = (0,)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    output_gate: with a gate at the output, which the mechanism has not.
    """

    output_gate: bool = False

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    keys = jax.random.split(jax.random.fold_in(key, 1), 3)
    self.a_proj = Linear(keys[0], layer.d_model, self.Hv, bias=_zeros)
    self.b_proj = Linear(keys[1], layer.d_model, self.Hv, bias=_zeros)
    raw = jax.nn.initializers.constant(math.log(math.expm1(_START - _LEAST)))
    axes = ("heads", None)
    self.raw_lam = param(keys[2], raw, (self.Hv, self.K), axes, weight_decay=False)

  def make_projections(self, layer: Layer, keys):
    """As by default, but v as it is projected."""
    self.make_convolved(layer.d_model, keys, dict.fromkeys("qk", self.H * self.K))
    self.v_proj = Linear(keys[2], layer.d_model, self.Hv * self.V)

  def side_by_side(self, x, recent):
    # What the systems are made of is not rounded: solving amplifies it.
    q, k = (self.project(name, x, recent).astype(jnp.float32) for name in "qk")
    return l2norm_heads(q, self.K), l2norm_heads(k, self.K), self.v_proj(x)

  def signals(self, x, recent, ctx):
    q, k, v = self.qkv(x, recent)
    g = jax.nn.log_sigmoid(self.a_proj(x).astype(jnp.float32))
    beta = step_size(self.b_proj(x), negative_eigenvalues=False)
    lam = _LEAST + jax.nn.softplus(sharding.put(self.raw_lam[...], "heads", None))
    return dict(q=q, k=k, v=v, g=g, beta=beta, lam=lam)

  def init_state(self, batch):
    keys = jnp.zeros((batch, self.Hv, self.K, self.K), jnp.float32)
    return keys, super().init_state(batch)

  def core_flops(self, length, decode):
    """Of reading values once, and keys once a step of conjugate gradients; where a token is decoded, of products with
    the state, decayed and written once."""
    K, V = self.K, self.V
    if decode:
      return self.Hv * (3 * K * (K + V) + 2 * K * V + 2 * ITERATIONS * K * K)
    one = super().core_flops(length, decode)
    C = min(64, length)
    return one + ITERATIONS * self.Hv * (4 * K * K + 2 * C * K)

  @staticmethod
  def equation(S, q, k, v, g, beta, lam):
    """H_t = gamma_t H_{t-1} + beta_t k_t k_t^T, G_t likewise with v_t, o_t = G_t (H_t + Lambda)^-1 q_t (eq. 7)."""
    H, G = (jnp.exp(g) * S_ + beta * jnp.outer(k, y) for S_, y in zip(S, (k, v), strict=True))
    return (H, G), G.T @ jnp.linalg.solve(H.T + jnp.diag(lam), q)
