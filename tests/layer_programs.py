"""A mixer of a 1.3b model, forward and backward, through the TPU compiler, for a chip that is not here.

Tells, a line a mixer, what XLA copies from one layout to another, its estimate of cycles for what is no kernel, and
temporary memory in bytes. Used by test_tpu_compile.py.

python -m tests.layer_programs v6e kda retnet
"""

import json
import math
import os
import re
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import sharding
from attnlab.config import load
from attnlab.memory import devices
from attnlab.mixers import mixer
from attnlab.mixers.base import Context, Layer
from attnlab.model import layer_specs, mixer_config
from attnlab.nn import RMSNorm
from pallas_kernels.cost import environment

# Tokens so many that every array of a number a token and channel is larger than any of parameters.
B, T = 4, 4096

_COPY = re.compile(r" = (f32|bf16)\[([\d,]+)\](?:\{\S*)? copy\(")


class Residual(nnx.Module):
  """``x + mixer(norm(x))``, as in a block."""

  def __init__(self, name: str, key: jax.Array):
    config = load(f"configs/{mixer(name).name}.py:size=1.3b").model
    spec = next(s for s in layer_specs(config) if mixer(s.mixer) is mixer(name))
    layer = Layer(config.d_model)
    self.norm = RMSNorm(layer.d_model)
    self.mixer = mixer(name)(mixer_config(config, spec), layer, key)

  def __call__(self, x, ctx):
    return x + self.mixer(self.norm(x), ctx).y


def compiled(chip: str, name: str):
  """Outputs and gradients of packed rows in bfloat16, compiled."""
  mesh = sharding.make_mesh({}, devices(chip)[:1])

  def array(shape, dtype, spec=None):
    spec = spec or jax.sharding.PartitionSpec(*[None] * len(shape))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    make = lambda: Residual(name, jax.random.key(0))  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(make))
    state = jax.tree.map(lambda v: array(v.shape, v.dtype), state)
    rows = sharding.batch_sharding(mesh).spec
    width = state["norm"]["scale"].shape[0]
    x = array((B, T, width), jnp.bfloat16, rows)
    ids = array((B, T), jnp.int32, rows)

    def program(state, x, dy, positions, ids):
      run = lambda state, x: nnx.merge(graphdef, state)(x, Context(positions, ids))  # noqa: E731
      y, vjp = jax.vjp(run, state, x)
      return y, vjp(dy)

    return jax.jit(program).lower(state, x, x, ids, ids).compile()


def copies(text: str) -> list[str]:
  """The arrays with a number for each of 1024 channels of a token, and more, that XLA copies to another layout."""
  found = (_COPY.search(line) for line in text.splitlines())
  return [
    f"{m[1]}[{m[2]}]" for m in found if m and math.prod(map(int, m[2].split(","))) >= B * T * 1024
  ]


def cycles(text: str) -> int:
  """XLA's own estimate for its operations; kernels, and loops, are not in it."""
  _, entry = text.split("\nENTRY ")  # the last computation
  return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry)))


if __name__ == "__main__":
  # The tests set what libtpu needs; who starts this by hand does not.
  if "TPU_SKIP_MDS_QUERY" not in os.environ:
    command = [sys.executable, "-m", "tests.layer_programs", *sys.argv[1:]]
    os.execve(sys.executable, command, environment())
  for name in sys.argv[2:]:
    start = time.monotonic()
    executable = compiled(sys.argv[1], name)
    text, temp = executable.as_text(), executable.memory_analysis().temp_size_in_bytes
    out = dict(name=name, copies=copies(text), cycles=cycles(text), temp=temp)
    print(json.dumps(out | {"seconds": round(time.monotonic() - start)}), flush=True)
