"""Float32 products are float32 on accelerators too, where the default is one pass of bfloat16 or TF32.

A CPU computes all of them in float32, and so do Pallas's interpreters: no comparison of numbers notices. What is asked
for is in the traced programs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from attnlab.moe import MoE
from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.cost.kernels import subjaxprs
from pallas_kernels.index_scores import index_scores
from pallas_kernels.pool_attention import pool_attention
from pallas_kernels.softmax_attention import softmax_attention

B, T, H, K = 1, 64, 2, 64


def products(jaxpr):
  """The matrix products of float32 in a program, its kernels, loops and derivatives."""
  for eqn in jaxpr.eqns:
    operands = [v.aval.dtype for v in eqn.invars if hasattr(v.aval, "dtype")]
    if eqn.primitive.name == "dot_general" and jnp.float32 in operands:
      yield eqn
    for value in eqn.params.values():
      for sub in subjaxprs(value):
        yield from products(sub)


def unlike(fn, *args):
  """Of a function and its derivative: products of float32, and those of them that are not asked for in full."""

  def loss(*args):
    return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(fn(*args)))

  number = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.inexact)]
  found = list(products(jax.make_jaxpr(jax.grad(loss, number))(*args).jaxpr))
  # Parts of a number, which are exact in bfloat16, and matrices of ones, say so by another precision than the default.
  return found, [str(eqn) for eqn in found if eqn.params["precision"] is None]


def random(*shape):
  return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


X = random(B, T, H, K)
GATE, STEP = -np.abs(X), np.abs(X[..., 0])


def recurrence(name, backend):
  """A function of q and more, and its arguments."""
  calls = {
    "none": (lambda q, k, v: pk.linear_attention(q, k, v, backend=backend), (X, X, X)),
    "key": (
      lambda q, k, v, g, beta: pk.gated_delta_rule(q, k, v, g, beta, backend=backend),
      (X, X, X, GATE[..., 0], STEP),
    ),
    "channel, key": (
      lambda q, k, v, g, beta: pk.kda(q, k, v, g, beta, backend=backend),
      (X, X, X, GATE, STEP),
    ),
    "channel, low rank": (
      lambda r, w, k, v, kappa, a: pk.rwkv7(r, w, k, v, kappa, a, backend=backend),
      (X, GATE, X, X, X, STEP[..., None] * X),
    ),
    "bonus": (
      lambda q, k, v, g, u: pk.rwkv6(q, k, v, g, u, backend=backend),
      (X, X, X, GATE, X[0, 0]),
    ),
  }
  return calls[name]


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("name", ["none", "key", "channel, key", "channel, low rank", "bonus"])
def test_recurrences(name, backend):
  fn, args = recurrence(name, backend)
  found, bad = unlike(fn, *args)
  assert found and not bad, bad


@pytest.mark.parametrize("name", ["none", "key", "bonus"])
def test_recurrences_beside_the_gpu_kernels(name):
  """What XLA computes there. The kernels' own products are of bfloat16, two parts a number."""
  fn, args = recurrence(name, "interpret_gpu")
  assert not unlike(fn, *args)[1]


INDICES = np.zeros((B, H, T, 1), np.int32)
PLACES = np.zeros((B, T), np.int32), np.full((B, T), 8, np.int32)
ATTENTION = {
  "softmax_attention": (lambda q, k, v: softmax_attention(q, k, v, backend="xla"), (X, X, X)),
  "block_sparse": (
    lambda q, k, v: block_sparse_attention(q, k, v, INDICES, block_size=16, backend="xla"),
    (X, X, X),
  ),
  "block_sparse, tpu": (
    lambda q, k, v: block_sparse_attention(q, k, v, INDICES, block_size=16, backend="interpret"),
    (X, X, X),
  ),
  "pool_attention": (
    lambda q, k, v: pool_attention(q, k, v, *PLACES, scale=1.0, backend="xla"),
    (X, X[:, :8], X[:, :8]),
  ),
  "pool_attention, tpu": (
    lambda q, k, v: pool_attention(q, k, v, *PLACES, scale=1.0, backend="interpret"),
    (X, X[:, :8], X[:, :8]),
  ),
  "index_scores": (
    lambda q, w, k: index_scores(q, w, k, backend="xla"),
    (X, X[..., 0], X[:, :, 0]),
  ),
  "index_scores, tpu": (
    lambda q, w, k: index_scores(q, w, k, backend="interpret"),
    (X, X[..., 0], X[:, :, 0]),
  ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
  fn, args = ATTENTION[name]
  found, bad = unlike(fn, *args)
  assert found and not bad, bad


def test_scores_of_experts():
  layer = MoE(jax.random.key(0), K, 8, experts=4, top_k=2)
  scores = [
    eqn
    for eqn in products(jax.make_jaxpr(lambda x: layer(x)[0])(X[:, :, 0]).jaxpr)
    if eqn.outvars[0].aval.shape[-1] == 4
  ]
  assert scores and all("HIGHEST" in str(eqn.params["precision"]) for eqn in scores)
