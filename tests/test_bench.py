"""The benchmark of GPU kernels, on a CPU: its logic with tiny shapes, XLA's backends and this machine's clock."""

import contextvars
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench, bench_checks, bench_gpu, bench_peers, bench_workers
from pallas_kernels.block_sparse.shapes import Shape as SparseShape
from pallas_kernels.linear_recurrence.shapes import Shape

ROOT = pathlib.Path(__file__).resolve().parent.parent


def rows():
  s = Shape(2, 16, 2, 16, "scalar", "key", batch=1, length=64)
  sparse = SparseShape(4, 1, 1, 16, 8, 16, 4, length=128)
  yield from bench_gpu.recurrence_rows("tiny", s, kernel="xla")
  yield from bench_gpu.step_rows("tiny", s, kernel="reference")
  yield from bench_gpu.sparse_rows("tiny", sparse, 4, kernel="xla")


def test_every_row_is_checked_and_timed(capsys):
  """cuDNN and fla are not there, and say so; everything else has a time."""
  records = [bench_gpu.time_row(row, bench_gpu.host_clock, 0.0) for row in rows()]
  assert [(r["kernel"], r["phase"]) for r in records] == [
    ("linear_recurrence", "forward"),
    ("linear_recurrence", "forward_backward"),
    ("linear_recurrence_step", "decode"),
    ("block_sparse", "forward"),
    ("block_sparse", "forward_backward"),
  ]
  for r in records:
    assert 0 <= r["error"] < 2e-2
    assert set(r["why_not"]) == {"fla"} | ({"full"} if r["kernel"] == "block_sparse" else set())
    assert "ModuleNotFoundError" in r["why_not"]["fla"]
    assert r["bytes_per_second"] > 0 and r["flops_per_second"] > 0
  bench_gpu.print_rows(records, bench_gpu.ceiling_of("NVIDIA H200"), 1e12)
  out = capsys.readouterr().out
  assert out.count("% of HBM") == 5 and "full: " in out
  assert "8 are padded to 16, 1.33 times the FLOPs" in records[-1]["note"] and "padded" in out
  record = dict(device="an H200", date="today", rows=records, copy_bytes_per_second=1e12)
  text = bench_gpu.with_table(
    f"a{bench_gpu.BEGIN}b{bench_gpu.END}c", json.loads(json.dumps(record))
  )
  assert text.startswith(f"a{bench_gpu.BEGIN}\nan H200, today") and text.endswith("c")
  assert text.count("| tiny") == 5


def test_the_readme_has_the_newest_record():
  text = (ROOT / "README.md").read_text()
  record = bench_gpu.newest_record(ROOT / "benchmarks" / "records")
  assert bench_gpu.with_table(text, record) == text, (
    "python -m pallas_kernels.bench --readme README.md"
  )


def test_records_of_some_rows_are_newer_than_the_whole(tmp_path):
  """The newest time of each row, with its commit; not what an older day timed, nor another GPU, nor what failed."""

  def write(name, date, commit, device="an H200", time=None, **rows):
    rows = [
      {"kernel": "k", "shape": shape, "phase": "p", "seconds": {"gpu": x}}
      | ({"bytes_per_second": 1} if x else {})
      for shape, x in rows.items()
    ]
    record = dict(date=date, commit=commit, device=device, copy_bytes_per_second=2, rows=rows)
    record |= {} if time is None else {"time": f"{date}T{time}+00:00"}
    (tmp_path / f"{date}-{name}.json").write_text(json.dumps(record))

  assert bench_gpu.newest_record(tmp_path) is None
  assert bench_gpu.some_rows(tmp_path, "2026-01-02") == "-only"
  write("gpu", "2026-01-02", "one", a=1.0, b=1.0, c=1.0)
  write("gpu-only", "2026-01-01", "zero", a=9.0)
  write("gpu-only", "2026-01-02", "two", a=2.0, b=2.0)
  write("gpu-only-2", "2026-01-02", "three", "an H100", b=9.0)
  for n in range(3, 11):
    write(f"gpu-only-{n}", "2026-01-02", f"only {n}", a=float(n), b=0.0)
  assert bench_gpu.some_rows(tmp_path, "2026-01-02") == "-only-11"
  record = bench_gpu.newest_record(tmp_path)
  assert [(r["shape"], r["seconds"]["gpu"], r["commit"]) for r in record["rows"]] == [
    ("a", 10.0, "only 10"),
    ("b", 2.0, "two"),
    ("c", 1.0, "one"),
  ]
  # A whole one that has its time, after one of the same day, and before others.
  write("gpu", "2026-01-02", "new", time="12:00:00", a=1.0, b=1.0, c=1.0)
  write("gpu-only-11", "2026-01-02", "before", time="09:59:59", a=9.0, b=9.0)
  write("gpu-only-12", "2026-01-02", "after", time="12:34:56", b=12.0)
  write("gpu-only", "2026-01-03", "a day without times", c=13.0)
  record = bench_gpu.newest_record(tmp_path)
  assert [(r["seconds"]["gpu"], r["commit"]) for r in record["rows"]] == [
    (1.0, "new"),
    (12.0, "after"),
    (13.0, "a day without times"),
  ]


def test_a_wrong_kernel_is_not_timed():
  row = next(rows())
  row.error = lambda: 0.5
  row.contestants["other"] = row.contestants["xla"]
  record = bench_gpu.time_row(row, bench_gpu.host_clock, 0.0)
  assert record["failure"] == record["why_not"]["xla"] == "error 5.0e-01 exceeds 0.02"
  assert set(record["seconds"]) == {"other"}
  row.error = lambda: 1 / 0
  assert "ZeroDivisionError" in bench_gpu.time_row(row, bench_gpu.host_clock, 0.0)["failure"]


def test_a_contestant_that_fails_loses_nothing_else():
  """When it is made, and when it runs."""

  def clock(fn, args):
    if fn == "cannot":
      raise ValueError("cannot be made")
    times = iter([1.0] if fn == "breaks" else itertools.repeat(2.0 if fn == "ours" else 6.0))
    return lambda args: lambda: next(times)

  row = next(rows())
  row.error = lambda: 0.0
  row.contestants = {name: name for name in ("ours", "cannot", "breaks", "slow")}
  record = bench_gpu.time_row(row, clock, 0.0)
  assert record["times_faster_than"] == {"slow": 3.0}
  assert record["why_not"]["cannot"] == "ValueError: cannot be made"
  assert record["why_not"]["breaks"].startswith("StopIteration")
  assert json.loads(json.dumps(record)) == record


def test_backward_alone_is_a_difference():
  def record(phase, **seconds):
    faster = {n: t / seconds["gpu"] for n, t in seconds.items() if n != "gpu"}
    return dict(kernel="a", shape="b", phase=phase, seconds=seconds, times_faster_than=faster)

  records = [record("forward", gpu=1.0, full=4.0), record("forward_backward", gpu=3.0, full=16.0)]
  assert bench_gpu.with_backward(records)[1]["backward_times_faster_than"] == {"full": 6.0}


def test_checks_are_of_every_specialisation():
  shapes = bench_checks.RECURRENCES.values()
  kinds = {(s.decay, s.erase) for s in shapes}
  decays, erases = ("none", "constant", "scalar", "channel"), ("none", "key", "low_rank")
  assert kinds == set(itertools.product(decays, erases))
  assert {s.key_dim for s in shapes} == {64, 128, 256} <= {s.value_dim for s in shapes}
  assert any(s.bonus for s in shapes) and any(s.reads == "undecayed" for s in shapes)
  names = {row.shape for row in bench_checks.rows() if row.kernel == "block_sparse"}
  assert names >= {"nsa", "moba", "infllm_v2", "minimax_m3", "window", "sinks", "segments"}


def test_a_check_is_of_gradients_from_a_state_and_of_packed_segments():
  s = Shape(1, 8, 2, 8, "channel", "key")
  assert bench_checks.recurrence_error(s, "float32", "xla", packed=True, length=20) < 1e-5
  s = SparseShape(4, 1, 1, 16, 16, 16, 4, length=40)
  options = dict(sinks=True, packed=True)
  assert bench_checks.sparse_error(s, 40, options, "xla") < 2e-2
  row = next(bench_checks.rows())
  record = bench_gpu.time_row(row, bench_gpu.host_clock, 0.0)
  assert "seconds" not in record and "need a Hopper GPU" in record["why_not"]["gpu"]


def _traced(case, *of):
  """Shapes of the arguments, the gradients and the results of a check's reference."""

  def both():
    run, args = case(*of)
    return args, *run("reference")(*args)

  args, gradients, out = jax.eval_shape(both)
  assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, args), of
  return args, out


def test_every_check_of_blocks_has_inputs_and_a_choice():
  """Some queries see fewer blocks than there are before them."""
  for s, length, options in bench_checks.SPARSE.values():
    _traced(bench_checks.sparse_case, s, length, options)
  for s, length in {(s, length) for s, length, _ in bench_checks.SPARSE.values()}:
    whole = -(-length // s.block_size) * s.block_size
    blocks = np.asarray(jax.jit(lambda s=s, n=whole: bench_gpu.blocks_of(s, n, 1))())[:, :, :length]
    before = np.arange(length) // s.block_size + 1
    assert np.all(blocks.max(-1) == before - 1), s
    seen = np.sum(blocks >= 0, axis=-1)
    assert np.all(seen == np.minimum(before, s.top_k)) and before[-1] > s.top_k, s
    assert s.top_k > 3, "one that is not forced"


def test_every_check_of_a_recurrence_has_inputs():
  for s in bench_checks.RECURRENCES.values():
    (r, state), (o, final) = _traced(bench_checks.recurrence_case, s, "bfloat16", True, 20)
    assert (o.shape, final.shape) == (r.v.shape, state.shape)


def test_a_kernel_that_does_not_serve_says_why(capsys):
  row = next(bench_gpu.recurrence_rows("tiny", Shape(1, 16, 1, 16, "none", length=8), "nowhere"))
  record = bench_gpu.time_row(row, bench_gpu.host_clock, 0.0)
  assert "error" not in record and "unknown backend" in record["why_not"]["nowhere"]
  bench_gpu.print_rows([record], None, 1e12)
  assert "not served: nowhere: ValueError" in capsys.readouterr().out


def test_medians_are_taken_in_turns():
  read = []

  def clock(name, times):
    times = itertools.cycle(times)
    return lambda: (read.append(name), next(times))[1]

  clocks = {"a": clock("a", [3.0, 1.0, 2.0]), "b": clock("b", [5.0])}
  assert bench_gpu.medians(clocks, 0.0) == {"a": 2.0, "b": 5.0}
  assert read == ["a", "b"] * 3


def test_errors_are_relative_and_infinities_must_agree():
  assert bench_gpu.worst([[1.0, 2.0]], [[1.0, 2.0]]) == 0
  got, want = bench_gpu.np.array([1.0, -math.inf]), bench_gpu.np.array([1.0, 2.0])
  assert bench_gpu.worst([got], [want]) == bench_gpu.worst([got], [-got]) == math.inf
  assert bench_gpu.worst([0 * want], [0 * want]) == 0 < bench_gpu.worst([want], [0 * want])


def test_a_kernel_whose_outputs_are_no_numbers_is_wrong(monkeypatch):
  """The largest of an error and of what is no number is that error."""
  whole = bench.forward

  def forward(backend):
    right = whole("reference")
    wrong = lambda r: jax.tree.map(lambda x: x * math.nan, right(r))  # noqa: E731
    return wrong if backend == "auto" else right

  monkeypatch.setattr(bench, "forward", forward)
  assert bench.check(Shape(1, 4, 1, 4, "scalar"), "float32", 8) == math.inf


def test_the_shapes_are_the_issue_s():
  """Those that targets are stated for."""
  names = {(row.kernel, row.shape, row.phase) for row in bench_gpu.rows()}
  timed = {name for name in names if name[2] != "check"}
  assert len(timed) == 6 * 2 + 3 + 2 * 2
  assert ("linear_recurrence", "kda_b1_t8192_h64", "forward_backward") in names


def test_without_a_gpu_one_line_says_so():
  command = [sys.executable, "-m", "pallas_kernels.bench", "--platform=gpu", "--out=/nowhere"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("bench: there is no GPU here") and done.stderr.count("\n") == 1


def test_laptop_rows_use_the_same_engine():
  times = bench.medians({"double": lambda r: r * 2}, bench.jnp.ones(8), 0.0)
  assert times.keys() == {"double"} and times["double"] > 0


def test_timed_gradients_have_the_output_as_cotangent():
  """And none of a state."""
  x, y = jnp.arange(3.0), jnp.array([2.0, 3.0, 5.0])
  run = bench_gpu.with_pullback(lambda x, y: (x * y, jnp.sum(x)), 1)
  (gradient,), out = run(x, y)
  assert gradient.tolist() == (x * y * y).tolist() and out[1] == 3
  assert "sin" not in str(jax.make_jaxpr(run)(x, y))


def test_kernels_of_a_call_are_told(monkeypatch):
  timings = [("b", 1.0), ("a", 2.0), ("b", 4.0)]
  monkeypatch.setattr(bench_gpu, "kernel_seconds", lambda run: bench_gpu.summed(timings))
  row = next(bench_gpu.step_rows("tiny", Shape(1, 8, 1, 8, "none", batch=1), kernel="reference"))
  row.error, row.peers = lambda: 0.0, {}
  record = bench_gpu.time_row(row, bench_gpu.device_clock, 0.0)
  assert record["kernels"] == {"b": 5e-3 / row.calls, "a": 2e-3 / row.calls}
  assert list(record["kernels"]) == ["b", "a"]
  assert record["seconds"]["reference"] == pytest.approx(7e-3 / row.calls)


def test_a_peer_tunes_when_it_is_timed(monkeypatch):
  """Not while it is prepared, beside others: then it compiles whatever may be chosen."""
  told = []
  monkeypatch.setattr(bench_peers, "_synchronize", lambda: None)
  monkeypatch.setattr(bench_peers, "forget", lambda clock: told.append(clock.__name__))
  start = bench_peers.prepare(lambda args: lambda: told.append(args), "small")
  assert told == ["_once", "small"]
  start("fresh")
  assert told == ["_once", "small", "_briefly", "fresh"]


def test_choices_of_a_tuner_compile_side_by_side(monkeypatch):
  """As Triton does it, of which nothing else is here; and what is given up leaves nothing behind."""
  told = []

  class Tuner:
    def run(self, *args, **kwargs):
      told.append(("run", args, kwargs))

    def warmup(self, *args, **kwargs):
      told.append(("compile", args, kwargs, mode.get()))
      if args == ("slow",):
        raise TimeoutError

  class Mode:
    def __init__(self, executor, ignore_errors):
      assert executor.submit(int, "7").result() == 7 and ignore_errors

    def __enter__(self):
      mode.set("on")

    def __exit__(self, *_):
      pass  # Triton's forgets itself only where all went well

  mode: contextvars.ContextVar = contextvars.ContextVar("mode", default=None)
  compile_ = types.SimpleNamespace(AsyncCompileMode=Mode, active_mode=mode)
  parts = {
    "": {},
    ".runtime": {"_async_compile": compile_},
    ".runtime.autotuner": {"Autotuner": Tuner},
  }
  for name, contents in parts.items():
    module = types.ModuleType(f"triton{name}")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, module.__name__, module)
  before = Tuner.run
  with bench_peers._compiling_side_by_side():
    Tuner().run("x", grid=1, warmup=False)
  assert told == [
    ("compile", ("x",), {"grid": 1}, "on"),
    ("run", ("x",), {"grid": 1, "warmup": False}),
  ]
  with pytest.raises(TimeoutError), bench_peers._compiling_side_by_side():
    Tuner().run("slow", grid=1)
  assert len(told) == 3 and mode.get() is None and Tuner.run is before


def test_all_choices_of_a_tuner_run_once():
  calls = []
  assert bench_peers._once(lambda: calls.append(1), quantiles=(0.5, 0.2, 0.8)) == [1.0] * 3
  assert calls == [1]


def _row(name, error=lambda: 0.0, make=lambda: (jnp.ones(8),), timed=True):
  double = {"xla": lambda x: x * 2}
  return bench_gpu.Row("double", name, "check", make, double, error, 1e-2, 1, 1, timed=timed)


def difficult_rows():
  """For workers."""
  calls = itertools.count()

  def make():
    if next(calls):  # its shapes were asked for before
      os._exit(3)
    return (jnp.ones(8),)

  def hang():  # where no signal ends it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(1000)

  yield _row("ends_when_timed", make=make)
  yield _row("fine")
  yield _row("raises", lambda: 1 / 0, timed=False)
  yield _row("ends", lambda: os._exit(4), timed=False)
  yield _row("hangs", hang, timed=False)
  yield dataclasses.replace(_row("waits"), peers={"slow": lambda args: time.sleep(1000)})
  yield _row("checked", lambda: 1e-3, timed=False)
  yield _row("fine_too")


def _measure(only=None, **options):
  rows = bench_workers.chosen("test_bench:difficult_rows", only)
  where = "test_bench:difficult_rows", "pallas_kernels.bench_gpu:host_clock"
  options = dict(jobs=2, timeout=6.0, seconds=0.0) | options
  return bench_workers.measure(rows, *where, **options)


def test_workers_that_end_lose_their_row_alone(capsys):
  """What they had prepared others prepare again."""
  kept = []
  records, left = _measure(keep=lambda records: kept.append(json.dumps(records)))
  assert left == 0 and kept[-1] == json.dumps(records)
  by_name = {r["shape"]: r for r in records}
  assert list(by_name) == [row.shape for row in difficult_rows()]
  assert by_name["waits"]["why_not"] == {"slow": "TimeoutError: given up after 5 s"}
  for name in ("fine", "fine_too", "waits"):
    assert by_name[name]["seconds"]["xla"] > 0 and "failure" not in by_name[name]
  assert by_name["checked"]["error"] == 1e-3 and "failure" not in by_name["checked"]
  failures = bench_gpu.failures(records)
  assert failures == [
    "double ends_when_timed check: its process ended, exit code 3",
    "double raises check: ZeroDivisionError: division by zero",
    "double ends check: its process ended, exit code 4",
    "double hangs check: has not ended after 6 s",
  ]
  told = capsys.readouterr().err
  assert "8/8  " in told and "0:00 to go" in told.splitlines()[-1]
  bench_gpu.print_rows(records, None, 1e12)
  out = capsys.readouterr().out.splitlines()
  assert out[-4:] == [f"FAILED {failure}" for failure in failures]
  assert "double: 1 checked and not timed; the largest error 1e-03 of 1e-02 allowed, checked" in out


def test_what_there_is_is_kept_when_time_runs_out(monkeypatch, tmp_path):
  ended = []

  def run(names, *args, **options):
    try:
      yield names[0], {"error": 0.0}, "done"
      yield names[1], {"error": 0.0}, "prepared"
      raise KeyboardInterrupt
    finally:
      ended.append("workers")

  monkeypatch.setattr(bench_workers, "run", run)
  keep = lambda records: bench._write(tmp_path, "", records, {}, say=False)  # noqa: E731
  records, left = _measure(keep=keep)
  assert len(records) == 2 and left == 7 and ended == ["workers"]
  (path,) = tmp_path.iterdir()
  record = json.loads(path.read_text())
  assert record["rows"] == records and record["time"].startswith(f"{record['date']}T")


def test_only_some_rows_are_chosen(monkeypatch):
  rows = bench_workers.chosen("pallas_kernels.bench_gpu:rows", "kda.*forward$")
  assert [row.name for row in rows] == [
    f"linear_recurrence kda_{size} forward" for size in ("b1_t8192_h64", "b8_t2048_h16")
  ]
  for only, why in (("nothing_so", "no row has 'nothing_so'"), ("(", "--only: missing )")):
    monkeypatch.setattr(sys, "argv", ["bench", "--platform=gpu", f"--only={only}"])
    with pytest.raises(SystemExit, match=re.escape(why)) as refused:
      bench.main()
    assert "\n" not in str(refused.value)
  with pytest.raises(ValueError, match="some that exist: linear_recurrence gated_deltanet"):
    bench_workers.chosen("pallas_kernels.bench_gpu:rows", "nothing_so")
