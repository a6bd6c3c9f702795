"""Programs of block-sparse attention for compilers that run in processes of their own."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.block_sparse.shapes import SHAPES


def gradients(argument: str):
  """ "shape:T:packed" of a real shape, of every gradient, on a TPU."""
  name, T, packed = argument.split(":")
  s, T = SHAPES[name], int(T)

  def array(heads, channels):
    return jax.ShapeDtypeStruct((1, T, heads, channels), jnp.bfloat16)

  def run(q, k, v, indices, ids, do):
    def forward(q, k, v):
      options = dict(block_size=s.block_size, segment_ids=ids, backend="tpu")
      values = s.value_dim if name == "dsa" else v  # of latents, which are keys and values
      return block_sparse_attention(q, k, values, indices, **options)[0]

    o, vjp = jax.vjp(forward, q, k, v)
    return o, vjp(do)

  q, k = array(s.heads, s.key_dim), array(s.kv_heads, s.key_dim)
  v, do = array(s.kv_heads, s.value_dim), array(s.heads, s.value_dim)
  indices = jax.ShapeDtypeStruct((1, s.groups, T, s.top_k), jnp.int32)
  ids = jax.ShapeDtypeStruct((1, T), jnp.int32) if packed == "packed" else None
  return run, (q, k, v, indices, ids, do)
