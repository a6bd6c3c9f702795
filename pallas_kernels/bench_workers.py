"""Processes that prepare the rows of `bench --platform=gpu` side by side, and then time them one after the other.

Only names and records go between processes: a worker finds its rows by name, in what "module:function" yields. What
takes too long is given up, and the row goes on without it. A worker that dies, hangs or loses its device loses the row
it was at; rows that it had prepared are prepared again.
"""

import collections
import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Generator

import jax
import numpy as np

from pallas_kernels import bench_gpu, bench_peers

# Several processes share a GPU; fla keeps no choice of configurations that it made while others ran.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "FLA_CACHE_RESULTS": "0"}

_START = 120.0  # seconds in which a process starts
_MOST = (
  0.85  # of a row's time, until whatever runs is given up, and what the row has so far is told
)
_spawn = multiprocessing.get_context("spawn")


def named(name: str) -> Callable:
  """The function that "module:function" names."""
  module, function = name.split(":")
  return getattr(importlib.import_module(module), function)


# --- a worker ---


@contextlib.contextmanager
def _given_up_after(seconds: float) -> Generator[None]:
  """Raises TimeoutError in whatever runs then: in what a row does last, compiling another library's kernels, say."""

  def late(*_):
    raise TimeoutError(f"given up after {seconds:.0f} s")

  signal.signal(signal.SIGALRM, late)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)


def _serve(pipe, rows: str, clock: str, timeout: float, seconds: float) -> None:
  """Answers each ("prepare" or "time", a row's name) with a record and "prepared", "done" or "lost"."""
  for number in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle, who ends its workers
    signal.signal(number, signal.SIG_IGN)
  by_name = {row.name: row for row in named(rows)()}
  prepared: dict[str, bench_gpu.Prepared] = {}
  pipe.send(None)  # ready to begin
  while True:
    try:
      what, name = pipe.recv()
    except EOFError:
      return
    state = "done"
    try:
      with _given_up_after(_MOST * timeout):
        if what == "prepare":
          row = bench_gpu.prepare(by_name[name], named(clock))
          record = row.record
          if row.row.timed:
            prepared[name], state = row, "prepared"
        else:
          record = bench_gpu.time_prepared(prepared.pop(name), seconds)
    except Exception as error:  # of whatever kind
      record = {"failure": bench_gpu.in_words(error)}
    try:
      bench_peers.free()
      jax.block_until_ready(jax.device_put(np.ones(8)) + 1)
    except Exception as error:  # after an illegal access every call fails
      record = {"failure": f"the device was lost: {bench_gpu.in_words(error)}"} | record
      state = "lost"
    pipe.send((record, state))


class _Worker:
  """Its process, the row it is at, until when, and the rows that it has prepared."""

  def __init__(self, *args):
    self.pipe, there = _spawn.Pipe()
    self.process = _spawn.Process(target=_serve, args=(there, *args), daemon=True)
    self.process.start()
    there.close()
    self.row, self.deadline, self.timeout, self.prepared = "", 0.0, _START, []

  def ask(self, what: str, name: str, timeout: float) -> None:
    wait = max(timeout, self.timeout)  # of a new one that of its start
    self.row, self.deadline, self.timeout = name, time.monotonic() + wait, timeout
    with contextlib.suppress(OSError):  # of a dead one; its answer is then that it has ended
      self.pipe.send((what, name))

  def answer(self) -> tuple[str, dict, str] | None:
    """The row, what is told of it, and its state; for one who has answered, or is late. None: it begins."""
    name, self.row = self.row, ""
    try:
      if self.pipe.poll():
        if answer := self.pipe.recv():
          return name, *answer
        self.row, self.deadline = name, time.monotonic() + self.timeout
        return None
      why = f"has not ended after {self.timeout:.0f} s"
    except (EOFError, OSError):
      self.process.join(5)
      why = f"its process ended, exit code {self.process.exitcode}"
    return name, {"failure": why}, "lost"

  def end(self) -> None:
    self.process.kill()
    self.process.join(_START)  # a driver may hold it
    self.pipe.close()


# --- all of them ---


def run(
  names: list[str], rows: str, clock: str, *, jobs: int, timeout: float, seconds: float
) -> Generator[tuple[str, dict, str]]:
  """A row's name, its record and "prepared" (it will be timed), "done" or "lost" (with its worker), as they come."""
  os.environ.update(ENVIRONMENT)  # workers inherit it
  todo = collections.deque(names)
  workers: list[_Worker] = []
  try:
    while todo:
      while todo or any(w.row for w in workers):
        for worker in workers:
          if todo and not worker.row:
            worker.ask("prepare", todo.popleft(), timeout)
        while todo and len(workers) < jobs:
          workers.append(_Worker(rows, clock, timeout, seconds))
          workers[-1].ask("prepare", todo.popleft(), timeout)
        busy = [w for w in workers if w.row]
        wait = max(0.0, min(w.deadline for w in busy) - time.monotonic())
        ready = multiprocessing.connection.wait([w.pipe for w in busy], wait)
        for worker in busy:
          if worker.pipe in ready or time.monotonic() >= worker.deadline:
            if not (answer := worker.answer()):
              continue
            name, _, state = answer
            if state == "prepared":
              worker.prepared.append(name)
            if state == "lost":
              todo.extend(worker.prepared)
              workers.remove(worker)
              worker.end()
            yield answer
      # One row at a time; a worker that has timed its rows leaves its memory to the next.
      workers.sort(key=lambda w: len(w.prepared))
      while workers:
        worker = workers[0]
        while worker.prepared:
          worker.ask("time", worker.prepared.pop(0), timeout)
          multiprocessing.connection.wait([worker.pipe], timeout)
          answer = worker.answer()
          assert answer  # it has begun
          if answer[2] == "lost":
            todo.extend(worker.prepared)
            worker.prepared = []
          yield answer
        worker.end()
        workers.remove(worker)
  finally:
    for worker in workers:
      worker.end()


def chosen(rows: str, only: str | None) -> list[bench_gpu.Row]:
  """The rows whose "kernel shape phase" has the pattern; there is one, or an error."""
  everything = list(named(rows)())
  found = [row for row in everything if re.search(only or "", row.name)]
  if not found:
    some = "; ".join(row.name for row in everything[:: max(1, len(everything) // 5)])
    raise ValueError(f"no row has {only!r} in its kernel, shape and phase; some that exist: {some}")
  return found


def measure(
  rows: list[bench_gpu.Row],
  of: str,
  clock: str,
  *,
  jobs: int,
  timeout: float,
  seconds: float,
  keep: Callable[[list[dict]], None] = lambda records: None,
) -> tuple[list[dict], int]:
  """The records of the rows (of those that ``of`` names), in their order, and how many rows did not come to an end.

  Those that there are go to ``keep`` whenever one comes. Ctrl-C ends it early.
  """
  names = [row.name for row in rows]
  records: dict[str, dict] = {}
  left = set(names)
  start = time.monotonic()

  def ordered() -> list[dict]:
    return [records[name] for name in names if name in records]

  slowest = [row.name for row in sorted(rows, key=bench_gpu.effort, reverse=True)]
  found = run(slowest, of, clock, jobs=jobs, timeout=timeout, seconds=seconds)
  try:
    with contextlib.closing(found):
      for name, record, state in found:
        kernel, shape, phase = name.split()
        empty = {"kernel": kernel, "shape": shape, "phase": phase, "why_not": {}}
        records[name] = empty | records.get(name, {}) | record
        if state != "prepared":
          left.discard(name)
        # Timing is short beside compiling.
        done = len(names) - len(left) + 0.9 * len(left & records.keys())
        gone = time.monotonic() - start
        end = f"{_clock_face(gone)}, {_clock_face(gone * (len(names) / done - 1))} to go"
        told = record.get("failure", state)
        print(f"{len(names) - len(left)}/{len(names)}  {end}  {name}  {told}", file=sys.stderr)
        keep(ordered())
  except KeyboardInterrupt:
    pass
  return ordered(), len(left)


def _clock_face(seconds: float) -> str:
  return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
