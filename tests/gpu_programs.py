"""Programs for the GPU compilers, which run in processes of their own: see test_gpu_compile.py."""

import json
import os

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.block_sparse.shapes import SHAPES
from pallas_kernels.cost import gpu


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


def sharded() -> dict:
  """Compiles block-sparse attention with gradients for two devices, a row of a batch each."""
  from jax.experimental import topologies
  from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

  from attnlab import sharding

  options = dict(platform="cuda", topology="1x2x1", target_config=gpu.H200)
  mesh = sharding.make_mesh({"data": 2}, topologies.get_topology_desc(**options).devices)

  def array(*shape, dtype=jnp.bfloat16):
    spec = PartitionSpec("data", *(None,) * (len(shape) - 1))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  def attend(*args):
    return block_sparse_attention(*args, block_size=64)[0]

  def loss(*args):
    axes = ("batch", None, None, None)
    o = sharding.local(attend, (axes,) * 4, axes)(*args)
    return jnp.sum(o.astype(jnp.float32) ** 2)

  args = array(2, 1024, 16, 64), array(2, 1024, 1, 64), array(2, 1024, 1, 64)
  args += (array(2, 1, 1024, 4, dtype=jnp.int32),)
  with use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*args)
    # What the mesh says, "gpu", jax looks up among the platforms of this machine.
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
  phases = ("forward", "queries", "keys", "sums")
  names = [f"block_sparse_{phase}" for phase in phases]
  collectives = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")
  return {
    "kernels": [name for name in names if name in text],
    "collectives": [c for c in collectives if f" {c}(" in text or f" {c}-start(" in text],
  }


def split() -> list[bool]:
  """Whether XLA keeps the rounding of numbers that are split in parts: of the kernels' own way, and of XLA's."""
  from jax.sharding import SingleDeviceSharding

  from pallas_kernels.linear_recurrence.gpu_scan import parts, parts_in_xla

  x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=SingleDeviceSharding(gpu.device()))

  def rounded(split) -> bool:
    text = jax.jit(lambda x: split(x, 2)).lower(x).compile().as_text()
    return "reduce-precision" in text or "f32[64,64]{1,0} convert(" in text

  return [rounded(parts), rounded(parts_in_xla)]


def fatal():
  """As a compiler does whose own check fails."""
  os.abort()


if __name__ == "__main__":
  print(json.dumps(sharded() | {"split": split()}))
