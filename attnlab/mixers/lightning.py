"""Lightning Attention (arXiv:2401.04658) as MiniMax-01 has it (arXiv:2501.08313), and with the slopes of fla."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Constant, HeadNorm, rope_heads
from attnlab.settings import Fraction, Natural
from pallas_kernels import lightning_attention


@register(
  "lightning",
  family="linear",
  paper="arXiv:2501.08313",
  title="constant decay a head and layer",
  variants={"heads3_rope": dict(num_heads=3, rope_fraction=0.5, qk_norm=True)},
)
class Lightning(LinearMixer):
  """SiLU on q, k and v, a constant decay a head, weaker in later layers, one norm over all heads, a sigmoid gate."""

  core = staticmethod(functools.partial(lightning_attention, scale=1.0))
  reference = linear_references.lightning
  gate_activation = staticmethod(jax.nn.sigmoid)

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    rope_fraction: how much of each head of q and k RoPE rotates; 0: no positions but the decay.
    rope_theta: its base.
    qk_norm: q and k of unit length. (The output's norm takes their scale away.)
    """

    conv_size: Natural = 0
    rope_fraction: Fraction = 0.0
    rope_theta: float = 10000.0
    qk_norm: bool = False

  def __init__(self, config: Config, layer: Layer, key):
    super().__init__(config, layer, key)
    self.qk_norm = config.qk_norm
    self.slope = Constant(self.slopes(layer))

  def slopes(self, layer: Layer) -> Float[Array, " Hv"]:
    """The rate of decay of each head in this layer: ALiBi's, times 1 in the first layer and 1e-5 in the last."""
    factor = 1 - layer.index / max(layer.count - 1, 1) + 1e-5
    return jnp.asarray(alibi_slopes(self.Hv)) * factor

  def make_norm(self, layer: Layer):
    return HeadNorm(self.Hv, self.V, groups=1, eps=layer.norm_eps)

  def signals(self, x, recent, ctx):
    c, (q, k, v) = self.config, self.side_by_side(x, recent)
    turn = (ctx.positions, self.K, c.rope_theta, c.rope_fraction)
    q, k, v = self.in_heads(rope_heads(q, *turn), rope_heads(k, *turn), v)
    return dict(q=q, k=k, v=v, g=-sharding.put(self.slope[...], "heads"))

  @staticmethod
  def equation(S, q, k, v, g):
    """kv_t = lambda kv_{t-1} + k_t v_t^T, o_t = kv_t^T q_t, without a scale on q; lambda = exp(g)."""
    S = jnp.exp(g) * S + jnp.outer(k, v)
    return S, S.T @ q


@register(
  "lightning_fla",
  family="linear",
  paper="arXiv:2401.04658",
  title="constant decay a head and layer, linear slopes",
)
class LightningFla(Lightning):
  """The same layer with the slopes of flash-linear-attention: linear in the head, so that head 0 has no decay."""

  core = staticmethod(lightning_attention)
  reference = linear_references.lightning_fla

  def slopes(self, layer: Layer) -> Float[Array, " Hv"]:
    """``8 h / heads (1 - layer / layers)``, h from 0."""
    return 8 / self.Hv * (1 - layer.index / layer.count) * jnp.arange(self.Hv)

  @staticmethod
  def equation(S, q, k, v, g):
    """As Lightning, with q scaled by K^-1/2."""
    S = jnp.exp(g) * S + jnp.outer(k, v)
    return S, S.T @ (q * k.shape[0] ** -0.5)


def alibi_slopes(heads: int) -> list[float]:
  """``2^(-8 h / heads)``, h from 1; for no power of two: those of the one below, then every other of the one above."""
  power = 1 << (heads.bit_length() - 1)
  slopes = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
  if power < heads:
    slopes += alibi_slopes(2 * power)[::2][: heads - power]
  return slopes
