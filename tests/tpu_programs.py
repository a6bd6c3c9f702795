"""Programs for the TPU compiler on a whole slice, which runs in processes of its own: see test_tpu_compile.py."""

import json
import math
import sys

import jax
import jax.numpy as jnp

from attnlab.nn import rope_heads
from pallas_kernels.linear_recurrence import linear_recurrence, linear_recurrence_step
from pallas_kernels.linear_recurrence.shapes import SHAPES, inputs
from pallas_kernels.short_conv import short_conv

# Chips over which heads and channels are split; rows are over the others. In ``parts`` chips share a row, too.
MODEL, CONTEXT = 8, 4


def recurrence(local, rows, **options):
  """Kimi Linear's gradients, of arrays as projections write them, [B, T, heads * dim]."""
  whole = jax.eval_shape(
    lambda: inputs(SHAPES["kimi_linear"], batch=rows, length=4096, dtype=jnp.bfloat16)
  )
  flat = jax.eval_shape(lambda r: jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1), r), whole)
  axes = ("batch", None, "heads")

  def core(flat):
    own = jax.tree.map(lambda x, of: x.reshape(*x.shape[:2], -1, *of.shape[3:]), flat, whole)
    return linear_recurrence(own, backend="tpu", **options)[0].reshape(flat.v.shape)

  def program(flat, do):
    _, vjp = jax.vjp(local(core, (jax.tree.map(lambda _: axes, flat),), axes), flat)
    return vjp(do)

  return program, (flat, flat.v), axes


def parts(local, rows):
  """The same, where each chip has a part of the tokens of a row."""
  return recurrence(local, rows, axis_name="context")


def step(local, rows):
  """A token of Qwen3-Next, its state in place."""
  rows *= 8
  r = jax.eval_shape(lambda: inputs(SHAPES["qwen3_next"], batch=rows, length=1, dtype=jnp.bfloat16))
  state = jax.ShapeDtypeStruct((rows, r.v.shape[2], r.k.shape[3], r.v.shape[3]), jnp.float32)
  axes, of_state = ("batch", None, "heads", None), ("batch", "heads", None, None)
  in_axes = jax.tree.map(lambda x: axes[: x.ndim], r), of_state
  program = local(
    lambda r, S: linear_recurrence_step(r, S, backend="tpu"), in_axes, (axes, of_state)
  )
  return program, (r, state), (axes, of_state)


def conv(local, rows):
  """Qwen3-Next's short convolution over packed rows, with every gradient."""
  T, D = 4096, 8192
  x = jax.ShapeDtypeStruct((rows, T, D), jnp.bfloat16)
  weight = jax.ShapeDtypeStruct((4, D), jnp.float32)
  ids = jax.ShapeDtypeStruct((rows, T), jnp.int32)
  of_x, of_weight, of_ids = ("batch", None, "heads"), (None, "heads"), ("batch", None)
  core = local(
    lambda x, weight, ids: short_conv(x, weight, segment_ids=ids, backend="tpu")[0],
    (of_x, of_weight, of_ids),
    of_x,
  )

  def program(x, weight, ids, dy):
    _, vjp = jax.vjp(lambda *a: core(*a, ids), x, weight)
    return vjp(dy)

  return program, (x, weight, ids, x), (of_x, of_weight, of_ids, of_x)


def rope(local, rows):
  """The gradient of 32 heads' rotation, as mixers ask for it."""
  del local
  x = jax.ShapeDtypeStruct((rows, 4096, 32 * 128), jnp.bfloat16)
  positions = jax.ShapeDtypeStruct((rows, 4096), jnp.int32)

  def program(dy, positions):
    return jax.vjp(lambda x: rope_heads(x, positions, 128), dy)[1](dy)

  return program, (x, positions), (("batch", None, "heads"), ("batch", None))


def compiled(topology: str, make) -> dict:
  """A program for all chips of a slice, rows over "data" and heads or channels over "model": what it holds."""
  from jax.experimental import topologies
  from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

  from attnlab import sharding

  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  context = CONTEXT if make is parts else 1
  mesh = sharding.make_mesh({"data": -1, "context": context, "model": MODEL}, devices)
  names = {"batch": ("data", "context") if context > 1 else "data", "heads": "model", None: None}

  def placed(axes, tree):
    def one(x):
      spec = PartitionSpec(*(names[a] for a in axes[: x.ndim]))
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)

  with use_abstract_mesh(mesh.abstract_mesh):
    program, args, axes = make(sharding.local, len(devices) // MODEL)
    axes = axes if isinstance(axes[0], tuple) else (axes,) * len(args)
    args = [placed(a, x) for a, x in zip(axes, args, strict=True)]
    donate = (1,) if make is step else ()
    executable = jax.jit(program, donate_argnums=donate).lower(*args).compile()
  text, memory = executable.as_text(), executable.memory_analysis()
  collectives = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")
  return {
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "collectives": [c for c in collectives if f" {c}(" in text or f" {c}-start(" in text],
    "temp": memory.temp_size_in_bytes,
    "argument": memory.argument_size_in_bytes,
    "alias": memory.alias_size_in_bytes,
    "largest": max(
      math.prod(x.shape) * x.dtype.itemsize // len(devices) for x in jax.tree.leaves(args)
    ),
  }


if __name__ == "__main__":
  for name in sys.argv[2:]:
    print(json.dumps(compiled(sys.argv[1], globals()[name])), flush=True)
