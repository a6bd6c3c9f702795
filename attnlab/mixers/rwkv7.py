"""RWKV-7 "Goose" (arXiv:2503.14456)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, Mixer, register
from attnlab.mixers.linear import LinearMixer
from attnlab.mixers.rwkv6 import rwkv_depth, rwkv_sizes
from attnlab.nn import (
  HeadNorm,
  Linear,
  LowRank,
  TokenShift,
  by_channel,
  expand_heads,
  fan_in,
  head_sums,
  l2norm_heads,
  param,
)
from pallas_kernels import rwkv7

_MIXED = ("r", "w", "k", "v", "a", "g")


@register(
  "rwkv7",
  family="linear",
  paper="arXiv:2503.14456",
  title="generalised delta rule: decay, removal key and rate a channel",
)
class RWKV7(LinearMixer):
  """Erases under one key, at a rate for each channel, and writes under another; values lean on the first layer's.

  Along the removal key the transition's eigenvalue is ``w - a``, at least ``exp(-0.6065) - 1 = -0.45``. There is no
  option of a rate ``a`` up to 2, as delta rules have for eigenvalues down to -1: what is erased is read from the state
  before its decay, so that a rate beyond ``1 + w`` makes the state grow without bound.

  Initial values of the mixing amounts and low-rank maps are those of the authors' code, by channel and layer. The norm
  of heads and the last projection begin as every mixer's here (theirs: the scale at ``((l + 1) / layers) ** 0.7``, the
  projection at zero).
  """

  erase = "low_rank"
  core = staticmethod(rwkv7)
  reference = linear_references.rwkv7
  output_only = frozenset({"gate", "own_v"})

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Attributes:
    num_heads: None: d_model / head_dim.
    head_dim: channels of a head.
    """

    num_heads: int | None = None
    head_dim: int = 64

  @classmethod
  def sizes(cls, config: Config, d_model: int):
    return rwkv_sizes(config, d_model)

  @classmethod
  def shared(cls, config: Config, d_model: int):
    """The values of the first layer of this kind, and 1 where there are any."""
    H, K, _, _ = cls.sizes(config, d_model)
    return {"rwkv7_v": (H, K), "rwkv7_has_v": ()}

  def make_projections(self, layer: Layer, keys):
    D, H, K = layer.d_model, self.H, self.K
    keys = jax.random.split(keys[0], 8)
    self.r_proj = Linear(keys[0], D, H * K)
    self.k_proj = Linear(keys[1], D, H * K, init=fan_in(0.1))
    self.v_proj = Linear(keys[2], D, H * K)
    self.shift = TokenShift(D)

    def low_rank(key, factor, activation=lambda x: x):
      rank = max(32, round(factor * D**0.5 / 32) * 32)
      up = jax.nn.initializers.orthogonal(0.1)
      zeros = jax.nn.initializers.zeros
      return LowRank(key, D, rank, H * K, init_down=zeros, init_up=up, activation=activation)

    scale = K / 64  # wider heads get wider low-rank maps
    self.w_lora = low_rank(keys[3], 2.5 * scale, jnp.tanh)
    self.a_lora = low_rank(keys[4], 2.5 * scale)
    self.v_lora = low_rank(keys[5], 1.7 * scale)
    self.g_lora = low_rank(keys[6], 5.0, jax.nn.sigmoid)

    def fixed(value, axes):
      return param(keys[7], lambda *_: value, value.shape, axes, weight_decay=False)

    depth, rest = rwkv_depth(layer)
    x, y = jnp.arange(D) / D, jnp.linspace(0, 1, H * K).reshape(H, K)
    powers = jnp.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])
    self.mix = fixed(1 - x ** (powers * rest)[:, None], (None, "embed"))
    zigzag = jnp.linspace(-1, 1, K)
    zigzag, middle = zigzag * jnp.abs(zigzag), y - 0.5
    by_head = functools.partial(fixed, axes=("heads", None))
    self.w0 = by_head(-6 + 6 * y ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
    self.a0 = by_head(-0.19 + 0.3 * zigzag + 0.4 * middle)
    self.v0 = by_head(0.73 - 0.4 * middle)
    self.k_k = by_head(0.71 - 0.1 * middle)
    self.k_a = by_head(jnp.full((H, K), 1.02))
    self.r_k = by_head(jnp.full((H, K), -0.04))

  def make_norm(self, layer: Layer):
    return HeadNorm(self.H, self.V, eps=1e-5 * self.V, center=True)

  def make_gate(self, d_model, key):
    return None  # g_lora, of the mixed token

  def signals(self, x, recent, ctx):
    before = recent("shift", x) - x
    mix = sharding.put(self.mix[...], None, "embed").astype(x.dtype)
    mixed = {name: x + before * mix[i] for i, name in enumerate(_MIXED)}

    def heads(y):
      return sharding.split(y, self.H, self.K)

    def gate(name):  # sigmoid(bias + low-rank map), float32
      low_rank = getattr(self, f"{name}_lora")(mixed[name]).astype(jnp.float32)
      return jax.nn.sigmoid(by_channel(getattr(self, f"{name}0")) + low_rank)

    r, k, v = (getattr(self, f"{name}_proj")(mixed[name]) for name in "rkv")
    a = gate("a")
    own_v = v = heads(v)
    if "rwkv7_v" in ctx.shared:
      first = sharding.put(ctx.shared["rwkv7_v"], "batch", None, "heads", None)
      lean = ctx.shared["rwkv7_has_v"][..., None, None] * heads(gate("v"))
      v = (v + (first - v) * lean).astype(x.dtype)
    return dict(
      r=heads(r),
      w=-(jnp.e**-0.5) * heads(gate("w")),
      k=heads((k * (1 + (a - 1) * by_channel(self.k_a))).astype(x.dtype)),
      v=v,
      kappa=heads(l2norm_heads(k * by_channel(self.k_k), self.K).astype(x.dtype)),
      a=heads(a),
      gate=self.g_lora(mixed["g"]),
      own_v=own_v,
    )

  def hand_on(self, signals, ctx):
    if "rwkv7_v" not in ctx.shared:
      return {}
    given, has = ctx.shared["rwkv7_v"], ctx.shared["rwkv7_has_v"]
    v = sharding.like(signals["own_v"], given)
    return {
      "rwkv7_v": jnp.where(has[..., None, None] > 0, given, v),
      "rwkv7_has_v": jnp.ones_like(has),
    }

  def output(self, o, x, signals):
    """``W_o ((norm(o) + (sum r k r_k) v) * g)``, the norm and the sum over each head."""
    r, k, v = (sharding.merge(signals[name], 2).astype(jnp.float32) for name in "rkv")
    own = expand_heads(head_sums(r * k * by_channel(self.r_k), self.K), self.V) * v
    o = self.out_norm.heads(sharding.merge(o, 2))
    return self.out_proj(((o + own) * signals["gate"]).astype(x.dtype))

  @staticmethod
  def equation(S, r, w, k, v, kappa, a):
    """S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T, o_t = S_t^T r_t; here ``w`` is log w."""
    S = (jnp.diag(jnp.exp(w)) - jnp.outer(a * kappa, kappa)) @ S + jnp.outer(k, v)
    return S, S.T @ r
