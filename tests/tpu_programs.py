"""A program for the TPU compiler, which runs in processes of its own: see test_tpu_compile.py."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.linear_recurrence.shapes import SHAPES, inputs


def sharded(topology: str) -> dict:
  """Compiles Kimi Linear's recurrence with gradients for a whole slice, rows over "data" and heads over "model"."""
  from jax.experimental import topologies
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

  from attnlab import sharding

  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  mesh = Mesh(
    np.array(devices).reshape(1, -1, 8), sharding.AXES, axis_types=(AxisType.Explicit,) * 3
  )
  rows = len(devices) // 8
  r = jax.eval_shape(
    lambda: inputs(SHAPES["kimi_linear"], batch=rows, length=4096, dtype=jnp.bfloat16)
  )
  axes = ("batch", None, "heads", None)
  in_axes = jax.tree.map(lambda x: axes[: x.ndim], r)

  def loss(r):
    run = sharding.local(lambda r: linear_recurrence(r, backend="tpu")[0], (in_axes,), axes)
    return jnp.sum(run(r).astype(jnp.float32) ** 2)

  def placed(x):
    spec = PartitionSpec("data", None, "model", *(None,) * (x.ndim - 3))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  with use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(jax.grad(loss)).lower(jax.tree.map(placed, r)).compile()
  text = compiled.as_text()
  collectives = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")
  return {
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "collectives": [c for c in collectives if f" {c}(" in text or f" {c}-start(" in text],
    "temp": compiled.memory_analysis().temp_size_in_bytes,
    "argument": sum(
      math.prod(x.shape) * x.dtype.itemsize
      for x in jax.tree.leaves(dataclasses.asdict(r))
      if hasattr(x, "shape")
    )
    // len(devices),
  }


if __name__ == "__main__":
  print(json.dumps(sharded(sys.argv[1])))
