"""Layers. The dtype policy: parameters are float32, activations have a dtype, and a layer computes in its input's.

Norms, gates and everything that feeds an exponent compute in float32 whatever the activations are.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnlab import sharding
from pallas_kernels import context_parallel, heads, segments
from pallas_kernels import rope as kernels
from pallas_kernels.short_conv import short_conv

Init = Callable[..., Array]


class Constant(nnx.Variable):
  """An array that belongs to a model and is not trained."""


class Stepped(Constant):
  """One that each update moves by its metadatum ``rate`` against the sign of its gradient; no optimizer knows of it."""


def param(
  key: Array,
  init: Init,
  shape: Sequence[int],
  axes: Sequence[str | None],
  weight_decay: bool | None = None,
) -> nnx.Param:
  """A float32 parameter.

  Args:
    key: a PRNG key.
    init: ``init(key, shape, dtype)``, as in jax.nn.initializers.
    shape, axes: the size and the logical axis (attnlab.sharding.TABLE) of each dimension.
    weight_decay: whether the optimizer decays it; by default matrices and larger only.
  """
  decay = len(shape) >= 2 if weight_decay is None else weight_decay
  assert len(shape) == len(axes), (shape, axes)
  return nnx.Param(init(key, tuple(shape), jnp.float32), axes=tuple(axes), weight_decay=decay)


def is_matrix(p: nnx.Param) -> bool:
  """Whether tokens are multiplied by it, unlike taps, biases of channels and mixing amounts, and tables of rows."""
  meta = p.get_metadata()
  return meta["weight_decay"] and len(meta["axes"]) >= 2 and "vocab" not in meta["axes"]


def fan_in(scale: float = 1.0, stacked: int = 0) -> Init:
  """Truncated normal of variance ``scale^2 / inputs``, of matrices along ``stacked`` leading axes."""
  axes = tuple(range(stacked))
  return jax.nn.initializers.variance_scaling(
    scale**2, "fan_in", "truncated_normal", batch_axis=axes
  )


class Linear(nnx.Module):
  """``x @ kernel + bias``, kernel [inputs, outputs].

  Args:
    inputs, outputs: sizes.
    axes: logical axes of the kernel. ("embed", "heads") splits its columns over devices, ("heads", "embed") its rows.
    bias: an initializer of the bias, or None.
  """

  def __init__(
    self,
    key: Array,
    inputs: int,
    outputs: int,
    axes: tuple[str | None, str | None] = ("embed", "heads"),
    bias: Init | None = None,
    init: Init | None = None,
  ):
    self.kernel = param(key, init or fan_in(), (inputs, outputs), axes)
    key = jax.random.fold_in(key, 1)
    self.bias = None if bias is None else param(key, bias, (outputs,), (axes[1],))

  def __call__(self, x: Float[Array, "B ... inputs"]) -> Float[Array, "B ... outputs"]:
    axes = self.kernel.get_metadata()["axes"]
    y = sharding.matmul(x, self.kernel[...].astype(x.dtype), axes)
    if self.bias is not None:
      y = y + sharding.put(self.bias[...].astype(x.dtype), axes[1])
    return y

  def to_heads(self, x: Float[Array, "B T inputs"], count: int) -> Float[Array, "B T count size"]:
    """``sharding.split`` of the outputs into heads, for attention. Linear mechanisms take them unsplit."""
    assert self.bias is None
    axes = self.kernel.get_metadata()["axes"]
    return sharding.matmul_heads(x, self.kernel[...].astype(x.dtype), axes, count)

  def of_heads(self, x: Float[Array, "B T count size"]) -> Float[Array, "B T outputs"]:
    """The outputs of heads that would lie side by side."""
    assert self.bias is None
    axes = self.kernel.get_metadata()["axes"]
    return sharding.matmul_of_heads(x, self.kernel[...].astype(x.dtype), axes)


class LowRank(nnx.Module):
  """Two projections with few channels between them, as gates have; the first is not split over devices."""

  def __init__(
    self,
    key: Array,
    inputs: int,
    rank: int,
    outputs: int,
    bias: Init | None = None,
    init_down: Init | None = None,
    init_up: Init | None = None,
    activation: Callable[[Array], Array] = lambda x: x,
  ):
    down, up = jax.random.split(key)
    self.down = Linear(down, inputs, rank, ("embed", None), init=init_down)
    self.up = Linear(up, rank, outputs, (None, "heads"), bias=bias, init=init_up)
    self.activation = activation

  def __call__(self, x: Float[Array, "B ... inputs"]) -> Float[Array, "B ... outputs"]:
    return self.up(self.activation(self.down(x)))


class RMSNorm(nnx.Module):
  """``x / rms(x) * scale`` over the last axis, in float32 (arXiv:1910.07467).

  Args:
    size: of the last axis.
    axis: its logical axis, None where it is not split.
    scale: whether there is a learned scale.
  """

  def __init__(self, size: int, eps: float = 1e-6, axis: str | None = None, scale: bool = True):
    self.size, self.eps = size, eps
    ones = jax.nn.initializers.ones
    self.scale = param(jax.random.key(0), ones, (size,), (axis,)) if scale else None

  def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    if self.scale is not None:
      y = y * sharding.put(self.scale[...], *self.scale.get_metadata()["axes"])
    return y.astype(x.dtype)

  def heads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The norm of each head, D being heads of ``size`` channels side by side."""
    y = x.astype(jnp.float32)
    square = head_sums(y * y, self.size, x.dtype) / self.size
    y = y * expand_heads(jax.lax.rsqrt(square + self.eps), self.size)
    if self.scale is not None:
      scale = sharding.put(self.scale[...], *self.scale.get_metadata()["axes"])
      y = y * sharding.put(jnp.tile(scale, x.shape[-1] // self.size), "heads")
    return y.astype(x.dtype)


class HeadNorm(nnx.Module):
  """Normalises within groups of heads, in float32, with a scale for each channel of each head.

  Args:
    groups: how many groups of heads have a norm of their own; 1: one norm over all channels.
    center: LayerNorm, with a mean and a bias, instead of RMSNorm; with a group for each head the GroupNorm of RWKV.
  """

  def __init__(
    self, heads: int, size: int, groups: int | None = None, eps: float = 1e-6, center: bool = False
  ):
    self.count, self.size, self.groups, self.eps = heads, size, groups or heads, eps
    if heads % self.groups:
      raise ValueError(f"cannot normalise {heads} heads in {groups} groups")
    ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
    shape, axes, key = (heads, size), ("heads", None), jax.random.key(0)
    self.scale = param(key, ones, shape, axes, weight_decay=False)
    self.bias = param(key, zeros, shape, axes, weight_decay=False) if center else None

  def heads(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The norm, D being heads of ``size`` channels side by side."""
    y = x.astype(jnp.float32)
    if self.bias is not None:
      y = y - expand_heads(self._mean(y, x.dtype), self.size)
    square = self._mean(y * y, x.dtype)
    y = y * expand_heads(jax.lax.rsqrt(square + self.eps), self.size)
    y = y * by_channel(self.scale)
    if self.bias is not None:
      y = y + by_channel(self.bias)
    return y.astype(x.dtype)

  def _mean(
    self, y: Float[Array, "B T D"], dtype: jax.typing.DTypeLike
  ) -> Float[Array, "B T heads"]:
    """Of each head's group, rounded as ``dtype``."""
    mean = head_sums(y, self.size, dtype) / self.size
    if self.groups == self.count:
      return mean
    # Heads may lie on several devices: their means are few.
    mean = sharding.put(mean, "batch", None, None)
    each = mean.reshape(*mean.shape[:2], self.groups, -1)
    mean = jnp.broadcast_to(jnp.mean(each, axis=-1, keepdims=True), each.shape)
    return sharding.put(mean.reshape(*mean.shape[:2], -1), "batch", None, "heads")


def l2norm_heads(x: Float[Array, "B T D"], size: int, eps: float = 1e-6) -> Float[Array, "B T D"]:
  """``x / |x|`` of each head in float32, D being heads of ``size`` channels side by side."""
  y = x.astype(jnp.float32)
  factor = jax.lax.rsqrt(head_sums(y * y, size, x.dtype) + eps)
  return (y * expand_heads(factor, size)).astype(x.dtype)


# --- heads side by side: see pallas_kernels/heads.py ---


def head_sums(
  x: Float[Array, "B T D"], size: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "B T heads"]:
  """Sums of float32 numbers over each head of ``size`` channels; rounded as ``dtype`` is where that is bfloat16."""
  count, axes = x.shape[-1] // size, ("batch", None, "heads")
  if count % sharding.size("heads"):  # devices hold parts of heads
    return jnp.sum(sharding.split(x, count, size), axis=-1)
  return sharding.local(lambda x: heads.sums(x, size, dtype), (axes,), axes)(x)


def expand_heads(x: Float[Array, "B T heads"], size: int) -> Float[Array, "B T D"]:
  """Each head's float32 number at all of its ``size`` channels."""
  axes = ("batch", None, "heads")
  if x.shape[-1] % sharding.size("heads"):
    x = sharding.put(x, "batch", None, None)
    return sharding.put(jnp.repeat(x, size, axis=-1), *axes)
  return sharding.local(lambda x: heads.expand(x, size), (axes,), axes)(x)


def by_channel(
  p: nnx.Param | Float[Array, "heads ..."], size: int | None = None
) -> Float[Array, " D"]:
  """A parameter [heads, size], or [heads] for each of ``size`` channels, for heads that lie side by side."""
  if size is not None:
    return sharding.put(jnp.repeat(sharding.put(p[...], None), size), "heads")
  return sharding.put(sharding.merge(sharding.put(p[...], "heads", None), 2), "heads")


class ShortConv(nnx.Module):
  """Causal depthwise convolution over time, ``width`` taps a channel; the last tap is the token itself."""

  def __init__(
    self, key: Array, channels: int, width: int, axis: str | None = "heads", bias: bool = False
  ):
    self.axis = axis
    self.width, self.channels = width, channels
    bound = 1 / math.sqrt(width)  # PyTorch's initialisation of a depthwise convolution
    init = functools.partial(_uniform, bound)
    self.weight = param(key, init, (width, channels), (None, axis), weight_decay=False)
    key = jax.random.fold_in(key, 1)
    self.bias = param(key, init, (channels,), (axis,)) if bias else None

  def __call__(
    self,
    x: Float[Array, "B T D"],
    state: Float[Array, "B past D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B past D"]]:
    """The convolved tokens, and the last inputs: the state with which the next tokens continue.

    With ``axis_name`` rows are in parts (``Context.parts``).
    """
    rows = ("batch", None, self.axis)
    run = sharding.local(
      lambda x, w, b, s, ids: short_conv(x, w, b, s, segment_ids=ids, axis_name=axis_name),
      (
        rows,
        (None, self.axis),
        None if self.bias is None else (self.axis,),
        None if state is None else rows,
        None if segment_ids is None else ("batch", None),
      ),
      (rows, rows),
    )
    weight = self.weight[...].astype(x.dtype)
    bias = None if self.bias is None else self.bias[...].astype(x.dtype)
    return run(x, weight, bias, state, segment_ids)


class TokenShift(nnx.Module):
  """The token before each token, zero at a document's first.

  Args:
    channels: of a token.
    axis: their logical axis.
  """

  width = 2

  def __init__(self, channels: int, axis: str | None = None):
    self.channels, self.axis = channels, axis

  def __call__(
    self,
    x: Float[Array, "B T D"],
    state: Float[Array, "B 1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    axis_name: str | None = None,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
    """The shifted tokens, and the last one for the call after this. Of rows in parts there is no call after this."""
    first = jnp.zeros_like(x[:, :1]) if state is None else state

    def shift(x, first, segment_ids):
      before = context_parallel.previous(x, first, axis_name)
      if segment_ids is None:
        return before
      return jnp.where(segments.starts(segment_ids, axis_name)[..., None], 0, before)

    rows, ids = ("batch", None, self.axis), None if segment_ids is None else ("batch", None)
    return sharding.local(shift, (rows, rows, ids), rows)(x, first, segment_ids), x[:, -1:]


def _uniform(bound: float, key: Array, shape: Sequence[int], dtype) -> Array:
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def rope(
  x: Float[Array, "B T H D"],
  positions: Int[Array, "B T"],
  theta: float = 10000.0,
  fraction: float = 1.0,
  scaling: kernels.Scaling | None = None,
) -> Float[Array, "B T H D"]:
  """RoPE (``pallas_kernels.rope``) on each device's own heads."""
  axes = ("batch", None, "heads", None)
  run = lambda x, positions: kernels.rope(x, positions, theta, fraction, scaling)  # noqa: E731
  return sharding.local(run, (axes, ("batch", None)), axes)(x, positions)


def rope_heads(
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  size: int,
  theta: float = 10000.0,
  fraction: float = 1.0,
  scaling: kernels.Scaling | None = None,
  axis: str | None = "heads",
) -> Float[Array, "B T D"]:
  """RoPE of heads of ``size`` channels side by side (``pallas_kernels.rope``), which lie along a logical axis."""
  count, axes = x.shape[-1] // size, ("batch", None, axis)
  turn = theta, fraction, scaling
  if axis is not None and count % sharding.size(axis):  # devices hold parts of heads
    return sharding.merge(rope(sharding.split(x, count, size), positions, *turn), 2)
  run = lambda x, positions: kernels.rope_heads(x, positions, size, *turn)  # noqa: E731
  return sharding.local(run, (axes, ("batch", None)), axes)(x, positions)


class SwiGLU(nnx.Module):
  """``W_down (silu(W_gate x) * W_up x)`` (arXiv:2002.05202)."""

  def __init__(self, key: Array, d_model: int, hidden: int):
    gate, up, down = jax.random.split(key, 3)
    self.gate = Linear(gate, d_model, hidden, ("embed", "mlp"))
    self.up = Linear(up, d_model, hidden, ("embed", "mlp"))
    self.down = Linear(down, hidden, d_model, ("mlp", "embed"))

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
