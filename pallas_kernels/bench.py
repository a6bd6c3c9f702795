"""Times the linear recurrence on this machine, after checking it, beside baselines in the same run.

    python -m pallas_kernels.bench                              the laptop's shapes
    python -m pallas_kernels.bench --shapes kimi_linear,mamba2 --length 8192 --dtype bfloat16
    python -m pallas_kernels.bench --linear                     time and memory against length
    python -m pallas_kernels.bench --out benchmarks/records     also writes a dated JSON record
    python -m pallas_kernels.bench --platform=gpu --out=DIR     all kernels of this machine's GPU
    python -m pallas_kernels.bench --readme README.md           its table of them, from benchmarks/records

Each row is checked first: outputs, final state and every gradient against the token-by-token reference in float64, on
fresh inputs. Then all contestants of a row are timed in turn, again and again, and the median is told. "reference" is
the scan over tokens; "ejkernel" is that library's XLA gated_delta_rule, on Gated DeltaNet's shapes, where it is
installed (pip install --no-deps ejkernel): with its default chunk of 256 tokens, and with 64, the faster one on CPUs.

On a GPU every kernel is checked, then timed by the device's clock beside XLA, cuDNN's flash attention over all keys
and, where torch and fla-core can be imported, fla's Triton kernels on the same numbers. Processes (--jobs) check and
compile rows side by side; they are timed one after the other, with nothing else running. --only takes some of them, to
a record of their own (DATE-gpu-only.json, then -2 and so on), and --readme takes the newest time of each:

    python -m pallas_kernels.bench --platform=gpu --only 'kda.*forward_backward'

The record is written whenever a row ends. Ctrl-C ends with what there is; where a row failed, the exit code is 1.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import signal
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import bench_gpu, bench_workers, sources
from pallas_kernels.linear_recurrence import KeyErase, Recurrence, linear_recurrence
from pallas_kernels.linear_recurrence.shapes import SHAPES, Shape, inputs

# Relative error allowed; bfloat16 outputs round at 2^-9.
_BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}


def forward(backend: str) -> Callable:
  """r -> outputs and final state."""
  return lambda r: linear_recurrence(r, return_state=True, backend=backend)


def both(run: Callable) -> Callable:
  """r -> gradients of all inputs, under fixed cotangents of the outputs' size."""

  def loss(r):
    o, state = run(r)
    o = o.astype(jnp.promote_types(o.dtype, jnp.float32))
    return jnp.sum(jnp.sin(o)) + (0.0 if state is None else jnp.sum(jnp.sin(state)))

  return jax.grad(loss)


def ejkernel(**options) -> Callable | None:
  """ejkernel's XLA gated_delta_rule as it is called for training, or None where it cannot be imported."""
  try:
    from ejkernel.kernels._xla.gated_delta_rule import gated_delta_rule
  except ImportError:
    return None

  def run(r: Recurrence):
    assert isinstance(r.erase, KeyErase)
    o, state = gated_delta_rule(
      query=r.q,
      key=r.k,
      value=r.v,
      beta=r.erase.beta,
      decay=r.log_decay[..., 0],
      use_qk_l2norm=False,
      **options,
    )[:2]
    return o.astype(r.v.dtype), state

  return run


def check(shape: Shape, dtype: str, length: int) -> float:
  """The largest relative error of outputs, state and gradients against the reference in float64.

  The reference gets the same (rounded) inputs. In float32 it would itself be the less accurate of the
  two: a constant decay's rounding error adds up over tokens.
  """
  r = inputs(shape, length=length, dtype=jnp.dtype(dtype), seed=int(time.time()))
  worst = 0.0
  for run in (lambda f: f, both):
    got = jax.jit(run(forward("auto")))(r)
    with jax.enable_x64(True):
      exact = jax.tree.map(lambda x: x.astype(jnp.float64), r)
      want = jax.jit(run(forward("reference")))(exact)
    worst = max(worst, bench_gpu.worst(got, want))
  return worst


def medians(contestants: dict[str, Callable], r: Recurrence, seconds: float) -> dict[str, float]:
  """Seconds a call of each, taken in turns for about ``seconds`` each."""
  clocks = {name: bench_gpu.host_clock(fn, (r,))((r,)) for name, fn in contestants.items()}
  return bench_gpu.medians(clocks, seconds)


def bench(name: str, batch: int | None, length: int | None, dtype: str, seconds: float) -> dict:
  """One row: the error, then the times of all that can run the shape."""
  shape = SHAPES[name]
  r = inputs(shape, batch=batch, length=length, dtype=jnp.dtype(dtype))
  error = check(shape, dtype, min(r.k.shape[1], 512) - 1)  # an odd length, for the tail of a chunk
  if not error < _BOUNDS[dtype]:
    raise SystemExit(
      f"bench: {name}: error {error:.1e} against the reference exceeds {_BOUNDS[dtype]}"
    )
  runs = {"ours": forward("auto"), "reference": forward("reference")}
  if (
    r.decay == "scalar" and isinstance(r.erase, KeyErase) and r.k.shape == r.v.shape and ejkernel()
  ):
    runs["ejkernel"], runs["ejkernel64"] = ejkernel(), ejkernel(chunk_size=64)
  row = {"shape": name, "dims": [*r.k.shape, *r.v.shape[2:]], "dtype": dtype, "error": error}
  row["forward_s"] = medians(runs, r, seconds)
  row["forward_backward_s"] = medians({k: both(f) for k, f in runs.items()}, r, seconds)
  return row


def linear(name: str, dtype: str, seconds: float) -> list[dict]:
  """Time and memory of forward + backward at growing lengths."""
  rows = []
  for length in (2048, 4096, 8192, 16384, 32768):
    r = inputs(SHAPES[name], length=length, dtype=jnp.dtype(dtype))
    fn = both(forward("auto"))
    memory = jax.jit(fn).lower(r).compile().memory_analysis()
    row = {"shape": name, "length": length, "temp_bytes": memory.temp_size_in_bytes}
    row["input_bytes"] = memory.argument_size_in_bytes
    row["forward_backward_s"] = medians({"ours": fn}, r, seconds)["ours"]
    rows.append(row)
  return rows


def _print_rows(rows: list[dict]) -> None:
  names = sorted({n for row in rows for n in row["forward_s"]} - {"ours"}, reverse=True)
  print(f"{'shape':<20}{'B T H K Hv V':>24}{'error':>9}", end="")
  for phase in ("forward", "fwd + bwd"):
    print(f"{phase + ' ms':>14}", *(f"{'/ ' + n:>12}" for n in names), end="")
  print()
  for row in rows:
    dims = " ".join(map(str, row["dims"]))
    print(f"{row['shape']:<20}{dims:>24}{row['error']:>9.0e}", end="")
    for phase in ("forward_s", "forward_backward_s"):
      times = row[phase]
      ratios = (f"{times['ours'] / times[n]:>12.3f}" if n in times else f"{'-':>12}" for n in names)
      print(f"{1e3 * times['ours']:>14.1f}", *ratios, end="")
    print()
  print("/ NAME: our time over NAME's, in this run")


def _print_linear(rows: list[dict]) -> None:
  print(
    f"{'shape':<20}{'T':>8}{'fwd + bwd ms':>14}{'x':>6}{'temporary MiB':>15}{'x':>6}{'inputs MiB':>12}"
  )
  before = None
  for row in rows:
    ms, mib = 1e3 * row["forward_backward_s"], row["temp_bytes"] / 2**20
    grown = ("", "") if before is None else (f"{ms / before[0]:.2f}", f"{mib / before[1]:.2f}")
    print(
      f"{row['shape']:<20}{row['length']:>8}{ms:>14.1f}{grown[0]:>6}{mib:>15.1f}{grown[1]:>6}",
      end="",
    )
    print(f"{row['input_bytes'] / 2**20:>12.1f}")
    before = ms, mib


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def main() -> None:
  laptop = [n for n in SHAPES if n.startswith("cpu_")]
  p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument("--shapes", default=",".join(laptop), help=f"of: {', '.join(SHAPES)}")
  p.add_argument("--batch", type=int, help="sequences; the shape's own by default")
  p.add_argument("--length", type=int, help="tokens; the shape's own by default")
  p.add_argument("--dtype", default="float32", choices=sorted(_BOUNDS))
  p.add_argument("--seconds", type=float, default=2.0, help="of timing a contestant")
  p.add_argument(
    "--linear", action="store_true", help="time and memory against length, of the first shape"
  )
  p.add_argument("--out", type=pathlib.Path, help="directory for a JSON record")
  p.add_argument(
    "--readme", type=pathlib.Path, help="a file whose GPU table is made from the record"
  )
  gpu = p.add_argument_group("GPU kernels")
  gpu.add_argument("--platform", choices=("gpu",), help="all kernels of this machine's GPU")
  gpu.add_argument("--only", metavar="REGEX", help='rows with it in their "kernel shape phase"')
  gpu.add_argument("--jobs", type=int, help="processes that prepare rows; as many as cores")
  gpu.add_argument("--timeout", type=float, default=300.0, help="seconds to prepare or time a row")
  a = p.parse_args()
  if a.readme:
    record = bench_gpu.newest_record(a.readme.resolve().parent / "benchmarks" / "records")
    a.readme.write_text(bench_gpu.with_table(a.readme.read_text(), record))
    return
  if a.platform:
    return on_gpu(a.out, a.only, a.jobs, a.timeout, a.seconds)
  if a.only or a.jobs:
    p.error("--only and --jobs are of --platform=gpu")
  names = a.shapes.split(",")
  if wrong := [n for n in names if n not in SHAPES]:
    p.error(f"unknown shape {', '.join(wrong)}; known: {', '.join(SHAPES)}")
  if a.linear:
    name = "cpu_gated_deltanet" if a.shapes == p.get_default("shapes") else names[0]
    rows = linear(name, a.dtype, a.seconds)
    _print_linear(rows)
  else:
    rows = []
    for i, name in enumerate(names):
      print(f"{i + 1}/{len(names)} {name}", file=sys.stderr)
      rows.append(bench(name, a.batch, a.length, a.dtype, a.seconds))
    _print_rows(rows)
  if a.out:
    _write(a.out, "-linear" if a.linear else "", rows, {})


_PACKAGES = (
  *(
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
  ),
  *("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "numpy", "ejkernel", "torch", "triton", "fla-core"),
)


def _now() -> datetime.datetime:
  """Of one clock, wherever the machine is: times of records are compared."""
  return datetime.datetime.now(datetime.UTC)


def _write(
  out: pathlib.Path, suffix: str, rows: list[dict], more: dict, *, say: bool = True
) -> None:
  """A dated record of this machine."""
  now = _now()
  today = now.date().isoformat()
  record = {
    "date": today,
    "time": now.isoformat(timespec="seconds"),
    "commit": sources.commit("pallas_kernels"),
    "command": "python -m pallas_kernels.bench " + " ".join(sys.argv[1:]),
    "device": f"{jax.devices()[0].device_kind}, {len(jax.devices())} x {jax.default_backend()}",
    "processor": platform.processor() or platform.machine(),
    "versions": {n: v for n in _PACKAGES if (v := _version(n))},
    "rows": rows,
  } | more
  out.mkdir(parents=True, exist_ok=True)
  path = out / f"{today}-{jax.default_backend()}{suffix}.json"
  part = path.with_suffix(".part")  # whoever is interrupted leaves a whole record
  part.write_text(json.dumps(record, indent=1) + "\n")
  part.replace(path)
  if say:
    print(f"wrote {path}")


_ROWS, _CLOCK = "pallas_kernels.bench_gpu:rows", "pallas_kernels.bench_gpu:device_clock"


def on_gpu(
  out: pathlib.Path | None, only: str | None, jobs: int | None, timeout: float, seconds: float
) -> None:
  """Rows of the GPU kernels; those that fail are told in the end."""
  try:
    rows = bench_workers.chosen(_ROWS, only)
  except (ValueError, re.error) as error:
    sys.exit(f"bench: --only: {error}")
  os.environ.update(bench_workers.ENVIRONMENT)  # before jax takes the device's memory
  if jax.default_backend() != "gpu":
    sys.exit(f"bench: there is no GPU here that JAX sees; its devices are {jax.devices()}")
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # time that runs out is as Ctrl-C
  copy = bench_gpu.copy_bandwidth(bench_gpu.device_clock)
  suffix = ""
  if out and only:  # some rows are not the record of a GPU
    suffix = bench_gpu.some_rows(out, _now().date().isoformat())

  def keep(records: list[dict], *, say: bool = False) -> None:
    failures = bench_gpu.failures(records)
    more = {"copy_bytes_per_second": copy, "failures": failures, "driver": bench_gpu.driver()}
    if out:
      _write(out, suffix, bench_gpu.with_backward(records), more, say=say)

  jobs = jobs or len(os.sched_getaffinity(0))
  options = dict(jobs=jobs, timeout=timeout, seconds=seconds, keep=keep)
  records, left = bench_workers.measure(rows, _ROWS, _CLOCK, **options)
  keep(records, say=True)
  ceiling = bench_gpu.ceiling_of(jax.devices()[0].device_kind)
  bench_gpu.print_rows(bench_gpu.with_backward(records), ceiling, copy)
  if left:
    sys.exit(f"bench: ended early: {left} of {len(rows)} rows are open")
  if failed := len(bench_gpu.failures(records)):
    sys.exit(f"bench: {failed} of {len(rows)} rows failed")


if __name__ == "__main__":
  main()
