"""A checkpoint of Hugging Face's libraries becomes a run."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict
from rich.progress import track

from attnlab.checkpoint import paths
from attnlab.config import complete
from attnlab.convert import begin
from attnlab.errors import UserError
from attnlab.hf import files
from attnlab.hf.family import Family, HFConfig, Settings, family
from attnlab.hf.layout import place
from attnlab.hf.weights import Weights
from attnlab.state import State
from attnlab.tokenizer import ByteTokenizer


def configured(directory: Path, config: ConfigDict) -> tuple[Family, ConfigDict]:
  """The family of a checkpoint, and a config with the model that it is.

  Sizes, pattern and mixers are the checkpoint's, and so is the tokenizer where there is one and the config has bytes;
  everything else is the config's.

  Raises:
    UserError: no config.json, a family that is not known, or a setting of it that is not; or no tokenizer.
  """
  hf = HFConfig(files.read_config(directory), str(directory / "config.json"))
  kind = family(hf("model_type"))
  config = with_model(config, kind.model(hf))
  tokenizer = directory / "tokenizer.json"
  if config.data.name != "task" and config.data.tokenizer == "bytes":
    if tokenizer.is_file():
      config.data.tokenizer = str(tokenizer)
    elif config.model.vocab_size > ByteTokenizer.vocab_size:
      raise UserError(
        f"{directory} has no tokenizer.json, and its {config.model.vocab_size} ids are not bytes:"
        " give it by --config=FILE --config.data.tokenizer=PATH"
      )
  return kind, config


def with_model(config: ConfigDict, section: Settings) -> ConfigDict:
  """A config with what ``Family.model`` says of its model; complete."""
  config = complete(config)
  with config.unlocked():
    config.model.update({k: v for k, v in section.items() if k != "mixers"})
    config.model.mixers = ConfigDict(section["mixers"])
  return complete(config)


def load(source: str | Path, config: ConfigDict, workdir: str | Path) -> ConfigDict:
  """Writes checkpoint 0 of a run whose parameters are a checkpoint's.

  A process reads a layer of a few parameters at a time, and has of these what its devices hold: it never has a model.

  Args:
    source: the checkpoint's directory, or the name of a model on the Hub.
    config: of the run; ``configured`` says what of it is used.
    workdir: the run's directory, which holds no run yet.

  Returns:
    The run's config.

  Raises:
    UserError: a checkpoint, or a part of it, that is missing, broken or not known.
  """
  directory = files.locate(str(source))
  kind, config = configured(directory, config)

  def parameters(model: State, mesh: jax.sharding.Mesh) -> State:
    del mesh
    # Their memory is for those that come.
    shapes = _shapes(model.pop("params"))
    return read(directory, kind, config.model, model | {"params": shapes})

  begin(config, workdir, parameters)
  return config


def read(directory: Path, kind: Family, model: ConfigDict, like: State) -> State:
  """The parameters of a checkpoint.

  Args:
    directory, kind: the checkpoint's, and its family.
    model: the ``model`` section that ``configured`` gives.
    like: {"params", "rest"}, of arrays or of their shapes and shardings; of "rest" what the checkpoint has not stays.

  Raises:
    UserError: a tensor that is missing, too many, or of another shape.
  """
  reader = _Reader(kind, model, files.Tensors(directory), directory)
  reader.check(paths(like["params"]))
  return {name: reader.tree(tree) for name, tree in like.items()}


class _Reader:
  """The parameters of a model in a checkpoint's tensors."""

  def __init__(self, kind: Family, model: ConfigDict, tensors: files.Tensors, directory: Path):
    self._kind, self._model = kind, model
    self._tensors, self._directory = tensors, directory
    self._named = {kind.canonical(name): name for name in tensors.names}
    layers: list[int | None] = [None, *range(model.num_layers)]
    self._weights = {
      i: {path: w for w in kind.weights(model, i) for path in w.ours} for i in layers
    }

  def check(self, ours: Iterable[str]) -> None:
    """Raises UserError unless every parameter has its tensors and every tensor its parameter."""
    wanted = {
      name for i, w in self._weights.items() for one in w.values() for name in self._names(i, one)
    }
    left_out = functools.partial(self._kind.left_out, self._model)
    extra = [name for name in self._named if name not in wanted and not left_out(name)]
    for what, names in (
      ("has no tensor", sorted(wanted - self._named.keys())),
      ("has a tensor that is not known here,", sorted(extra)),
    ):
      if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise UserError(f"{self._directory} {what} {names[0]}{more}")
    for path in ours:
      at = place(path, self._model)
      for i in at.layers or (None,):
        if at.path not in self._weights[i]:
          raise UserError(f"{self._directory}: nothing there is our {path}")

  def tree(self, tree: PyTree) -> PyTree:
    """A tree of arrays, or of their shapes and shardings, with what the checkpoint has of them."""
    out = dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))
    # Parameters that are made of the same tensors are made together.
    groups: dict[tuple[tuple[int, ...], tuple[str, ...]], list[str]] = {}
    for path, x in out.items():
      at = place(path, self._model)
      weights = self._weights[at.layers[0] if at.layers else None].get(at.path)
      if weights:
        groups.setdefault((at.layers, weights.ours), []).append(path)
      else:
        assert isinstance(x, jax.Array), path  # a constant that the family has no tensor for
    for (layers, _), names in track(groups.items(), "reading", disable=len(groups) < 8):
      out |= self._arrays(layers or (None,), {name: out[name] for name in names})
    return jax.tree.unflatten(jax.tree.structure(tree), out.values())

  def _arrays(
    self, layers: Sequence[int | None], like: Mapping[str, jax.Array | jax.ShapeDtypeStruct]
  ) -> dict[str, jax.Array]:
    """Parameters of the same tensors of some layers: each is read once, and every device given its part."""
    places = {path: place(path, self._model) for path in like}
    parts: dict[str, dict[tuple[slice, ...] | None, np.ndarray]] = {
      path: {
        index: np.empty(x.sharding.shard_shape(x.shape), x.dtype)
        for index in x.sharding.addressable_devices_indices_map(x.shape).values()
      }
      for path, x in like.items()
    }
    for row, layer in enumerate(layers):
      made = self._read(layer, next(iter(places.values())).path)
      for path, x in like.items():
        at = places[path]
        value, shape = made[at.path], x.shape[1:] if at.stacked else x.shape
        if value.shape != shape:
          names = ", ".join(self._names(layer, self._weights[layer][at.path])[:3])
          raise UserError(
            f"{self._directory}: {names} makes {path} {value.shape}, config.json {shape}"
          )
        for index, part in parts[path].items():
          assert index is not None
          if not at.stacked:
            part[...] = value[index]
          elif row in (rows := range(len(layers))[index[0]]):
            part[rows.index(row)] = value[index[1:]]
    return {
      path: jax.make_array_from_callback(
        x.shape, x.sharding, parts[path].__getitem__, dtype=x.dtype
      )
      for path, x in like.items()
    }

  def _names(self, layer: int | None, weights: Weights) -> list[str]:
    return [self._kind.prefix(layer) + name for name in weights.theirs]

  def _read(self, layer: int | None, path: str) -> dict[str, np.ndarray]:
    """A layer's parameter, and those that are made of the same tensors, by their paths within the layer."""
    weights = self._weights[layer][path]
    tensors = [self._tensors[self._named[name]] for name in self._names(layer, weights)]
    return dict(zip(weights.ours, weights.read(tensors), strict=True))


def _shapes(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
