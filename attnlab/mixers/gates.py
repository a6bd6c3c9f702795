"""Initialisations and forms of gates that several mechanisms use."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def log_uniform_rate(low: float, high: float):
  """An initializer of ``A_log``: the log of a rate uniform in [low, high]."""

  def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, max(low, 1e-4), high))

  return init


def inverse_softplus_step(low: float = 1e-3, high: float = 0.1):
  """An initializer of ``dt_bias``: the inverse softplus of a step log-uniform in [low, high]."""

  def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
    return dt + jnp.log(-jnp.expm1(-dt))

  return init


def softplus_decay(
  f: Float[Array, "..."], A_log: Float[Array, "..."], dt_bias: Float[Array, "..."]
) -> Float[Array, "..."]:
  """``-exp(A_log) softplus(f + dt_bias)`` in float32: the log decay of Mamba-2, Gated DeltaNet and KDA."""
  return -jnp.exp(A_log) * jax.nn.softplus(f.astype(jnp.float32) + dt_bias)


def step_size(x: Float[Array, "..."], negative_eigenvalues: bool) -> Float[Array, "..."]:
  """``beta = sigmoid(x)`` in float32; times 2 for eigenvalues 1 - beta down to -1 (arXiv:2411.12537)."""
  beta = jax.nn.sigmoid(x.astype(jnp.float32))
  return 2 * beta if negative_eigenvalues else beta
