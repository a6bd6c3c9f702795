"""Configs: reading them, completing them, checking them.

A config is a `ConfigDict` made by a Python file's `get_config(arg)`. `configs/base.py` is the
schema: every key, its type and its default. Config files are code, so run only those you trust.
"""

import dataclasses
import functools
import importlib.util
import json
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict, config_dict

from attnlab import model, optim, sharding
from attnlab.errors import UserError, unknown
from attnlab.settings import POSITIVE, Range, check_ranges, checked

_RANGES = {
  **dict.fromkeys(("steps", "batch_size", "grad_accum", "keep_checkpoints"), Range(least=1)),
  **dict.fromkeys(("log_every", "eval_every", "checkpoint_every", "sample_every"), Range(least=0)),
  **dict.fromkeys(("eval_batches", "sample_tokens", "sample_temperature"), Range(least=0)),
  "stop_accuracy": Range(least=0, most=1),
}


def load(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """The complete config of a file, with overrides.

  Args:
    spec: a config file's path, with an argument for its `get_config` after a colon if it takes one:
      "configs/kda.py", "configs/kda.py:size=small"; or the config.json of a run.
    overrides: values by dotted key, {"train.steps": 500}.

  Raises:
    UserError: no such file, an argument or a key that it does not know, a value of another type.
  """
  config = complete(_read(spec))
  for key, value in (overrides or {}).items():
    known_key(config, key)
    try:
      config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as error:
      raise UserError(f"config.{key} = {value!r}: {error}") from error
  return config


def complete(config: ConfigDict) -> ConfigDict:
  """A copy with every mixer's own defaults filled in, so that each can be overridden by name.

  Raises:
    UserError: a key that the schema, or a mixer, does not have, or a value of another type.
  """
  from attnlab.mixers import mixer, mixers

  _against(_schema(), config)
  config = config.copy_and_resolve_references()
  given = {mixer(name).name: settings for name, settings in config.model.mixers.items()}
  with config.unlocked():
    config.model.mixers = ConfigDict(
      {
        name: _defaults(cls.Config, given.get(name, {}), f"model.mixers.{name}")
        for name, cls in mixers().items()
      }
    )
  return config.lock()


def resolve(config: ConfigDict) -> ConfigDict:
  """The config that a run stores and is built from: every value stated, nothing that is not used.

  The vocabulary's size is filled in from the data, and only the pattern's mixers stay.

  Raises:
    UserError: what `complete` raises; a vocabulary too small for the data.
  """
  from attnlab import data
  from attnlab.mixers import mixer
  from attnlab.pattern import parse_pattern

  config = complete(config)
  tokenizer = data.tokenizer(config.data)
  with config.unlocked():
    if config.model.vocab_size == 0:
      config.model.vocab_size = tokenizer.vocab_size
    used = {mixer(name).name for name in parse_pattern(config.model.pattern).mixers}
    config.model.mixers = ConfigDict({k: v for k, v in config.model.mixers.items() if k in used})
  if config.model.vocab_size < tokenizer.ids:
    raise UserError(
      f"config.model.vocab_size = {config.model.vocab_size} is below the data's {tokenizer.ids} ids"
      " (0 takes the data's own size)"
    )
  return config


def check(config: ConfigDict, *, devices: int = 1) -> None:
  """Raises UserError for the first thing in a resolved config that cannot work. Takes no time.

  Args:
    config: a resolved config.
    devices: how many there are, over all processes.
  """
  _against(_schema(), config)
  train = config.train
  check_ranges("train", train, _RANGES)
  check_ranges("data", config.data, {"seq_len": Range(least=1)})
  if not all(isinstance(p, str) for p in train.sample_prompts):
    raise UserError(f"config.train.sample_prompts = {train.sample_prompts} must be strings")
  optim.check(config.optim)
  model.check(config.model)

  mesh = sharding.mesh_sizes(config.mesh, devices)
  rows, step = train.batch_size, train.grad_accum * mesh["replica"] * mesh["data"]
  if rows % step:
    raise UserError(
      f"config.train.batch_size = {rows} does not divide by {step} = train.grad_accum"
      f" {train.grad_accum} x mesh.replica {mesh['replica']} x mesh.data {mesh['data']}"
    )
  if config.data.seq_len % mesh["context"]:
    raise UserError(
      f"config.data.seq_len = {config.data.seq_len} does not divide by config.mesh.context = {mesh['context']}"
    )


def known_key(config: ConfigDict, key: str) -> None:
  """Raises UserError, naming the nearest keys, unless the config has this dotted key."""
  section, prefix = config, ""
  for part in key.split("."):
    if not isinstance(section, ConfigDict):
      raise UserError(f"unknown config key {key!r}: config.{prefix[:-1]} has no keys of its own")
    if part not in section:
      # A key that stands in another section is more likely meant than a misspelt one in this.
      elsewhere = [k for k, _ in flatten(config) if k.split(".")[-1] == key.split(".")[-1]]
      if elsewhere:
        raise unknown("config key", key, elsewhere)
      raise unknown(_keys_of(prefix), part, section)
    section, prefix = section[part], f"{prefix}{part}."


def parse_arg(arg: str, **defaults: Any) -> SimpleNamespace:
  """The argument of `get_config`: comma-separated `key=value`, bare flags and bare choices.

    parse_arg("small,softmax", size=("tiny", "small"), softmax=False, window=0)
      -> size="small", softmax=True, window=0

  Args:
    arg: what stands after the colon in --config=FILE:ARG.
    **defaults: the known keys. A tuple is a choice whose first is the default; a bool is a flag;
      any other value is a default whose type the argument must have.

  Raises:
    UserError: an unknown key, or a value that is not one of its choices or not of its type.
  """
  choices = {key: value for key, value in defaults.items() if isinstance(value, tuple)}
  values = {key: value[0] if key in choices else value for key, value in defaults.items()}
  bare = {c: key for key, options in choices.items() for c in options}
  flags_ = {key: key for key, value in defaults.items() if isinstance(value, bool)}
  for item in filter(None, arg.split(",")):
    key, equals, text = item.partition("=")
    if not equals and key in flags_:
      values[key] = True
    elif not equals and key in bare:
      values[bare[key]] = key
    elif not equals or key not in defaults:
      known = [f"{key}=..." for key in defaults if key not in flags_]
      raise unknown("config argument", item, [*flags_, *bare, *known])
    elif key in choices:
      if text not in choices[key]:
        raise unknown(f"{key} in the config's argument", text, choices[key])
      values[key] = text
    else:
      values[key] = _parse_value(key, text, type(defaults[key]))
  return SimpleNamespace(**values)


def to_json(config: ConfigDict) -> dict[str, Any]:
  """A config as plain JSON values."""
  return json.loads(config.to_json_best_effort())


def from_json(values: Mapping[str, Any]) -> ConfigDict:
  """The config that `to_json` wrote. Keys that have come since have their defaults."""
  config, given = _schema(), ConfigDict(values)
  given.train.sample_prompts = tuple(given.train.sample_prompts)
  config.update(given)
  return complete(config)


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Every (dotted key, value) of a config; an empty section is a value too."""
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict) and value:
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _read(spec: str) -> ConfigDict:
  name, _, arg = spec.partition(":")
  path = Path(name)
  if not path.is_file():
    near = sorted(str(p) for p in path.parent.glob("*.py") if p.stem not in ("base", "__init__"))
    raise unknown("config file", name, near)
  if path.suffix == ".json":
    values = read_json(path)
    if not {"model", "data", "train"} <= values.keys():
      raise UserError(f"{path} is not the config.json of a run")
    return from_json(values)
  _import_configs()
  module_spec = importlib.util.spec_from_file_location(f"attnlab_config_{path.stem}", path)
  if module_spec is None or module_spec.loader is None:
    raise UserError(f"{name} is not a Python file")
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise UserError(f"{name} has no get_config(arg)")
  config = module.get_config(arg) if arg else module.get_config()
  if not isinstance(config, ConfigDict):
    raise UserError(f"get_config of {name} returned {type(config).__name__}, not a ConfigDict")
  return config


def read_json(path: Path) -> dict[str, Any]:
  """The JSON object of a file; UserError if it cannot be read, or is none."""
  try:
    values = json.loads(path.read_text("utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is not readable as JSON: {error}") from error
  if not isinstance(values, dict):
    raise UserError(f"{path} is not a JSON object")
  return values


def _import_configs() -> None:
  """Makes `configs` importable wherever the program is run: it lies beside the attnlab package."""
  if importlib.util.find_spec("configs") is None:
    sys.path.append(str(Path(__file__).resolve().parent.parent))


def _schema() -> ConfigDict:
  _import_configs()
  from configs.base import base

  return base()


def _against(schema: ConfigDict, config: ConfigDict, prefix: str = "") -> None:
  """Raises UserError unless a config has just the schema's keys, with values of their types."""
  for key in config:
    if key not in schema:
      raise unknown(_keys_of(prefix), key, schema)
  for key, default in schema.items():
    path = prefix + key
    if key not in config:
      raise UserError(f"config key {path!r} is missing: build on configs.base.base()")
    value = config[key]
    if isinstance(default, ConfigDict):
      if not isinstance(value, ConfigDict):
        raise UserError(f"config.{path} = {value!r} must be a section, a ConfigDict")
      if default:  # An empty section's keys belong to what its names stand for, such as a mixer.
        _against(default, value, f"{path}.")
    else:
      checked(f"config.{path} = {value!r}", value, type(default))


def _keys_of(prefix: str) -> str:
  """What an unknown key is called: "config key", "config.train key"."""
  return f"config.{prefix}"[:-1] + " key"


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
  return typing.get_type_hints(kind, include_extras=True)


def _defaults(kind: type, given: Mapping[str, Any], path: str) -> ConfigDict:
  """All fields of a mixer's Config, as given or by default."""
  fields = {f.name: f for f in dataclasses.fields(kind)}
  hints = _hints(kind)
  for key in given:
    if key not in fields:
      raise unknown(_keys_of(f"{path}."), key, fields)
  out = {}
  for name, field in fields.items():
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    value = given.get(name, default)
    if value is not default:
      value = checked(f"config.{path}.{name} = {value!r}", value, hints[name], POSITIVE)
    if value is None:  # `int | None`: the command line must know of the int.
      kind_of_value = next(t for t in typing.get_args(hints[name]) if t is not type(None))
      value = config_dict.placeholder(typing.get_origin(kind_of_value) or kind_of_value)
    out[name] = value
  return ConfigDict(out)


def _parse_value(key: str, text: str, wanted: type) -> Any:
  words = {"true": True, "1": True, "false": False, "0": False}
  try:
    return words[text.lower()] if wanted is bool else wanted(text)
  except (KeyError, ValueError):
    raise UserError(f"config argument {key}={text!r} must be of type {wanted.__name__}") from None
