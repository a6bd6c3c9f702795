"""What linear mixers share: projections, short convolutions, the recurrence, then norm, output gate and projection.

A mechanism is a subclass with four things: ``signals`` (its gates, as arguments by name), ``core`` (the function of
those arguments: one of pallas_kernels, or its own mapping onto ``linear_recurrence``), ``equation`` (its paper's
update of one token and one head, literally; the contract tests hold ``core`` to it), and ``reference`` (in numpy, what
the paper has around that; they hold the layer to it). What differs from the common layer has a hook: ``sizes``,
``make_projections``, ``make_gate``, ``make_norm``, ``output``, ``init_state``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers.base import Cache, Context, Layer, Mixer, MixerOutput
from attnlab.nn import Linear, RMSNorm, ShortConv, TokenShift, l2norm_heads
from attnlab.settings import Natural

Signals = dict[str, Array]


class Recent:
  """The convolutions and shifts of one call: applies them by name and collects their new states."""

  def __init__(self, mixer: Mixer, ctx: Context, cache: Cache | None):
    self._mixer, self._ctx = mixer, ctx
    self._states = cache or {}
    self.states: Cache = {}

  def __call__(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """``getattr(mixer, name)`` over time on x."""
    layer = getattr(self._mixer, name)
    y, self.states[name] = layer(
      x, self._states.get(name), self._ctx.segment_ids, self._ctx.axis_name
    )
    return y

  @staticmethod
  def empty(mixer: Mixer, batch: int, dtype: jax.typing.DTypeLike) -> Cache:
    """The states before the first token."""
    return {
      name: jnp.zeros((batch, layer.width - 1, layer.channels), dtype)
      for name, layer in vars(mixer).items()
      if isinstance(layer, ShortConv | TokenShift)
    }


class LinearMixer(Mixer):
  """Base of the linear mixers. By default q and k are ``l2norm(silu(conv(W x)))`` and v is ``silu(conv(W x))``."""

  core: ClassVar[Callable[..., tuple[Array, Any]]]

  # A core that is ``linear_recurrence`` and nothing else along time.
  in_parts = True

  # Signals that are not arguments of ``core``: what only ``output`` and ``hand_on`` use.
  output_only: ClassVar[frozenset[str]] = frozenset()

  # Signals that say where a token is, and so have no gradient.
  without_gradient: ClassVar[frozenset[str]] = frozenset()

  # Signals of three axes and more that are the same for all tokens, as are all of fewer.
  constant: ClassVar[frozenset[str]] = frozenset()

  # Leaves of the state that are sums of ``k k^T``: symmetric, with no eigenvalue below zero. The core may rely on it.
  sums_of_squares: ClassVar[tuple[int, ...]] = ()

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Shapes of a linear mixer.

    Attributes:
      num_heads: heads of q and k; None: as many as make ``expand_k * d_model`` channels.
      head_dim: channels of a q and k head; None: ``expand_k * d_model / num_heads``.
      num_value_heads: heads of v, a multiple of num_heads; None: num_heads.
      value_dim: channels of a v head; None: ``expand_v / expand_k * head_dim``.
      expand_k, expand_v: width of all heads over d_model.
      conv_size: taps of the short convolution on q, k and v; 0: none.
      output_gate: False: without the gate that the mechanism has at its output.
      qk_norm: whether q and k are L2-normalised; None: as the mechanism has it.
    """

    num_heads: int | None = None
    head_dim: int | None = 128
    num_value_heads: int | None = None
    value_dim: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: Natural = 4
    output_gate: bool = True
    qk_norm: bool | None = None

  # Of the default projections and output; a mechanism overrides what differs.
  qkv_activation: ClassVar[Callable[[Array], Array] | None] = staticmethod(jax.nn.silu)
  qk_norm: bool = True
  gate_activation: ClassVar[Callable[[Array], Array] | None] = staticmethod(jax.nn.silu)

  def __init__(self, config: Mixer.Config, layer: Layer, key: Array):
    self.config = config
    own = type(self)
    # Mixers with a Config of their own, not derived from this one, have neither setting.
    gated, norm = getattr(config, "output_gate", True), getattr(config, "qk_norm", None)
    if not gated and own.output is not LinearMixer.output:
      raise UserError(
        f"mixer {self.name!r}: the gate is part of its output; output_gate=False is not possible"
      )
    if norm is not None:
      if own.make_projections is not LinearMixer.make_projections:
        raise UserError(f"mixer {self.name!r}: has projections of its own; qk_norm cannot be set")
      self.qk_norm = norm
    self.H, self.K, self.Hv, self.V = self.sizes(config, layer.d_model)
    if self.Hv % self.H:
      raise UserError(
        f"mixer {self.name!r}: {self.Hv} heads of values are not a multiple of {self.H} heads of keys"
      )
    keys = jax.random.split(key, 8)
    self.make_projections(layer, keys)
    self.out_norm = self.make_norm(layer)
    self.gate_proj = self.make_gate(layer.d_model, keys[6]) if gated else None
    self.out_proj = Linear(keys[7], self.Hv * self.V, layer.d_model, ("heads", "embed"))

  @classmethod
  def sizes(cls, config: Config, d_model: int) -> tuple[int, int, int, int]:
    """Heads of q and k, channels of each, heads of v, channels of each."""
    c, width = config, round(config.expand_k * d_model)
    if c.num_heads is None and c.head_dim is None:
      raise UserError(f"mixer {cls.name!r}: set num_heads or head_dim")
    H = c.num_heads or max(1, round(width / c.head_dim))
    if c.head_dim is None and width % H:
      raise UserError(
        f"mixer {cls.name!r}: num_heads={H} does not divide expand_k * d_model = {width}; "
        "choose another num_heads, or set head_dim"
      )
    K = c.head_dim or width // H
    return H, K, c.num_value_heads or H, c.value_dim or round(K * c.expand_v / c.expand_k)

  def split_heads(self) -> dict[str, int]:
    return {"num_heads" if self.Hv == self.H else "num_value_heads": self.Hv}

  def make_projections(self, layer: Layer, keys: Array) -> None:
    """q, k and v, and their convolutions."""
    widths = dict(q=self.H * self.K, k=self.H * self.K, v=self.Hv * self.V)
    self.make_convolved(layer.d_model, keys, widths)

  def make_convolved(
    self, d_model: int, keys: Array, widths: dict[str, int], bias: bool = False
  ) -> None:
    """What ``project`` uses: up to three ``{name}_proj`` of so many channels, and any convolutions of theirs."""
    size = self.config.conv_size
    for (name, width), key, conv in zip(widths.items(), keys[:3], keys[3:6], strict=False):
      setattr(self, f"{name}_proj", Linear(key, d_model, width))
      if size:
        setattr(self, f"{name}_conv", ShortConv(conv, width, size, bias=bias))

  def make_gate(self, d_model: int, key: Array):
    """The projection of the output gate; None without a gate."""
    if self.gate_activation is None:
      return None
    return Linear(key, d_model, self.Hv * self.V)

  def make_norm(self, layer: Layer):
    """The norm of the outputs [B, T, Hv, V]; by default over each head, all heads sharing one scale."""
    return RMSNorm(self.V, layer.norm_eps)

  def project(self, name: str, x: Float[Array, "B T D"], recent: Recent, *shape: int) -> Array:
    """``{name}_proj``, its convolution and the activation: [B, T, *shape], or [B, T, D] without a shape."""
    y = getattr(self, f"{name}_proj")(x)
    if self.config.conv_size:
      y = recent(f"{name}_conv", y)
    if self.qkv_activation is not None:
      y = self.qkv_activation(y)
    return sharding.split(y, *shape) if shape else y

  def qkv(self, x: Float[Array, "B T D"], recent: Recent) -> tuple[Array, Array, Array]:
    """q, k [B, T, H, K] and v [B, T, Hv, V] from the residual stream."""
    return self.in_heads(*self.side_by_side(x, recent))

  def side_by_side(self, x: Float[Array, "B T D"], recent: Recent) -> tuple[Array, Array, Array]:
    """q, k [B, T, H K] and v [B, T, Hv V]: for what changes them further, which costs a TPU no copy before heads are
    split (pallas_kernels/heads.py says why)."""
    q, k, v = (self.project(name, x, recent) for name in ("q", "k", "v"))
    if self.qk_norm:
      q, k = l2norm_heads(q, self.K), l2norm_heads(k, self.K)
    return q, k, v

  def in_heads(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """q, k [B, T, H, K] and v [B, T, Hv, V] from heads side by side."""
    q, k = (sharding.split(y, self.H, self.K) for y in (q, k))
    return q, k, sharding.split(v, self.Hv, self.V)

  def for_heads(self, x: Int[Array, "B T"]) -> Float[Array, "B T Hv"]:
    """What is of a token and not of a head, as a signal."""
    x = jnp.broadcast_to(x[..., None].astype(jnp.float32), (*x.shape, self.Hv))
    return sharding.put(x, "batch", None, "heads")

  def signals(self, x: Float[Array, "B T D"], recent: Recent, ctx: Context) -> Signals:
    """The arguments of ``core`` by name: [B, T, heads, ...], or [heads, ...] where constant over tokens.

    What ``output`` needs besides is here too, if its name is in ``output_only``.
    """
    raise NotImplementedError

  @staticmethod
  def equation(S: Any, **token: Array) -> tuple[Any, Array]:
    """One token of one head as the paper writes it: the state (as ``init_state`` without [B, H]) and signals without
    [B, T, H], to the new state and the output."""
    raise NotImplementedError

  def output(self, o: Float[Array, "B T Hv V"], x: Float[Array, "B T D"], signals: Signals):
    """What leaves the layer: by default ``W_o (norm(o) * act(W_g x))``, the norm over each head."""
    del signals
    o = self.out_norm.heads(sharding.merge(o, 2))
    if self.gate_proj is not None:
      gate = self.gate_activation(self.gate_proj(x).astype(jnp.float32))
      o = (o * gate).astype(x.dtype)
    return self.out_proj(o)

  def hand_on(self, signals: Signals, ctx: Context) -> dict[str, Array]:
    """What is left to later layers: the arrays that ``shared`` declares."""
    del signals, ctx
    return {}

  def scalars(self, signals: Signals, ctx: Context) -> dict[str, Array]:
    """``MixerOutput.aux``."""
    del signals, ctx
    return {}

  def init_state(self, batch: int) -> Any:
    """The state before the first token, every array [B, H, ...]; zeros."""
    return jnp.zeros((batch, self.Hv, self.K, self.V), jnp.float32)

  def init_cache(
    self, batch: int, max_len: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> Cache:
    del max_len
    return Recent.empty(self, batch, dtype) | {"state": self.init_state(batch)}

  # What ``core`` costs: its erase, and steps of the recurrence a token.
  erase: ClassVar[Literal["none", "key", "low_rank"]] = "none"

  @property
  def steps(self) -> int:
    """Steps of the recurrence a token."""
    return 1

  def core_flops(self, length: int, decode: bool) -> float:
    """Of the chunked form, C = 64 tokens a chunk, comparisons within it counted half for their mask."""
    K, V, C = self.K, self.V, min(64, length)
    rank = {"none": 0, "key": 1, "low_rank": 2}[self.erase]
    if (
      decode
    ):  # decay, write and read the state; an erase reads it once, and may write it once more
      step = (5 + 2 * rank) * K * V
    else:
      across = {"none": 2, "key": 3, "low_rank": 4}[self.erase]  # products with the state
      # comparisons of q, erase and write keys; their products with values; the triangular solve
      within = C * {"none": K + V, "key": 3 * K + 2 * V, "low_rank": 5 * K + 4 * V}[self.erase]
      step = 2 * across * K * V + within + (C * C / 3 if rank else 0)
    return self.Hv * self.steps * step

  def __call__(
    self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None = None
  ) -> MixerOutput:
    recent = Recent(self, ctx, cache)
    signals = self.signals(x, recent, ctx)
    o, state = self.run(signals, ctx, cache and cache["state"])
    if cache is not None:
      cache = recent.states | {"state": state}
      if ctx.segment_ids is not None:
        cache = without_padding(cache, ctx.segment_ids)
    aux, shared = self.scalars(signals, ctx), self.hand_on(signals, ctx)
    return MixerOutput(self.output(o, x, signals), cache, aux, shared)

  def run(self, signals: Signals, ctx: Context, state: Any) -> tuple[Array, Any]:
    """``core`` on each device's own sequences and heads."""
    # Devices may split value heads more finely than there are key heads: then each has the key heads it needs.
    repeats = sharding.size("heads") // math.gcd(sharding.size("heads"), self.H)
    if self.Hv % (self.H * repeats):
      repeats = 1  # value heads are not split either

    def per_device(x):
      is_keys = x.ndim > 2 and x.shape[2] == self.H != self.Hv
      return jnp.repeat(x, repeats, axis=2) if is_keys and repeats > 1 else x

    signals = {k: per_device(x) for k, x in signals.items() if k not in self.output_only}

    def axes(name, x):
      by_token = x.ndim >= 3 and name not in self.constant
      lead = ("batch", None, "heads") if by_token else ("heads",)
      return lead + (None,) * (x.ndim - len(lead))

    # Not every core takes rows in parts, and none is given them that does not.
    parts = {} if ctx.axis_name is None else {"axis_name": ctx.axis_name}

    def core(signals, segment_ids, state):
      return type(self).core(
        **signals,
        segment_ids=segment_ids,
        initial_state=state,
        return_state=state is not None,
        **parts,
      )

    state_axes = jax.tree.map(lambda s: ("batch", "heads") + (None,) * (s.ndim - 2), state)
    ids = None if ctx.segment_ids is None else ("batch", None)
    out = ("batch", None, "heads") + (None,) * self.output_rank
    in_axes = {name: axes(name, x) for name, x in signals.items()}
    run = sharding.local(core, (in_axes, ids, state_axes), (out, state_axes))
    return run(signals, ctx.segment_ids, state)

  # Axes of an output after [B, T, H].
  output_rank: ClassVar[int] = 1


def without_padding(cache: Cache, segment_ids: Array) -> Cache:
  """The cache, still empty for a sequence of which only padding has been seen (a long prompt read in pieces)."""
  padding = segment_ids[:, -1] == 0
  return jax.tree.map(lambda x: jnp.where(padding.reshape(-1, *[1] * (x.ndim - 1)), 0, x), cache)
