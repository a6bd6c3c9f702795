"""RWKV-6 "Finch" (arXiv:2404.05892)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, Mixer, register
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import HeadNorm, Linear, LowRank, TokenShift, by_channel, param
from pallas_kernels import rwkv6

_SHIFTED = ("w", "k", "v", "r", "g")


def _uniform(bound: float):
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@register(
  "rwkv6",
  family="linear",
  paper="arXiv:2404.05892",
  title="decay a channel, own weight for the token itself",
)
class RWKV6(LinearMixer):
  """Each token is mixed with the one before it, by amounts that depend on both; decay a channel from the mixture.

  Initial values of the mixing amounts, the decay and the bonus are those of the authors' code, by channel and layer.
  """

  core = staticmethod(rwkv6)
  reference = linear_references.rwkv6
  output_only = frozenset({"gate"})

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Attributes:
    num_heads: None: d_model / head_dim.
    head_dim: channels of a head.
    mix_rank: of the low-rank map that makes each of the five mixing amounts.
    decay_rank: of the low-rank map that makes the decay.
    """

    num_heads: int | None = None
    head_dim: int = 64
    mix_rank: int = 32
    decay_rank: int = 64

  @classmethod
  def sizes(cls, config: Config, d_model: int):
    return rwkv_sizes(config, d_model)

  def make_projections(self, layer: Layer, keys):
    D, c, shape = layer.d_model, self.config, (self.H, self.K)
    keys, zeros = jax.random.split(keys[0], 8), jax.nn.initializers.zeros
    for key, name in zip(keys, "rkv", strict=False):
      setattr(self, f"{name}_proj", Linear(key, D, self.H * self.K))
    self.shift = TokenShift(D)
    depth, rest = rwkv_depth(layer)
    x = jnp.arange(D) / D  # 0 to 1 over channels
    slow, fast = 1 - x**rest, 1 - x ** (0.5 * rest)
    mix = jnp.stack([slow, slow, slow - 0.3 * depth, fast, fast])
    fixed = functools.partial(param, keys[3], weight_decay=False)
    self.mix_x = fixed(lambda *_: slow, (D,), ("embed",))
    self.mix = fixed(lambda *_: mix, (5, D), (None, "embed"))
    self.mix_down = Linear(keys[4], D, 5 * c.mix_rank, ("embed", None), init=zeros)
    self.mix_up = param(keys[5], _uniform(0.01), (5, c.mix_rank, D), (None, None, "embed"))
    n = jnp.arange(self.H * self.K)
    y = n / max(self.H * self.K - 1, 1)
    decay = (-6 + 5 * y ** (0.7 + 1.3 * depth)).reshape(shape)
    bonus = (depth * (1 - y) + ((n + 1) % 3 - 1) * 0.1).reshape(shape)
    self.decay = fixed(lambda *_: decay, shape, ("heads", None))
    self.bonus = fixed(lambda *_: bonus, shape, ("heads", None))
    self.w_lora = LowRank(
      keys[6],
      D,
      c.decay_rank,
      self.H * self.K,
      init_down=zeros,
      init_up=_uniform(0.01),
      activation=jnp.tanh,
    )

  def make_norm(self, layer: Layer):
    return HeadNorm(self.H, self.V, eps=1e-5 * self.V, center=True)

  def signals(self, x, recent, ctx):
    before = recent("shift", x) - x
    mix_x, mix = sharding.put(self.mix_x[...], "embed"), sharding.put(self.mix[...], None, "embed")
    low = jnp.tanh(self.mix_down(x + before * mix_x.astype(x.dtype)))
    low = low.reshape(*low.shape[:2], 5, -1)
    up = sharding.put(self.mix_up[...], None, None, "embed").astype(x.dtype)
    amount = mix[:, None, None].astype(x.dtype) + jnp.einsum("btsr,srd->sbtd", low, up)
    mixed = dict(zip(_SHIFTED, x + before * amount, strict=True))
    r, k, v = (
      sharding.split(getattr(self, f"{name}_proj")(mixed[name]), self.H, self.K) for name in "rkv"
    )
    g = -jnp.exp(by_channel(self.decay) + self.w_lora(mixed["w"]).astype(jnp.float32))
    g = sharding.split(g, self.H, self.K)
    gate = self.gate_proj(mixed["g"])
    return dict(r=r, k=k, v=v, g=g, u=sharding.put(self.bonus[...], "heads", None), gate=gate)

  def output(self, o, x, signals):
    """``W_o (norm(o) * silu(W_g x_g))``, the norm over each head."""
    gate = jax.nn.silu(signals["gate"].astype(jnp.float32))
    o = self.out_norm.heads(sharding.merge(o, 2))
    return self.out_proj((o * gate).astype(x.dtype))

  @staticmethod
  def equation(S, r, k, v, g, u):
    """wkv_t = diag(u) k_t v_t^T + S_{t-1}, o_t = wkv_t^T r_t, S_t = diag(w_t) S_{t-1} + k_t v_t^T; w = exp(g)."""
    wkv = jnp.diag(u) @ jnp.outer(k, v) + S
    S = jnp.diag(jnp.exp(g)) @ S + jnp.outer(k, v)
    return S, wkv.T @ r


def rwkv_sizes(config, d_model: int) -> tuple[int, int, int, int]:
  """Sizes of RWKV's heads: square states."""
  shape = LinearMixer.Config(num_heads=config.num_heads, head_dim=config.head_dim)
  H, K, _, _ = LinearMixer.sizes(shape, d_model)
  return H, K, H, K


def rwkv_depth(layer: Layer):
  """How deep a layer is: from 0 for the first to 1 for the last, and from 1 for the first to almost 0."""
  return layer.index / max(layer.count - 1, 1), 1 - layer.index / layer.count
