"""Attention to pools: dense, but to a few entries for many tokens; of a query's document, and not of the future."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.pool_attention import tpu, xla

_ATTEND: dict[str, Callable[..., Any]] = {
  "xla": xla.attend,
  "tpu": tpu.attend,
  "interpret": functools.partial(tpu.attend, interpret=True),
}
_WEIGHTS: dict[str, Callable[..., Any]] = {
  "xla": xla.weights,
  "tpu": tpu.weights,
  "interpret": functools.partial(tpu.weights, interpret=True),
}


def pool_attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B N G K"],
  v: Float[Array, "B N G V"],
  first: Int[Array, "B T"],
  complete: Int[Array, "B T"],
  *,
  scale: float,
  backend: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
  """``softmax(scale q k^T) v`` over the pools from ``first`` on, ``complete`` of them.

  Differentiable in q, k and v, through both results. No array of a query's pools is held for all queries. On TPUs a
  Pallas kernel holds none at all, and skips pools that no query of a tile sees.

  Args:
    q: queries; head h reads group ``h // (H / G)``.
    k, v: summaries of pools, those of a row's documents one after another.
    first: the number of the first pool of each query's document.
    complete: how many pools of its document a query sees.
    scale: of the logits.
    backend: "auto", "xla", "tpu", or "interpret": the TPU's kernel on any machine, slowly.

  Returns:
    o in q's dtype, zero where a query sees nothing, and lse, the logarithm of the softmax's denominator in float32
    (float64 for float64 inputs), -inf where it is zero: with it, results over other keys can be merged
    (``merge_attention``).

  Raises:
    ValueError: arguments that do not fit.
    NotImplementedError: a backend that was named cannot serve the call.
  """
  _check(q, k, v, first, complete)
  serves = functools.partial(tpu.supports, q, k, v)
  name = dispatch.xla_or_tpu(backend, jnp.result_type(q, k, v), serves)
  return _ATTEND[name](q, k, v, first, complete, scale)


def pool_weights(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B N G K"],
  first: Int[Array, "B T"],
  complete: Int[Array, "B T"],
  *,
  scale: float,
  lse: Float[Array, "B T H"] | None = None,
  backend: str = "auto",
) -> Float[Array, "B G T N"]:
  """The softmax's weights of each pool, summed over the heads of a group; zero where a query does not see it.

  What selections of blocks and teachers of indexers are made of. No gradient. The result is as large as it is: ask for
  some queries at a time (``weights_at_a_time``).

  Args:
    q, k, first, complete, scale, backend: as of ``pool_attention``.
    lse: the weights are ``exp(scale q k^T - lse)``; None: it is these pools' own. That of more keys gives their share.

  Returns:
    Float32, or float64 for float64 inputs.
  """
  _check(q, k, k, first, complete)
  name = _of_weights(q, k, backend)
  q, k, lse = jax.lax.stop_gradient((q, k, lse))
  return _WEIGHTS[name](q, k, first, complete, scale, lse)


def weights_at_a_time(
  q: Float[Array, "B T H K"], k: Float[Array, "B N G K"], *, backend: str = "auto"
) -> int:
  """Of how many queries to ask for the weights at a time: XLA holds those of every head."""
  B, _, H, _ = q.shape
  _, N, G, _ = k.shape
  name = _of_weights(q, k, backend)
  return dispatch.at_a_time(4 * B * N * (H if name == "xla" else G))


def _of_weights(q, k, backend: str) -> str:
  """The backend of ``pool_weights``, whether or not it is given lse."""

  def serves():
    tpu.supports(q, k)
    tpu.supports(q, k, k[..., :1])

  return dispatch.xla_or_tpu(backend, jnp.result_type(q, k), serves)


def _check(q, k, v, first, complete):
  if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
    raise ValueError(f"q, k and v must have four axes; got {q.shape}, {k.shape}, {v.shape}")
  (B, T, H, K), (_, N, G, _) = q.shape, k.shape
  if k.shape != (B, N, G, K) or v.shape[:3] != k.shape[:3]:
    raise ValueError(
      f"k and v must be [{B}, N, G, {K}] and [{B}, N, G, V] to fit q {q.shape}; got {k.shape}, {v.shape}"
    )
  if H % G:
    raise ValueError(f"q's {H} heads must be a multiple of the {G} groups")
  for name, x in (("first", first), ("complete", complete)):
    if x.shape != (B, T):
      raise ValueError(f"{name} must be [{B}, {T}]; got {x.shape}")
