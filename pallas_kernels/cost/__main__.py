"""What the kernels cost on TPUs and GPUs that are not there: compiled by the real compilers, on any Linux machine.

    python -m pallas_kernels.cost                                        every kernel, shape and chip
    python -m pallas_kernels.cost --chips v6e --kernels linear_recurrence --shapes kimi_linear,mamba2
    python -m pallas_kernels.cost --cycles v6e                           the compiler's own estimate too, slower
    python -m pallas_kernels.cost --out benchmarks/records               also tpu_cost.csv and tpu_cost.png
    python -m pallas_kernels.cost --spec my_module:my_function           any function that returns (fn, arguments)
    python -m pallas_kernels.cost --readme README.md                     its table, from benchmarks/records
    python -m pallas_kernels.cost --platform gpu                         registers, spills and memory on an H200

libtpu, a package, compiles for a described chip with no chip there (pip install "jax[tpu]"). A row is one
pallas_call of one program on one chip:

- bundles: VLIW instructions of the final schedule, a cycle each at the least; a grid step, and a unit of work
  (128 tokens of a head, for the recurrence). The same on every machine.
- cycles: the compiler's own static estimate, with its stalls, where it survives making one. On v6e a kernel of the
  recurrence's forward pass takes it a minute or three, and 7 GB; of those that write or read boundary states it writes
  that they take 0, which is none here.
- HBM, MXU: the floors, in cycles. Bytes of the pallas_call's operands and results over the bandwidth; FLOPs of
  the kernel's matmuls, once for bfloat16 and as often as the precision asks for float32, over the peak.
- x floor: bundles over the larger floor. busiest: the unit with the fewest idle slots, and the part it works.
- VMEM: what the kernel allocates, of it for spilled registers. temp: HBM that the whole program allocates beside
  its arguments and results. moved: bytes of the kernels' operands and results, and what XLA's own instructions, before
  and between the kernels, write to HBM; x bytes: how often the program's arguments, read once, and its results, written
  once. (A backward pass reads its inputs again, and states at chunk boundaries are written and read: more than 1.)

Everything is of one TensorCore, which has half of the bandwidth of a v4, v5p and 7x chip.

Limits. Waits for memory and stalls of the matrix units are no bundles. Both sides of a pl.when count. A loop inside the
kernel counts as often as it runs where its trip count is known and the compiler kept it as one loop; elsewhere it
counts once, which the row says ("once").

For an H200 (sm_90a) nothing counts time. A row is one kernel: registers of a thread, the bytes that it spills (stored
and loaded, once each), shared memory of a block, the bytes of its operands and results, and temp as above. With --out
the table is gpu_cost.csv.
"""

import argparse
import concurrent.futures
import importlib.util
import pathlib
import sys
import time

import jax

from pallas_kernels.cost import gpu, gpu_report, report
from pallas_kernels.cost.cases import cases
from pallas_kernels.cost.chips import CHIPS
from pallas_kernels.cost.compiler import measure, serve

RECORD = "benchmarks/records/tpu_cost.csv"
INSTALL = f'pip install "jax[tpu]=={jax.__version__}"'


def _progress(done: int, total: int, label: str, start: float) -> None:
  left = (time.monotonic() - start) / done * (total - done)
  text = f"cost: {done}/{total} {label}, about {left / 60:.0f} min {left % 60:02.0f} s left"
  if sys.stderr.isatty():
    print(f"\r{text:<100}", end="\n" if done == total else "", file=sys.stderr, flush=True)
  else:
    print(text, file=sys.stderr, flush=True)


def survey(chips: list[str], names: list[str], cycles: list[str], jobs: int) -> list[dict]:
  """The table's rows for these chips and cases, ``jobs`` chips at a time, with a progress line.

  Estimated cycles are asked for on the chips of ``cycles``.
  """
  found: dict[tuple[str, str], list[dict]] = {}
  start = time.monotonic()

  known = cases()
  wanted = {chip: [n for n in names if n not in known or known[n].on(chip)] for chip in chips}
  count = sum(map(len, wanted.values()))

  def work(chip):
    for name, answer in measure(chip, wanted[chip], cycles=chip in cycles):
      found[chip, name] = report.records(name, chip, answer)
      _progress(len(found), count, f"{chip} {name}", start)

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    list(pool.map(work, chips))
  return [row for name in names for chip in chips for row in found.get((chip, name), [])]


def _chosen(p, what: str, given: str | None, known: list[str]) -> list[str]:
  names = given.split(",") if given else known
  if wrong := [n for n in names if n not in known]:
    p.error(f"unknown {what} {', '.join(wrong)}; known: {', '.join(known)}")
  return names


def _arguments(argv: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
  p = argparse.ArgumentParser(
    prog="python -m pallas_kernels.cost",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument("--platform", default="tpu", choices=("tpu", "gpu"))
  p.add_argument("--chips", help=f"of: {', '.join(CHIPS)}")
  p.add_argument("--kernels", help=f"of: {_known('kernel')}")
  p.add_argument("--phases", help=f"of: {_known('phase')}")
  p.add_argument("--shapes", help=f"of: {_known('shape')}")
  p.add_argument("--spec", help="MODULE:FUNCTION[:ARGUMENT],... that return (fn, arguments)")
  p.add_argument(
    "--cycles", metavar="CHIPS", help="ask for estimates; slow on v5e and v5p, where they crash"
  )
  p.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="chips compiled for at a time")
  p.add_argument(
    "--out",
    type=pathlib.Path,
    help="folder of tpu_cost.csv and .png, or gpu_cost.csv; other rows there stay",
  )
  p.add_argument("--readme", type=pathlib.Path, help="a file whose table is made from the record")
  return p, p.parse_args(argv)


def _known(field: str) -> str:
  return ", ".join(dict.fromkeys(getattr(c, field) for c in cases().values()))


def _names(p: argparse.ArgumentParser, a: argparse.Namespace) -> list[str]:
  """The cases that were asked for."""
  if a.spec:
    return a.spec.split(",")
  found = list(cases(a.platform).values())
  for field, given in (("kernel", a.kernels), ("phase", a.phases), ("shape", a.shapes)):
    known = list(dict.fromkeys(getattr(c, field) for c in cases(a.platform).values()))
    wanted = _chosen(p, field, given, known)
    found = [c for c in found if getattr(c, field) in wanted]
  if not found:
    p.error("no kernel has these phases and shapes")
  return [c.name for c in found]


def main(argv: list[str] | None = None) -> None:
  argv = sys.argv[1:] if argv is None else argv
  if argv[:2] == ["--child", "gpu"]:
    return gpu.serve(argv[3:], argv[2])
  if argv[:1] == ["--child"]:
    return serve(argv[1], argv[3:], argv[2])
  p, a = _arguments(argv)
  if a.readme:
    table = report.read(a.readme.resolve().parent / RECORD)
    a.readme.write_text(report.with_table(a.readme.read_text(), table))
    return
  chips, names = _chosen(p, "chip", a.chips, list(CHIPS)), _names(p, a)
  failed = _on_gpu(names, a) if a.platform == "gpu" else _on_tpus(p, chips, names, a)
  if failed:
    sys.exit(1)


def _on_tpus(p, chips: list[str], names: list[str], a: argparse.Namespace) -> bool:
  """Makes and records the table; whether anything failed."""
  if importlib.util.find_spec("libtpu") is None:
    sys.exit(f"cost: the TPU compiler, libtpu, is not installed (Linux only): {INSTALL}")
  cycles = _chosen(p, "chip", a.cycles, list(CHIPS)) if a.cycles else []
  rows = survey(chips, names, cycles, a.jobs)
  report.print_table(rows)
  if a.out:
    rows = _record(a, a.out / "tpu_cost.csv", rows, report.COLUMNS)
    report.plot(rows, a.out / "tpu_cost.png")
    print(f"wrote {a.out / 'tpu_cost.png'}")
  return any(row["error"] and not report.refused(row) for row in rows)


def _on_gpu(names: list[str], a: argparse.Namespace) -> bool:
  """As ``_on_tpus``."""
  if words := gpu.missing():
    sys.exit(f"cost: {words}")
  rows, start = [], time.monotonic()
  for i, (name, answer) in enumerate(gpu.measure(names)):
    rows += gpu_report.records(name, answer)
    _progress(i + 1, len(names), name, start)
  gpu_report.print_table(rows)
  if a.out:
    rows = _record(a, a.out / "gpu_cost.csv", rows, gpu_report.COLUMNS)
  return any(row["error"] and not report.refused(row) for row in rows)


def _record(a, path: pathlib.Path, rows: list[dict], columns: tuple[str, ...]) -> list[dict]:
  """Writes the rows, and those of other programs that are there already; all that are there now."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if not a.spec:
    old = report.read(path) if path.exists() else []
    rows = report.merged(old, rows, report.programs(a.platform))
  path.write_text(report.to_csv(rows, columns))
  print(f"wrote {path}")
  return rows


if __name__ == "__main__":
  main()
