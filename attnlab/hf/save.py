"""A run becomes a checkpoint of Hugging Face's libraries."""

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from ml_collections import ConfigDict
from rich.progress import track

from attnlab import data
from attnlab.checkpoint import paths
from attnlab.config import flatten
from attnlab.errors import UserError
from attnlab.hf import files
from attnlab.hf.family import Family, HFConfig, Settings, families, family
from attnlab.hf.layout import place
from attnlab.hf.load import with_model
from attnlab.mixers import mixer
from attnlab.model import layer_specs
from attnlab.pattern import parse_pattern
from attnlab.state import State, load_model, reading_mesh, run_config
from configs.base import base

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def save(
  workdir: str | Path,
  out: str | Path,
  *,
  model_type: str | None = None,
  dtype: str = "bfloat16",
  step: int | None = None,
) -> int:
  """Writes a run's model as a checkpoint, with its tokenizer.

  Args:
    workdir: the run's.
    step: of the run's checkpoint; None: the newest.
    out, model_type, dtype: as of ``write``.

  Returns:
    The bytes of its tensors.

  Raises:
    UserError: no such run, and what ``write`` raises.
  """
  config = run_config(workdir)
  fitting(config, model_type)  # before anything is read
  _, _, model = load_model(workdir, config, reading_mesh(), step)
  return write(config, model, out, model_type=model_type, dtype=dtype)


def write(
  config: ConfigDict,
  model: State,
  out: str | Path,
  *,
  model_type: str | None = None,
  dtype: str = "bfloat16",
) -> int:
  """Writes a model as a checkpoint, with its tokenizer.

  Args:
    config: of its run, resolved.
    model: {"params", "rest"}.
    out: the checkpoint's directory, which has no config.json yet.
    model_type: of the family; None: the one that has the model's mixers.
    dtype: of the tensors, one of DTYPES.

  Returns:
    The bytes of its tensors.

  Raises:
    UserError: a model that no family is, or a directory that holds a checkpoint already.
  """
  out = Path(out)
  if (out / "config.json").exists():
    raise UserError(f"{out} holds a checkpoint already: give another --export")
  kind, said, theirs = fitting(config, model_type)
  tokenizer = data.tokenizer(config.data)
  bos, eos = (i if i >= 0 else None for i in (tokenizer.bos_id, tokenizer.eos_id))
  theirs |= dict(bos_token_id=bos, eos_token_id=eos, pad_token_id=None)
  theirs |= dict(dtype=dtype, torch_dtype=dtype)
  tensors = _tensors(kind, said, _by_layer(config.model, model))
  made = files.write(out, theirs, tensors, DTYPES[dtype])
  for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
    path = Path(config.data.tokenizer).with_name(name)
    if config.data.tokenizer.endswith("tokenizer.json") and path.is_file():
      shutil.copy(path, out / name)
  return made


def fitting(
  config: ConfigDict, model_type: str | None = None
) -> tuple[Family, ConfigDict, Settings]:
  """The family that a model is of, the ``model`` section as its config.json says it, and that config.json.

  Raises:
    UserError: no family has its mixers, or one has no place for a setting of it.
  """
  used = {mixer(name).name for name in parse_pattern(config.model.pattern).mixers}
  kinds = [family(model_type)] if model_type else list(families().values())
  fit = [kind for kind in kinds if kind.mixers == used]
  if not fit:
    known = "; ".join(f"{k.model_type}: {', '.join(sorted(k.mixers))}" for k in kinds)
    raise UserError(
      f"config.model.pattern = {config.model.pattern!r}: no family has these mixers alone ({known})"
    )
  errors = []
  for kind in fit:
    try:
      theirs = kind.config(config.model)
    except UserError as error:
      errors.append(str(error))
      continue
    said = with_model(base(), kind.model(HFConfig(theirs))).model
    lost = _first_other(config.model, said)
    if lost is None:
      return kind, said, theirs
    errors.append(f"{kind.model_type} has no place for {lost}")
  raise UserError("; ".join(errors))


# What is of training, or said by the layers' mixers.
_NOT_SAID = ("dense", "remat", "dtype", "z_loss", "pattern", "mlp.balance", "mlp.bias_rate")
# Sizes that may be left to be derived, as families derive them.
_DERIVED = ("num_heads", "head_dim", "num_kv_heads", "num_value_heads", "value_dim")


def _first_other(model: ConfigDict, said: ConfigDict) -> str | None:
  """The first setting of a model that its config.json would not say."""
  if [s.mixer for s in layer_specs(model)] != [s.mixer for s in layer_specs(said)]:
    return f"config.model.pattern = {model.pattern!r}"
  read = dict(flatten(said))
  for key, value in _settings(model):
    if read[key] == value:
      continue
    name = key.split(".")[-1]
    derived = name in _DERIVED or (name == "latent_eps" and read[key] == model.norm_eps)
    if value is not None or not derived:
      return f"config.model.{key} = {value!r}, only for {read[key]!r}"
  return None


def _settings(model: ConfigDict) -> Iterator[tuple[str, Any]]:
  """What decides what a model computes, by key: no expert's where there are none, and of mixers the layers' own."""
  used = {mixer(spec.mixer).name for spec in layer_specs(model)}
  for key, value in flatten(model):
    section, _, name = key.partition(".")
    if key in _NOT_SAID or name.split(".")[-1].startswith("expand"):  # of sizes that are stated
      continue
    if section == "mlp" and name not in ("hidden", "experts") and not model.mlp.experts:
      continue
    if section == "mixers" and name.split(".")[0] not in used:
      continue
    yield key, value


# What gives each parameter, by its layer and its path there.
_ByLayer = dict[tuple[int | None, str], Callable[[], np.ndarray]]


def _by_layer(model: ConfigDict, state: State) -> _ByLayer:
  """Of a model of this ``model`` section, whose pattern says which layers are stacked."""
  ours: _ByLayer = {}
  for tree in (state["params"], state["rest"]):
    for path, x in zip(paths(tree), jax.tree.leaves(tree), strict=True):
      at = place(path, model)
      for row, layer in enumerate(at.layers or (None,)):
        ours[layer, at.path] = functools.partial(_fetch, x, row if at.stacked else None)
  return ours


def _tensors(kind: Family, model: ConfigDict, ours: _ByLayer) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of a model by name, made one after the other."""
  every = [(i, w) for i in (None, *range(model.num_layers)) for w in kind.weights(model, i)]
  for layer, weights in track(every, "writing", disable=len(every) < 64):
    made = weights.write([ours[layer, path]() for path in weights.ours])
    for name, x in zip(weights.theirs, made, strict=True):
      yield kind.prefix(layer) + name, x


def _fetch(x: jax.Array, row: int | None) -> np.ndarray:
  return np.asarray(jax.device_get(x if row is None else x[row]))
