"""Programs of block-sparse attention for compilers that run in processes of their own."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.block_sparse.shapes import SHAPES, Shape
from pallas_kernels.pool_attention import pool_attention, pool_weights


def gradients(argument: str):
  """ "shape:T:packed" of a real shape, of every gradient, on a TPU."""
  name, T, packed = argument.split(":")
  return _gradients(SHAPES[name], int(T), packed == "packed", name == "dsa")


def of_group(argument: str):
  """ "heads:block_size:top_k" of two groups that no model has, packed."""
  heads, size, top_k = map(int, argument.split(":"))
  return _gradients(Shape(2 * heads, 2, 2, 128, 128, size, top_k), 2048, True)


def of_pools(argument: str):
  """ "heads:groups:D:V:dtype": every gradient of attention to pools, and their weights, on a TPU."""
  heads, groups, D, V = map(int, argument.split(":")[:4])
  dtype = jnp.dtype(argument.split(":")[4])
  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((1, *shape), dtype)  # noqa: E731
  options = dict(scale=D**-0.5, backend="tpu")

  def run(q, k, v, first, complete, do):
    o, vjp = jax.vjp(lambda *a: pool_attention(*a, first, complete, **options)[0], q, k, v)
    return o, vjp(do), pool_weights(q, k, first, complete, **options)

  T, N = 512, 1024
  places = (array(T, dtype=jnp.int32),) * 2
  return run, (array(T, heads, D), array(N, groups, D), array(N, groups, V), *places, array(T, heads, V))  # fmt: skip


def _gradients(s: Shape, T: int, packed: bool, latent: bool = False):
  def array(heads, channels):
    return jax.ShapeDtypeStruct((1, T, heads, channels), jnp.bfloat16)

  def run(q, k, v, indices, ids, do):
    def forward(q, k, v):
      options = dict(block_size=s.block_size, segment_ids=ids, backend="tpu")
      values = s.value_dim if latent else v  # of latents, which are keys and values
      return block_sparse_attention(q, k, values, indices, **options)[0]

    o, vjp = jax.vjp(forward, q, k, v)
    return o, vjp(do)

  q, k = array(s.heads, s.key_dim), array(s.kv_heads, s.key_dim)
  v, do = array(s.kv_heads, s.value_dim), array(s.heads, s.value_dim)
  indices = jax.ShapeDtypeStruct((1, s.groups, T, s.top_k), jnp.int32)
  ids = jax.ShapeDtypeStruct((1, T), jnp.int32) if packed else None
  return run, (q, k, v, indices, ids, do)
