"""From heads of a token, [B, T, heads, dim], to tokens of a head, [B, heads, T, dim], as attention kernels take them.

For a TPU that is moving whole registers, where heads lie side by side and have whole registers of lanes. XLA moves
single numbers: it transposes tokens and channels, and back.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch

_LANES = 128
# Tokens of a register of bfloat16; tokens and bytes of a grid step, at the most.
_ROWS, _TOKENS, _BLOCK = 16, 512, 1 << 20


def heads_first(x: Float[Array, "B T H D"], *, backend: str = "auto") -> Float[Array, "B H T D"]:
  """``x`` with heads before tokens.

  Args:
    backend: "auto", "xla", "tpu" (a Pallas kernel), or "interpret": the same on any machine, slowly.

  Raises:
    NotImplementedError: a backend that was named cannot serve the call.
  """
  return _swap(x, True, _backend(x, backend))


def heads_last(x: Float[Array, "B H T D"], *, backend: str = "auto") -> Float[Array, "B T H D"]:
  """The inverse of ``heads_first``."""
  return _swap(x, False, _backend(x, backend))


def _backend(x: Array, backend: str) -> str:
  def serves():
    if x.dtype not in (jnp.bfloat16, jnp.float32):
      raise NotImplementedError(f"the TPU kernel takes bfloat16 or float32; x is {x.dtype}")
    if x.shape[3] % _LANES:
      raise NotImplementedError(
        f"the TPU kernel needs heads of whole {_LANES} lanes; got {x.shape[3]} channels"
      )

  return dispatch.xla_or_tpu(backend, x.dtype, serves)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _swap(x: Array, first: bool, backend: str) -> Array:
  return jnp.swapaxes(x, 1, 2) if backend == "xla" else _call(x, first, backend == "interpret")


def _forward(x, first, backend):
  return _swap(x, first, backend), None


def _backward(first, backend, _, dy):
  return (_swap(dy, not first, backend),)


_swap.defvjp(_forward, _backward)


def _call(x: Array, first: bool, interpret: bool | pltpu.InterpretParams) -> Array:
  B, a, b, D = x.shape
  T, H = (a, b) if first else (b, a)
  tokens = min(_TOKENS, _BLOCK // (H * D * x.dtype.itemsize), T) // _ROWS * _ROWS
  tokens = max(tokens, _ROWS)
  together = pl.BlockSpec((1, tokens, H * D), lambda b, t: (b, t, 0))
  apart = pl.BlockSpec((1, H, tokens, D), lambda b, t: (b, 0, t, 0))

  def kernel(x_ref, y_ref):
    for h in range(H):
      lanes = pl.ds(h * D, D)
      if first:
        y_ref[0, h] = x_ref[0, :, lanes]
      else:
        y_ref[0, :, lanes] = x_ref[0, h]

  y = pl.pallas_call(
    kernel,
    name="heads_first" if first else "heads_last",
    grid=(B, -(-T // tokens)),
    in_specs=[together if first else apart],
    out_specs=apart if first else together,
    out_shape=jax.ShapeDtypeStruct((B, H, T, D) if first else (B, T, H * D), x.dtype),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    cost_estimate=pl.CostEstimate(
      flops=0, transcendentals=0, bytes_accessed=2 * x.size * x.dtype.itemsize
    ),
    interpret=interpret,
  )(x.reshape(B, T, H * D) if first else x)
  return y if first else y.reshape(B, T, H, D)
