"""Runs of experiments: trains and tests what RUN/run.json says, and leaves RUN/result.json.

    python -m experiments.worker RUN
    python -m experiments.worker            directories on stdin, a line each; answers each with "RUN EXIT-CODE"

RUN is a working directory of `attnlab.train`; started again it goes on where it was. A process that serves many runs
imports once, and compiles once what runs of one model share: its seeds, learning rates and tasks of one shape.
`--core=N` keeps the process to one core.
"""

import contextlib
import fcntl
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree
from ml_collections import ConfigDict

from attnlab import cli, metrics
from attnlab.checkpoint import NonFiniteError
from attnlab.config import from_json, resolve
from attnlab.errors import UserError
from attnlab.evaluate import by_position, make_evaluate
from attnlab.state import load_model, reading_mesh, run_config
from attnlab.train import train
from pallas_kernels import sources

# What the tests are of: other examples of a task, another half of a text's validation, than those that choose the
# learning rate (seed 0 and half 1: experiments/cells.py).
TEST_DATA = {"task": {"validation_seed": 1}, "text": {"validation_half": 2}}
# By what a test measures, its key among evaluation's.
_KEYS = {
  "accuracy": "accuracy", "rows": "row_accuracy", "bits": "bits_per_byte", "indexer recall": "indexer_recall",
}  # fmt: skip


def run(directory: Path) -> dict[str, Any]:
  """Trains, tests, and returns what result.json holds.

  Returns:
    {"accuracy", "nll" of validation, "tests": figures in order, "steps", "seconds" of training, "parameters",
    "devices", "tokens_per_second", "commit", "wall_seconds" of all of it, in this process}, or {"not_finite": why,
    "commit", "wall_seconds"}: this learning rate is too high.
  """
  began = time.monotonic()
  return _run(directory) | {"commit": commit(), "wall_seconds": round(time.monotonic() - began, 1)}


def _run(directory: Path) -> dict[str, Any]:
  given = json.loads((directory / "run.json").read_text())
  try:
    summary = train(from_json(given["config"]), directory, plot=False)
  except NonFiniteError as error:
    return {"not_finite": str(error)}
  kept = ("steps", "seconds", "parameters", "devices", "tokens_per_second")
  return {
    "accuracy": summary["eval/accuracy"],
    "nll": summary["eval/nll"],
    "tests": test(directory, given["tests"]),
    **{k: summary[k] for k in kept},
  }


def commit() -> str | None:
  """Of the sources that run."""
  return sources.commit("attnlab", "configs", "experiments", "pallas_kernels")


def test(directory: Path, tests: Sequence[Mapping[str, Any]]) -> list[float]:
  """What is measured of a run's last checkpoint under each of some changes to its `data` section, or its pattern."""
  config = run_config(directory)
  mesh = reading_mesh(config.train.batch_size // config.train.grad_accum)
  out, loaded, evaluated = [], {}, {}
  for changes in tests:
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
      changed.data.update(TEST_DATA.get(config.data.name, {}))
      changed.data.task_args.update(changes.get("task_args", {}))
      others = ("task_args", "measure", "pattern")
      changed.data.update({k: v for k, v in changes.items() if k not in others})
      pattern = changed.model.pattern = changes.get("pattern", config.model.pattern)
    if pattern not in loaded:
      loaded[pattern] = load_model(directory, resolve(changed), mesh)[1:]
    graphdef, model = loaded[pattern]
    measure = changes.get("measure", "accuracy")
    same = json.dumps({**changes, "measure": None}, sort_keys=True)  # as tests of other measures
    with jax.set_mesh(mesh):
      if measure == "late bits":
        out.append(_late_bits(resolve(changed), graphdef, model, mesh))
        continue
      if same not in evaluated:
        evaluated[same] = make_evaluate(resolve(changed), mesh)(graphdef, model)
      out.append(evaluated[same][_KEYS[measure]])
  return out


def _late_bits(
  config: ConfigDict, graphdef: nnx.GraphDef, model: PyTree, mesh: jax.sharding.Mesh
) -> float:
  """Bits a byte (a token is a byte) in the last bucket of positions: the second half of documents that fill a row."""
  length = config.data.seq_len
  buckets = by_position(
    config, graphdef, model, mesh, length=length, tokens=config.train.eval_batches * 8 * length
  )
  return buckets[-1]["nll"] / math.log(2)


def one(directory: Path) -> int:
  """A run; the exit code of its command."""
  try:
    with _alone(directory):
      result = run(directory)
      metrics.write_atomically(directory / "result.json", json.dumps(result, indent=2) + "\n")
  except UserError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  return 0


def serve() -> None:
  """Runs the directories on stdin, each with its log beside it."""
  answers = os.fdopen(os.dup(1), "w")
  model = None
  for line in sys.stdin:
    directory = Path(line.rstrip("\n"))
    with open(directory / "log.txt", "a") as log:
      for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    before, model = model, json.loads((directory / "run.json").read_text())["config"]["model"]
    if before not in (None, model):
      jax.clear_caches()  # Programs of other models are of no more use, and are many.
    try:
      code = one(directory)
    except Exception:
      traceback.print_exc()
      code = 1
    sys.stdout.flush(), sys.stderr.flush()
    print(directory, code, file=answers, flush=True)


def main(argv: list[str]) -> int:
  cores = [a.removeprefix("--core=") for a in argv[1:] if a.startswith("--core=")]
  if cores and hasattr(os, "sched_setaffinity"):  # Before jax has threads.
    os.sched_setaffinity(0, {int(cores[0])})
  cli.cache_compilations()
  directories = [a for a in argv[1:] if not a.startswith("--")]
  if directories:
    return one(Path(directories[0]))
  serve()
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
