"""The command line that train, evaluate and generate share: absl flags, one-line errors.

Exit codes: 0 done; 2 a mistake in the command, the config, the data or the checkpoint, told in one
line; 3 a loss or gradient that is not finite; 128 + N stopped by signal N after saving a checkpoint
(143 SIGTERM, 130 SIGINT).
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from attnlab.config import known_key, load
from attnlab.errors import UserError


class _ConfigParser(config_flags.ConfigFileFlagParser):
  """--config=FILE[:ARG] through `load`, whose errors are one line."""

  def parse(self, path: str) -> ConfigDict:
    return load(path)


def define_flag(**kwargs: Any) -> flags.FlagHolder:
  """Defines --config and its overrides, --config.KEY=VALUE."""
  holder = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with an argument after a colon if it takes one:"
    " configs/kda.py:size=small. --config.KEY=VALUE overrides a key.",
    **kwargs,
  )
  flags.FLAGS["config"].parser = _ConfigParser("config")
  return holder


def default_workdir(spec: str) -> str:
  """runs/NAME for a --config flag's value: "configs/kda.py:size=small" -> "runs/kda-size=small"."""
  path, _, arg = spec.partition(":")
  name = "-".join(filter(None, (Path(path).stem, arg)))
  return str(Path("runs") / re.sub(r"[^\w=.+-]+", "-", name))


def run(main: Callable[[list[str]], int | None]) -> None:
  """`absl.app.run` in which a user's mistake is one line on stderr and exit code 2."""

  def checked_main(argv: list[str]) -> int | None:
    try:
      if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
      return main(argv)
    except UserError as error:
      _die(error)

  app.run(checked_main, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError, ValueError) as error:
    # What ml_collections raises for an override of a key that is not there, without its path.
    try:
      _explain_override(argv)
    except UserError as better:
      _die(better)
    if isinstance(error, UserError):
      _die(error)
    raise
  except flags.Error as error:
    _die(error)


def _explain_override(argv: list[str]) -> None:
  specs = [a.partition("=")[2] for a in argv if re.match(r"--?config=", a)]
  config = load(specs[-1]) if specs else None
  for arg in argv:
    key = re.match(r"--?(no)?config\.([^=]+)", arg)
    if key and config is not None:
      known_key(config, key[2])


def _die(error: Exception) -> None:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  sys.exit(2)
