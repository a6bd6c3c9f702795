"""Programs for the GPU compilers, which run in processes of their own: see test_gpu_compile.py."""

import os

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.block_sparse.shapes import SHAPES


def doubled():
  """A kernel of one block: in and out by way of shared memory."""

  def body(x, y, buffer, barrier):
    plgpu.copy_gmem_to_smem(x, buffer, barrier)
    plgpu.barrier_wait(barrier)
    buffer[...] = 2 * buffer[...]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, y)
    plgpu.wait_smem_to_gmem(0)

  x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
  scratch = dict(buffer=plgpu.SMEM(x.shape, x.dtype), barrier=plgpu.Barrier())
  return plgpu.kernel(body, out_type=x, scratch_types=scratch, kernel_name="doubled"), (x,)


def too_large():
  """More shared memory than a block may have."""
  x = jax.ShapeDtypeStruct((64, 1024), jnp.float32)

  def body(x, y, buffer):
    buffer[...] = jnp.zeros_like(buffer)

  return plgpu.kernel(body, out_type=x, scratch_types=dict(buffer=plgpu.SMEM(x.shape, x.dtype))), (
    x,
  )


def packed(name: str):
  """A block-sparse attention of documents, with every gradient."""
  s, T = SHAPES[name], 4096
  heads = (s.heads, s.key_dim), (s.kv_heads, s.key_dim), (s.kv_heads, s.value_dim)
  q, k, v = (jax.ShapeDtypeStruct((1, T, *x), jnp.bfloat16) for x in heads)
  indices = jax.ShapeDtypeStruct((1, s.groups, T, s.top_k), jnp.int32)
  ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

  def loss(q, k, v, indices, ids):
    options = dict(block_size=s.block_size, segment_ids=ids, backend="gpu")
    o, lse = block_sparse_attention(q, k, v, indices, **options)
    return jnp.sum(o.astype(jnp.float32)) + jnp.sum(lse)

  return jax.grad(loss, (0, 1, 2)), (q, k, v, indices, ids)


def fatal():
  """As a compiler does whose own check fails."""
  os.abort()
