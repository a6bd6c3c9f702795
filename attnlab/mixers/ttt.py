"""Test-time training: TTT-Linear and TTT-MLP (arXiv:2407.04620)."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, Mixer, register
from attnlab.mixers.linear import LinearMixer
from attnlab.mixers.mamba2 import inner_heads
from attnlab.nn import HeadNorm, Linear, ShortConv, param, rope_heads
from attnlab.settings import Natural
from pallas_kernels.ttt import empty_state, gelu, ttt

_zeros, _ones = jax.nn.initializers.zeros, jax.nn.initializers.ones


@register(
  "ttt_linear",
  family="linear",
  paper="arXiv:2407.04620",
  title="a linear model a head, trained token by token in mini-batches",
)
class TTTLinear(LinearMixer):
  """Each head's state is a model that learns to give values for keys; see ``pallas_kernels.ttt``.

  q and k are one projection with a convolution each, rotated by their places in the mini-batch.
  """

  core = staticmethod(ttt)
  reference = linear_references.ttt
  in_parts = False
  gate_activation = staticmethod(gelu)
  without_gradient = frozenset({"place"})
  constant = frozenset({"W1", "W2"})
  # Channels of a model's hidden layer over those of a head; 0: there is none.
  hidden: ClassVar[int] = 0

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Attributes:
    num_heads: None: as many as make d_model channels.
    head_dim: channels of a head.
    mini_batch: tokens that learn from the same parameters.
    base_rate: of learning.
    conv_size: taps of the short convolutions on q and k; 0: none.
    rope_theta: base of the rotary frequencies.
    """

    num_heads: int | None = None
    head_dim: int = 64
    mini_batch: int = 16
    base_rate: float = 1.0
    conv_size: Natural = 4
    rope_theta: float = 10000.0

  @classmethod
  def sizes(cls, config, d_model):
    H, K = config.num_heads or inner_heads(cls, d_model, config.head_dim), config.head_dim
    return H, K, H, K

  def make_projections(self, layer: Layer, keys):
    D, H, K, size = layer.d_model, self.H, self.K, self.config.conv_size
    self.q_proj = Linear(keys[0], D, H * K)
    self.v_proj = Linear(keys[1], D, H * K)
    if size:
      self.q_conv = ShortConv(keys[2], H * K, size, bias=True)
      self.k_conv = ShortConv(keys[3], H * K, size, bias=True)
    self.rate_proj = Linear(keys[4], D, H, bias=_zeros)
    self.step_bias = param(keys[5], _zeros, (self.config.mini_batch,), (None,), weight_decay=False)
    widths = [K, self.hidden * K, K] if self.hidden else [K, K]
    for i, shape in enumerate(zip(widths, widths[1:], strict=False), 1):
      # An MLP's second matrix begins smaller the more layers there are.
      std = 0.02 if i == 1 else 0.02 * (2 * layer.count) ** -0.5
      key, normal = jax.random.fold_in(keys[5], i), jax.nn.initializers.normal(std)
      axes = "heads", None, None
      setattr(self, f"W{i}", param(key, normal, (H, *shape), axes, weight_decay=False))
      setattr(self, f"b{i}", param(key, _zeros, (H, shape[1]), axes[:2], weight_decay=False))
    self.inner_scale = param(keys[5], _ones, (H, K), ("heads", None), weight_decay=False)
    self.inner_bias = param(keys[5], _zeros, (H, K), ("heads", None), weight_decay=False)

  def make_norm(self, layer: Layer):
    return HeadNorm(self.H, self.K, groups=1, eps=layer.norm_eps, center=True)

  def init_state(self, batch):
    return empty_state(batch, itertools.batched(self.start.values(), 2))

  @property
  def start(self):
    """What each document begins with, by the names that the engine has for it: W1, b1, and so on."""
    names = ("W1", "b1", "W2", "b2") if self.hidden else ("W1", "b1")
    return {name: getattr(self, name) for name in names}

  def signals(self, x, recent, ctx):
    c, b = self.config, self.config.mini_batch
    qk = self.q_proj(x)
    q, k = (recent(f"{name}_conv", qk) if c.conv_size else qk for name in "qk")
    place = ctx.positions % b
    q, k = (rope_heads(y, place, self.K, c.rope_theta) for y in (q, k))
    rate = jax.nn.sigmoid(self.rate_proj(x).astype(jnp.float32)) * (c.base_rate / self.K)
    step = jnp.maximum(1 / (1 + jnp.arange(b)) + self.step_bias[...], 0)
    own = self.start | {"scale": self.inner_scale, "bias": self.inner_bias}
    return dict(
      q=sharding.split(q, self.H, self.K),
      k=sharding.split(k, self.H, self.K),
      v=sharding.split(self.v_proj(x), self.H, self.K),
      rate=rate,
      place=self.for_heads(place),
      step=sharding.put(jnp.broadcast_to(step, (self.H, b)), "heads", None),
      **{name: sharding.put(p[...], *p.get_metadata()["axes"]) for name, p in own.items()},
    )

  def core_flops(self, length, decode):
    """A token's key and query through the model and its sums, and the sums of its gradients; in a mini-batch, its
    comparisons, which are counted half for their mask."""
    M = self.hidden * self.K
    layers = [(self.K, M), (M, self.K)] if M else [(self.K, self.K)]
    sizes = sum(i * o for i, o in layers)
    back = sum(i * o for i, o in layers[1:])  # the gradient of what a layer gives the next
    within = 0 if decode else sum(i + o for i, o in layers) * self.config.mini_batch
    return self.H * (2 * (3 + decode) * sizes + 2 * back + within)

  @staticmethod
  def equation(S, q, k, v, rate, place, step, scale, bias, W1, b1, W2=None, b2=None):
    """W_t = W_0 - eta_t sum_s rate_s dl(W_0; x_s)/dW, z_t = f(q_t; W_t) (sections 2.1, 2.4 and 2.7)."""
    start = [(W1, b1)] if W2 is None else [(W1, b1), (W2, b2)]
    # The mini-batch before is done, and learnt.
    first, S_ = place == 0, []
    for D, d, G, g in S:
      D, d = (jnp.where(first, x - step[-1] * y, x) for x, y in ((D, G), (d, g)))
      S_.append((D, d, *(jnp.where(first, 0, y) for y in (G, g))))

    def f(layers, x):
      z = x
      for i, (W, b) in enumerate(layers):
        z = (jax.nn.gelu(z) if i else z) @ W + b
      z = (z - z.mean()) / jnp.sqrt(z.var() + 1e-6)
      return x + scale * z + bias

    now = [(W + D, b + d) for (W, b), (D, d, *_) in zip(start, S_, strict=True)]
    loss = lambda layers: jnp.sum((f(layers, k) - v) ** 2) / 2  # noqa: E731
    gradients = jax.grad(loss)(now)
    S_ = [
      (D, d, G + rate * dW, g + rate * db)
      for (D, d, G, g), (dW, db) in zip(S_, gradients, strict=True)
    ]
    eta = step[place.astype(int)]
    after = [(W - eta * G, b - eta * g) for (W, b), (_, _, G, g) in zip(now, S_, strict=True)]
    return tuple(S_), f(after, q)


@register(
  "ttt_mlp",
  family="linear",
  paper="arXiv:2407.04620",
  title="an MLP a head, trained token by token in mini-batches",
)
class TTTMLP(TTTLinear):
  """TTT-Linear with a hidden layer of four times a head's channels."""

  reference = linear_references.ttt
  hidden = 4

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(TTTLinear.Config):
    base_rate: float = 0.1
