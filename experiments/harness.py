"""Runs an experiment's cells: a process an accelerator or, without any, a CPU core, which serves one run after another,
if it can one of the model that it has compiled.

A run is (cell, learning rate, seed). It is kept in WORKDIR/runs/KEY, where KEY is a hash of all that determines it but
defaults and code, the resolved config and the tests: a run that is there is finished, whichever experiment, size or
sitting it came from, and one whose settings have changed is another. A report has its runs' results in a file beside
it, from which another machine goes on. A cell's learning rates are run on its first seed, then the best of them on the
other seeds.
"""

import dataclasses
import functools
import hashlib
import json
import os
import select as io
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from attnlab import accounting, cli, data, metrics
from attnlab.config import check, complete, flatten, resolve, to_json
from attnlab.errors import UserError, unknown
from configs.base import base
from experiments.cells import Cell, Experiment

flags.disclaim_key_flags()  # The flags are those of the experiment that calls `main`.

# For two cores in half an hour (head_to_head: four), for one accelerator in about one (head_to_head: three, both by the
# number of updates: it has not been timed), and with the settings of a paper where there is one.
SIZES = ("cpu", "gpu", "paper")
DEV = Path("/dev")
RUNS = "runs.jsonl"  # of a report: the results of its runs
# Of a progress table: more cells than this are told of only while they run.
_ROWS = 30


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run and its tests.

  Attributes:
    axes: of its cell.
    config: resolved.
    tests: changes to the config's `data` section, and what is measured, one for each test.
  """

  axes: Mapping[str, Any]
  config: ConfigDict
  tests: tuple[Mapping[str, Any], ...]

  @property
  def spec(self) -> dict[str, Any]:
    """All that determines the result but the code of models and training, as plain JSON values."""
    config = to_json(self.config)
    records = _records(json.dumps(config["data"]), self.config.seed)
    return {"config": config, "tests": [dict(t) for t in self.tests], "data": records}

  @functools.cached_property
  def key(self) -> str:
    """A hash of the spec, but for how it is run (the mesh) and for what has its default: a setting that comes to be
    later changes no run that does without it."""
    spec, usual = self.spec, _defaults()
    stated = flatten({k: v for k, v in spec["config"].items() if k != "mesh"})
    spec["config"] = {k: v for k, v in stated if k not in usual or usual[k] != v}
    text = json.dumps(spec, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

  @functools.cached_property
  def model(self) -> str:
    """Runs of which this is the same share most of what is compiled."""
    return json.dumps(to_json(self.config)["model"], sort_keys=True)

  @functools.cached_property
  def flops(self) -> float:
    """Of the whole of its training."""
    c = self.config
    tokens = c.train.steps * c.train.batch_size * c.data.seq_len
    return tokens * accounting.train_flops_per_token(c)

  def __str__(self) -> str:
    c = self.config
    return f"{describe(self.axes)}, learning rate {c.optim.learning_rate:g}, seed {c.seed}"


@functools.cache
def _defaults() -> dict[str, Any]:
  """Of every key of a config, mixers' too."""
  return dict(flatten(to_json(complete(base()))))


@functools.cache
def _records(config: str, seed: int) -> str:
  """What a config's training data are: other files, or another meaning of a task, are another experiment."""
  return data.open_source(ConfigDict(json.loads(config)), "train", seed).identity()


class Plan:
  """The runs of some cells: which there are, and which are needed next.

  Args:
    cells: of the experiment, those that are wanted.
    seeds: how many of each.
    results: of a run's key, its result, if it is finished. Looked into anew at each question.
  """

  def __init__(self, cells: Sequence[Cell], seeds: int, results: Mapping[str, dict[str, Any]]):
    self.cells, self._seeds, self._results = cells, seeds, results
    self._runs: dict[tuple[int, float, int], Run] = {}

  def run(self, cell: int, rate: float, seed: int) -> Run:
    """The run of a cell (by its number) with a learning rate and a seed."""
    if (cell, rate, seed) not in self._runs:
      c = self.cells[cell]
      config = c.config.copy_and_resolve_references()
      with config.unlocked():
        config.seed, config.optim.learning_rate = seed, float(rate)
      config = resolve(config)
      tests = tuple(t.spec for t in c.tests)
      self._runs[cell, rate, seed] = Run(c.axes, config, tests)
    return self._runs[cell, rate, seed]

  def sweep(self, cell: int) -> list[Run]:
    """The runs that choose a cell's learning rate."""
    return [self.run(cell, rate, 0) for rate in self.cells[cell].learning_rates]

  def rate(self, cell: int) -> float | None:
    """The best learning rate, of validation: of the highest accuracy, then of the lowest loss; of the lowest loss where
    bits are what is told. None: not known yet."""
    results = [self._results.get(run.key) for run in self.sweep(cell)]
    if None in results:
      return None
    rates = self.cells[cell].learning_rates
    bits = all(test.is_bits for test in self.cells[cell].tests)
    score = {
      rate: (0.0 if bits else r["accuracy"], -r["nll"])
      for rate, r in zip(rates, results, strict=True)
      if r and "not_finite" not in r
    }
    return max(score, key=lambda rate: score[rate]) if score else rates[0]

  def seeds(self, cell: int) -> list[Run]:
    """A cell's runs with the best learning rate, one a seed; none while it is not known."""
    rate = self.rate(cell)
    return [] if rate is None else [self.run(cell, rate, s) for s in range(self._seeds)]

  def needed(self, cell: int) -> list[Run]:
    """What can be run of a cell now and is not finished."""
    runs = self.sweep(cell) if self.rate(cell) is None else self.seeds(cell)
    return [run for run in runs if run.key not in self._results]

  def runs(self, cell: int) -> list[Run]:
    """All that are known of a cell, finished or not."""
    return self.sweep(cell) + self.seeds(cell)[1:]

  def left(self, cell: int) -> list[Run]:
    """All that a cell still needs, the learning rate of later seeds being guessed."""
    if self.rate(cell) is not None:
      return self.needed(cell)
    rate = self.cells[cell].learning_rates[0]
    return self.needed(cell) + [self.run(cell, rate, s) for s in range(1, self._seeds)]


class Results(dict[str, dict[str, Any]]):
  """The results of finished runs, by key.

  Args:
    directory: that the runs are below.
    told: a report's file of results: of runs on other machines, say.

  Raises:
    UserError: a line of the file is none of its lines.
  """

  def __init__(self, directory: Path, told: Path | None = None):
    super().__init__()
    self.directory = directory
    if told:
      self.update({key: line["result"] for key, line in read_runs(told).items()})
    for path in directory.glob("*/result.json"):
      self.read(path.parent.name)

  def read(self, key: str) -> bool:
    """Reads the result of a run that has ended; whether there is one."""
    path = self.directory / key / "result.json"
    if path.exists():
      self[key] = json.loads(path.read_text())
    return path.exists()


def read_runs(path: Path) -> dict[str, dict[str, Any]]:
  """The lines of a report's file of results, {"key", "run", "result"} each, by key; none if there is no file.

  Raises:
    UserError: a line is something else.
  """
  found = {}
  for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
    try:
      got = json.loads(line)
      found[got["key"]] = got | {"result": dict(got["result"])}
    except (ValueError, KeyError, TypeError):
      raise UserError(f"{path}, line {number}, tells no run's result: {line[:80]!r}") from None
  return found


@dataclasses.dataclass
class _Active:
  """A run under way."""

  run: Run
  began: float
  first: int  # updates done before

  def steps(self, directory: Path) -> int:
    records = metrics.read(directory / self.run.key / "metrics.jsonl")
    return max((r["step"] for r in records), default=0)


class _Worker:
  """A process of experiments/worker.py on one device; `active` is what it runs, None: nothing, and `model` what it has
  compiled (`Run.model`)."""

  def __init__(self, device: str, directory: Path):
    self.active: _Active | None = None
    self.model: str | None = None
    self._directory = directory
    env, more = dict(os.environ), []
    if device.startswith("core "):
      # A thread a core: small models do not keep two threads busy, and two runs do.
      env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
      env |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
      # Otherwise an update gives the memory of its temporary arrays back, and the next one gets it anew, page by page:
      # Gated DeltaNet's in head_to_head takes 93 ms then, and 58 so. And in one arena: those of XLA's threads keep
      # nothing, which in state_tracking was a fifth of the time. (glibc's; nobody else reads them.)
      env |= {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_ARENA_MAX": "1",
      }
      more = [f"--core={device.removeprefix('core ')}"]
    elif device:
      env |= {"CUDA_VISIBLE_DEVICES": device, "TPU_VISIBLE_CHIPS": device}
      env |= {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
    # A session of its own: Ctrl-C is ours to pass on. What is said outside of a run is lost with it.
    self._process = subprocess.Popen(
      [sys.executable, "-m", "experiments.worker", *more], env=env, text=True, start_new_session=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    assert self._process.stdin and self._process.stdout
    self._asked, self._told = self._process.stdin, self._process.stdout

  def start(self, run: Run) -> None:
    where = self._directory / run.key
    where.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(where / "run.json", json.dumps(run.spec, indent=2) + "\n")
    self.active, self.model = _Active(run, time.monotonic(), 0), run.model
    self.active.first = self.active.steps(self._directory)
    try:
      print(where, file=self._asked, flush=True)
    except BrokenPipeError:
      pass  # It has died, which `ended` tells.

  @property
  def dead(self) -> bool:
    return self._process.poll() is not None

  def ended(self) -> bool:
    """Whether the run has ended, well or badly."""
    return bool(io.select([self._told], [], [], 0)[0])

  def take(self) -> tuple[_Active, bool]:
    """The run that has ended, and whether all went well."""
    answer = self._told.readline()
    active, self.active = self.active, None
    assert active is not None
    if not answer:
      self._process.wait()
    return active, answer.endswith(" 0\n")

  def stop(self) -> None:
    self._process.terminate()

  def wait(self) -> None:
    self._process.wait()
    self._asked.close()
    self._told.close()


def run_all(plan: Plan, results: Results, devices: Sequence[str]) -> list[Run]:
  """Runs what is left of a plan, one run a device at a time, and shows how far it is.

  Args:
    plan: the runs.
    results: the finished ones; new ones are added.
    devices: numbers of accelerators; "core N" for a CPU's cores; or an empty string: whatever jax finds.

  Returns:
    The runs that failed. Their logs are beside them, and starting again tries them again.

  Raises:
    KeyboardInterrupt, SystemExit: a signal; runs under way have saved their checkpoints.
  """
  handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  workers: dict[str, _Worker] = {}
  broken: dict[str, Run] = {}
  console = Console(highlight=False, soft_wrap=True)
  progress = _Progress(plan, results, len(devices))
  with Live(console=console, auto_refresh=False, transient=True) as live:
    try:
      while True:
        for worker in [w for w in workers.values() if w.active and w.ended()]:
          p, well = worker.take()
          well = well and results.read(p.run.key)
          progress.done(p, results.directory)
          if not well:
            broken[p.run.key] = p.run
          line = _told(results[p.run.key]) if well else f"failed: {_why(results, p.run)}"
          live.console.print(f"{p.run}: {line}", markup=False)
        busy = {w.active.run.key for w in workers.values() if w.active} | broken.keys()
        idle = [d for d in devices if d not in workers or not workers[d].active]
        waiting = [r for r in _next(plan) if r.key not in busy] if idle else []
        for device in idle:
          held = workers.get(device)
          compiled = None if held is None or held.dead else held.model
          others = [w.active.run.model for w in workers.values() if w.active]
          if (run := choose(waiting, compiled, others)) is None:
            break
          waiting.remove(run)
          if compiled is None:
            workers[device] = _Worker(device, results.directory)
          workers[device].start(run)
        running = [w.active for w in workers.values() if w.active]
        if not running:
          live.console.print(progress.show([], results.directory, broken))
          return list(broken.values())
        live.update(progress.show(running, results.directory, broken), refresh=True)
        time.sleep(1.0)  # The table of many cells takes a while itself.
    finally:
      for worker in workers.values():
        worker.stop()
      for worker in workers.values():
        worker.wait()
      signal.signal(signal.SIGTERM, handler)


def choose(waiting: Sequence[Run], compiled: str | None, others: Sequence[str]) -> Run | None:
  """What a process runs next: the first of the model that it has compiled, or of one that no other is compiling.

  Args:
    waiting: what can be run now, in order.
    compiled: the model (`Run.model`) that it has run last; None: none.
    others: those that other processes are at.

  Returns:
    One of `waiting`; None if there is none.
  """

  def compiles(run: Run) -> int:
    return 0 if run.model == compiled else 1 + (run.model in others)

  return min(waiting, key=compiles, default=None)


def _next(plan: Plan) -> Iterator[Run]:
  seen = set()
  for cell in range(len(plan.cells)):
    for run in plan.needed(cell):
      if run.key not in seen:
        seen.add(run.key)
        yield run


def _told(result: Mapping[str, Any]) -> str:
  if "not_finite" in result:
    return "not finite"
  return (
    f"validation {100 * result['accuracy']:.1f} %, {result['steps']} updates,"
    f" {result['seconds']:.0f} s"
  )


def _why(results: Results, run: Run) -> str:
  path = results.directory / run.key / "log.txt"
  text = path.read_text() if path.exists() else ""
  # JAX ends its errors with a line and a word on what it has left out of the traceback.
  text = text.partition("\n--------------------\nFor simplicity, JAX")[0]
  lines = [line for line in text.splitlines() if line.strip()]
  return f"{lines[-1][:300] if lines else 'no word'} ({path})"


class _Progress:
  """A table of the cells, and when all will be done."""

  def __init__(self, plan: Plan, results: Results, workers: int):
    self._plan, self._results, self._workers = plan, results, workers
    self._flops = self._seconds = 0.0

  def done(self, p: _Active, directory: Path) -> None:
    """Notes the speed of a run that has ended."""
    self._flops += p.run.flops * self._share(p, directory)
    self._seconds += time.monotonic() - p.began

  def _share(self, p: _Active, directory: Path) -> float:
    """The part of a run that its process has done."""
    return max(p.steps(directory) - p.first, 0) / p.run.config.train.steps

  def show(self, running: Sequence[_Active], directory: Path, broken: Mapping[str, Run]) -> Group:
    shares = {p.run.key: self._share(p, directory) for p in running}
    now = time.monotonic()
    flops = self._flops + sum(p.run.flops * shares[p.run.key] for p in running)
    seconds = self._seconds + sum(now - p.began for p in running)
    cells = range(len(self._plan.cells))
    unique = {r.key: r for cell in cells for r in self._plan.left(cell) if r.key not in broken}
    left = sum(r.flops * (1 - shares.get(key, 0)) for key, r in unique.items())
    eta = left * seconds / flops / self._workers if flops else None
    table = Table(box=None, pad_edge=False)
    names = list(self._plan.cells[0].axes)
    for name in (*names, "learning rate", "runs", "validation"):
      table.add_column(name, justify="left" if name in names else "right")
    finished = shown = 0
    for cell in cells:
      needed, runs = self._plan.needed(cell), self._plan.runs(cell)
      finished += self._plan.rate(cell) is not None and not needed
      active = any(r.key in shares for r in runs)
      if len(cells) > _ROWS and not active:
        continue
      shown += 1
      if shown > _ROWS:
        break
      done = [self._results[r.key] for r in runs if r.key in self._results]
      best = max((r.get("accuracy", 0) for r in done), default=None)
      rate = self._plan.rate(cell)
      failed = sum(r.key in broken for r in runs)
      state = f"{len(done)} done" + (", 1 running" if active else "")
      table.add_row(
        *(str(v) for v in self._plan.cells[cell].axes.values()),
        f"{rate:g}" if rate else "",
        state + (f", {failed} failed" if failed else ""),
        f"{100 * best:.1f} %" if best is not None else "",
      )
    last = Text(f"{finished} of {len(cells)} cells; at most {len(unique)} runs left")
    if eta is not None:
      last.append(f"; ETA {_clock(eta)}")
    return Group(table, last)


def _clock(seconds: float) -> str:
  s = round(seconds)
  return f"{s // 3600}:{s // 60 % 60:02}:{s % 60:02}"


def describe(axes: Mapping[str, Any]) -> str:
  """{"task": "mqar", "length": 64} -> "task mqar, length 64"."""
  return ", ".join(f"{k} {v}" for k, v in axes.items())


def select(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
  """The cells that all of some conditions hold for.

  Args:
    cells: of an experiment.
    only: "axis=value", or "axis=value|value".

  Raises:
    UserError: no such axis or value.
  """
  for condition in only:
    axis, equals, values = condition.partition("=")
    known = {name for cell in cells for name in cell.axes}
    if not equals or axis not in known:
      raise unknown("axis in --only (axis=value)", axis, known)
    wanted = values.split("|")
    there = {str(cell.axes.get(axis)) for cell in cells}
    for value in wanted:
      if value not in there:
        raise unknown(f"value of {axis} in --only", value, there)
    cells = [cell for cell in cells if str(cell.axes.get(axis)) in wanted]
  return list(cells)


def devices(only: Sequence[str] = ()) -> list[str]:
  """What runs are given out to: accelerators by number or, where there are none, "core N" for each core of the CPU.

  Args:
    only: numbers of those to use; none: all.

  Raises:
    UserError: a number that there is not.
  """
  found = {n: n for n in accelerators()}
  if not found:
    affinity = getattr(os, "sched_getaffinity", None)
    numbers = sorted(affinity(0)) if affinity else range(os.cpu_count() or 1)
    found = {str(n): f"core {n}" for n in numbers}
  for n in only:
    if n not in found:
      raise unknown("device in --devices", n, found)
  return [found[n] for n in only or found]


def accelerators() -> list[str]:
  """The numbers of this machine's accelerators, found without starting jax on them."""
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    return []
  visible = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("TPU_VISIBLE_CHIPS")
  if visible:
    return visible.split(",")
  # TPUs are /dev/accelN, or since v5e numbers in /dev/vfio, which are chips in order but may be any numbers.
  for pattern, prefix in (
    ("nvidia[0-9]*", "nvidia"),
    ("accel[0-9]*", "accel"),
    ("vfio/[0-9]*", ""),
  ):
    found = [p.name.removeprefix(prefix) for p in DEV.glob(pattern)]
    if found:
      found = sorted((n for n in found if n.isdigit()), key=int)
      return [str(i) for i in range(len(found))] if "vfio" in pattern else found
  return []


def main(experiment: Experiment) -> None:
  """The command line of an experiment."""
  flags.DEFINE_list(
    "only", [], "Cells: axis=value, or axis=value|value; several, separated by commas."
  )
  flags.DEFINE_enum(
    "size", "cpu", SIZES, "For two CPU cores, for one accelerator, or the size of a paper."
  )
  flags.DEFINE_integer(
    "seeds", 3, "Runs of each cell, the learning rate being chosen on the first.", 1
  )
  flags.DEFINE_string("workdir", None, "Where runs are kept. Default: runs/experiments.")
  flags.DEFINE_string(
    "out",
    None,
    "Where the report goes; runs whose results are told in its runs.jsonl are not run again, on whichever machine"
    " they were run. Default: WORKDIR/NAME-SIZE.",
  )
  flags.DEFINE_bool("report", False, "Only the report, of what has been run.")
  flags.DEFINE_list("rates", [], "Learning rates, in place of the grid's: one saves the sweep.")
  flags.DEFINE_list(
    "devices", [], "Numbers of the accelerators, or without any of CPU cores, to use. Default: all."
  )
  # As it is told: where things lie and run, and that it was only a report, changes no figure.
  apart = ("--workdir", "--out", "--report", "--devices")
  told = [a for a in sys.argv[1:] if a.split("=")[0] not in apart]
  command = shlex.join(["python", "-m", f"experiments.{experiment.name}", *told])
  cli.run(lambda _: _main(experiment, command))


def _numbers(texts: Sequence[str]) -> tuple[float, ...]:
  try:
    return tuple(float(t) for t in texts)
  except ValueError:
    raise UserError(f"--rates={','.join(texts)} must be numbers such as 3e-3,1e-2") from None


def _main(experiment: Experiment, command: str) -> int:
  from experiments import report

  f = flags.FLAGS
  jax.config.update("jax_platforms", "cpu")  # of this process; the accelerators are the runs'
  workdir = Path(f.workdir or "runs/experiments").resolve()
  cells = select(experiment.cells(f.size), f.only)
  if f.rates:
    cells = [dataclasses.replace(c, learning_rates=_numbers(f.rates)) for c in cells]
  out = Path(f.out or workdir / f"{experiment.name}-{f.size}")
  results = Results(workdir / "runs", out / RUNS)
  plan = Plan(cells, f.seeds, results)
  for cell in range(len(cells)):  # What cannot work is told before anything is run.
    for run in plan.sweep(cell):
      try:
        check(run.config)
      except UserError as error:
        raise UserError(f"{describe(run.axes)}: {error}") from error
  try:
    failed = [] if f.report else run_all(plan, results, devices(f.devices))
  except KeyboardInterrupt:
    print("stopped; the same command goes on from here", file=sys.stderr)
    return 130
  report.write(experiment, plan, results, out, command=command, size=f.size)
  print(f"{out}/report.html, table.md, table.csv, plot.png, plot.svg, {RUNS}")
  return 1 if failed else 0
