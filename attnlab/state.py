"""What is trained: the state of a run, its shapes and shardings, and the model of a finished one.

A state is {"model": {"params": ..., "rest": ...}, "optimizer": ...}: parameters, arrays that are not
trained, and what optax keeps. It is made, checkpointed and updated as this one tree.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree
from ml_collections import ConfigDict

from attnlab import sharding
from attnlab.checkpoint import Checkpoints, paths, stored_run
from attnlab.config import from_json, resolve
from attnlab.errors import UserError
from attnlab.model import Model

State = dict[str, Any]


def make_init(
  config: ConfigDict, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[nnx.GraphDef, Callable[..., State], State]:
  """The model's structure, what makes its first state, and that state's shapes and shardings.

  The state is born sharded: no device ever holds all of it. What makes it may be given another seed than the config's.

  Raises:
    UserError: settings of the model that do not go together, or heads that the mesh cannot split.
  """

  def make(seed: jax.Array) -> Model:
    return Model(config.model, jax.random.key(seed))

  def init(seed: jax.Array) -> State:
    params, rest = nnx.state(make(seed), nnx.Param, ...)
    return {"model": {"params": params, "rest": rest}, "optimizer": tx.init(params)}

  try:
    model = jax.eval_shape(make, np.uint32(0))
    graphdef, params, *_ = nnx.split(model, nnx.Param, ...)
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f"config.model: {error}") from error
  _check_heads(model, mesh)
  _check_splits(params, mesh)
  shapes = jax.eval_shape(init, np.uint32(0))
  places = sharding.shardings(shapes, mesh)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places
  )
  # One program for all seeds. It runs once: on a CPU, where making good code of it took seconds, any code will do.
  any_code = {"xla_backend_optimization_level": 0}
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  compiled = jax.jit(init, out_shardings=places, compiler_options=any_code if on_cpu else None)
  return graphdef, lambda seed=config.seed: compiled(np.uint32(seed)), abstract


def run_config(workdir: str | Path) -> ConfigDict:
  """The resolved config of the run in a directory; UserError if it has no checkpoint."""
  stored = stored_run(Path(workdir))
  if stored is None:
    raise UserError(f"{workdir} holds no run: no config.json with a checkpoint beside it")
  return resolve(from_json(stored))


def load_model(
  workdir: str | Path, config: ConfigDict, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[int, nnx.GraphDef, PyTree]:
  """The model of a run.

  Args:
    workdir: the run's.
    config: of `run_config`.
    mesh: where to put the model; it need not be the one that it was trained on.
    step: None: its newest whole checkpoint.

  Returns:
    (step, graphdef, {"params", "rest"}).

  Raises:
    UserError: no checkpoint that is whole, or not of that step.
  """
  with jax.set_mesh(mesh):
    graphdef, _, abstract = make_init(config, optax.identity(), mesh)
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    restored = checkpoints.restore({"model": abstract["model"]}, step=step)
  if restored is None:
    raise UserError(f"{workdir} has no checkpoint yet")
  return restored[0], graphdef, restored[1]["model"]


def reading_mesh(rows: int | None = None, length: int = 0) -> jax.sharding.Mesh:
  """A mesh for a model that is only read: the devices there are, along `data`, and those left over along `context`.

  Args:
    rows: of the batches to come: no more devices than divide them. None: all devices.
    length: of the rows to come, which devices that are left share in parts of multiples of 16 tokens; 0: none does.
  """
  devices = jax.devices()
  data = len(devices) if rows is None else math.gcd(rows, len(devices))
  context = 1 if length == 0 or length % 16 else math.gcd(length // 16, len(devices) // data)
  return sharding.make_mesh({"data": data, "context": context}, devices[: data * context])


def parameter_count(model: PyTree) -> int:
  return sum(x.size for x in jax.tree.leaves(model["params"]))


def _check_heads(model: Model, mesh: jax.sharding.Mesh) -> None:
  """Heads must divide over their mesh axis. Nothing would fail if they did not: each device would compute all."""
  names = sharding.TABLE["heads"][1]
  over = math.prod(mesh.shape[name] for name in names)
  for mixer, _ in model.mixers():
    for setting, count in mixer.split_heads().items():
      if count % over:
        raise UserError(
          f"{' x '.join(f'config.mesh.{n}' for n in names)} = {over} does not divide {setting} ="
          f" {count} of mixer {mixer.name!r}:"
          f" change config.model.mixers.{mixer.name}.{setting}, or the layer's own in model.pattern"
        )


def _check_splits(params: nnx.State, mesh: jax.sharding.Mesh) -> None:
  """Columns of heads and MLPs, and experts, must divide over their mesh axes; the rest may stay whole."""
  variables = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
  for path, variable in zip(paths(params), variables, strict=True):
    axes = variable.get_metadata("axes")
    shape = variable.get_value().shape
    for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
      if axis in ("heads", "mlp", "experts"):
        over = math.prod(mesh.shape[name] for name in sharding.TABLE[axis][1])
        if size % over:
          names = " x ".join(f"config.mesh.{name}" for name in sharding.TABLE[axis][1])
          raise UserError(f"{names} = {over} does not divide {axis} = {size} of {path} {shape}")
