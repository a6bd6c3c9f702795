"""One run of an experiment: trains and tests what RUN/run.json says, and leaves RUN/result.json.

    python -m experiments.worker RUN

RUN is a working directory of `attnlab.train`; started again it goes on where it was.
"""

import contextlib
import fcntl
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from attnlab import cli, metrics
from attnlab.checkpoint import NonFiniteError
from attnlab.config import from_json, resolve
from attnlab.errors import UserError
from attnlab.evaluate import make_evaluate
from attnlab.state import load_model, reading_mesh, run_config
from attnlab.train import train

# Validation examples of the tests; those of seed 0 choose the learning rate.
TEST_SEED = 1
# By what a test measures, its key among evaluation's.
_KEYS = {"accuracy": "accuracy", "rows": "row_accuracy", "bits": "bits_per_byte"}


def run(directory: Path) -> dict[str, Any]:
  """Trains, tests, and returns what result.json holds.

  Returns:
    {"accuracy", "nll" of validation, "tests": figures in order, "steps", "seconds", "parameters", "devices"}, or
    {"not_finite": why}: this learning rate is too high.
  """
  given = json.loads((directory / "run.json").read_text())
  try:
    summary = train(from_json(given["config"]), directory)
  except NonFiniteError as error:
    return {"not_finite": str(error)}
  kept = ("steps", "seconds", "parameters", "devices", "tokens_per_second")
  return {
    "accuracy": summary["eval/accuracy"],
    "nll": summary["eval/nll"],
    "tests": test(directory, given["tests"]),
    **{k: summary[k] for k in kept},
  }


def test(directory: Path, tests: Sequence[Mapping[str, Any]]) -> list[float]:
  """What is measured of a run's last checkpoint under each of some changes to its `data` section."""
  config = run_config(directory)
  mesh = reading_mesh(config.train.batch_size // config.train.grad_accum)
  _, graphdef, model = load_model(directory, config, mesh)
  out = []
  for changes in tests:
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
      changed.data.validation_seed = TEST_SEED
      changed.data.task_args.update(changes.get("task_args", {}))
      changed.data.update({k: v for k, v in changes.items() if k not in ("task_args", "measure")})
    with jax.set_mesh(mesh):
      values = make_evaluate(resolve(changed), mesh)(graphdef, model)
    out.append(values[_KEYS[changes.get("measure", "accuracy")]])
  return out


def main(argv: list[str]) -> int:
  cli.cache_compilations()
  directory = Path(argv[1])
  try:
    with _alone(directory):
      result = run(directory)
      metrics.write_atomically(directory / "result.json", json.dumps(result, indent=2) + "\n")
  except UserError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  return 0


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
  """Keeps a second process, perhaps of another sitting, from writing into the same directory."""
  with open(directory / "lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(f"{directory} is being run by another process") from error
    yield


if __name__ == "__main__":
  sys.exit(main(sys.argv))
