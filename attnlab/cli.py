"""The command line that train, evaluate and generate share: absl flags, one-line errors, set-up.

Exit codes: 0 done; 2 a mistake in the command, the config, the data or the checkpoint, told in one
line; 3 a loss or gradient that is not finite; 128 + N stopped by signal N after saving a checkpoint
(143 SIGTERM, 130 SIGINT).
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from attnlab.config import known_key, load
from attnlab.errors import UserError

flags.disclaim_key_flags()  # The flags are those of the program that defines them through here.


class _ConfigParser(flags.ArgumentParser):
  """--config=FILE[:ARG] through `load`, whose errors are one line."""

  def parse(self, path: str) -> ConfigDict:
    return load(path)


def define_config() -> None:
  """Defines --config and its overrides --config.KEY=VALUE."""
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with an argument after a colon if it takes one: configs/kda.py:size=small; or a run's config.json."
    " --config.KEY=VALUE overrides a key.",
  )
  flags.FLAGS["config"].parser = _ConfigParser()


def config() -> ConfigDict:
  """What --config gave."""
  if flags.FLAGS.config is None:
    raise UserError("--config is missing: for example --config=configs/quickstart.py")
  return flags.FLAGS.config


def lengths() -> list[int]:
  """What --lengths gave: numbers of tokens."""
  given = flags.FLAGS.lengths
  if not all(re.fullmatch("[1-9][0-9]*", n) for n in given):
    raise UserError(f"--lengths={','.join(given)} must be numbers of tokens, such as 4096,8192")
  return [int(n) for n in given]


def default_workdir() -> str:
  """runs/NAME by the --config flag: "configs/kda.py:size=small" gives "runs/kda-size=small"; a run's config.json, its
  own."""
  path, _, arg = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
  if path.endswith(".json"):
    return str(Path(path).parent)
  name = "-".join(filter(None, (Path(path).stem, arg)))
  return str(Path("runs") / re.sub(r"[^\w=.+-]+", "-", name))


def in_cluster() -> bool:
  """Whether the environment names the coordinator of several processes."""
  return "JAX_COORDINATOR_ADDRESS" in os.environ


def join_processes() -> None:
  """Joins this process to the others of its run.

  JAX finds them by itself on TPU pods, under SLURM and under Open MPI. Elsewhere
  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say.
  """
  names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
  known = {key: int(os.environ[name]) for key, name in names.items() if name in os.environ}
  try:
    jax.distributed.initialize(**known)
  except ValueError as error:
    raise UserError(
      f"--distributed: {error} Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ) from error


def cache_compilations() -> None:
  """Keeps compiled programs on disk between runs, unless the user has said where or not to."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "attnlab"))
    # A small model is many programs of a fraction of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def run(main: Callable[[list[str]], int | None]) -> None:
  """`absl.app.run` in which a user's mistake is one line on stderr and exit code 2."""

  def checked_main(argv: list[str]) -> int | None:
    try:
      if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
      logging.set_verbosity(logging.WARNING)
      cache_compilations()
      return main(argv)
    except UserError as error:
      _die(error)

  app.run(checked_main, flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _die(error)
  except (AttributeError, KeyError):
    # What ml_collections raises for an override of a key that is not there, without its path.
    try:
      _explain_override(argv)
    except UserError as error:
      _die(error)
    raise


def _explain_override(argv: list[str]) -> None:
  specs = [
    following if arg in ("--config", "-config") else arg.partition("=")[2]
    for arg, following in zip(argv, [*argv[1:], ""], strict=True)
    if re.match(r"--?config(=|$)", arg)
  ]
  config = load(specs[-1]) if specs else None
  for arg in argv:
    key = re.match(r"--?(no)?config\.([^=]+)", arg)
    if key and config is not None:
      known_key(config, key[2])


def _die(error: Exception) -> None:
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  sys.exit(2)
