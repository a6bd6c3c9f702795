"""The figures as a table, CSV, plot and Markdown."""

import collections
import csv
import importlib.metadata
import io
import pathlib

from pallas_kernels.cost.cases import case_of, cases
from pallas_kernels.cost.chips import CHIPS

COLUMNS = (
  "kernel", "phase", "shape", "chip", "call", "unit", "grid_steps", "bundles_per_step", "bundles_per_unit",
  "cycles_per_unit", "hbm_floor_per_unit", "matmul_floor_per_unit", "times_floor", "busiest", "vmem_bytes",
  "spilled_bytes", "temp_bytes", "bytes", "around_bytes", "ideal_bytes", "loops", "libtpu", "error",
)  # fmt: skip
_TEXT = (
  "kernel", "phase", "shape", "chip", "call", "unit", "busiest", "loops", "libtpu", "jax", "ptxas", "error",
)  # fmt: skip


def records(name: str, chip: str, answer: dict) -> list[dict]:
  """Rows of the table, with ``COLUMNS``: one for each pallas_call, and their sum where there are several.

  Args:
    name: of ``case_of``.
    chip: of CHIPS.
    answer: of ``measure``.
  """
  case = case_of(name)
  base = dict.fromkeys(COLUMNS, "")
  base |= dict(kernel=case.kernel, phase=case.phase, shape=case.shape, chip=chip, unit=case.unit)
  base["libtpu"] = version("libtpu")
  if "error" in answer:
    return [base | {"error": answer["error"]}]
  c, out, sums = CHIPS[chip], [], collections.Counter()
  estimated = all(row.get("cycles") for row in answer["rows"])

  def finish(row, bundles, cycles, hbm, matmul):
    floor = max(hbm, matmul)
    row["bundles_per_unit"] = round(bundles / case.units, 1)
    row["cycles_per_unit"] = round(cycles / case.units, 1) if cycles else ""
    row["hbm_floor_per_unit"] = round(hbm / case.units, 1)
    row["matmul_floor_per_unit"] = round(matmul / case.units, 1)
    row["times_floor"] = round(bundles / floor, 2) if floor else ""
    return row

  for call in answer["rows"]:
    if "bundles" not in call:
      out.append(base | {"call": call["call"], "error": "the compiler dumped no schedule"})
      continue
    bundles = call["bundles"] * call["grid_steps"]
    hbm = call["bytes"] / c.bandwidth * c.clock
    matmul = call["flops"] / c.flops
    row = base | {"call": call["call"], "grid_steps": call["grid_steps"]}
    row |= {"bundles_per_step": call["bundles"], "loops": "once" if call["once"] else ""}
    row |= {"busiest": call.get("busiest", "")}
    row |= {"vmem_bytes": call["vmem"], "spilled_bytes": call["spilled"]}
    row |= {"temp_bytes": call["temp"], "around_bytes": call["around"]}
    row |= {"bytes": call["bytes"], "ideal_bytes": call["ideal"]}
    out.append(finish(row, bundles, call["cycles"], hbm, matmul))
    sums.update(bundles=bundles, cycles=call["cycles"] or 0, hbm=hbm, matmul=matmul)
    sums.update(bytes=call["bytes"])
  if len(out) > 1 and not any(row["error"] for row in out):
    total = base | {"call": "all", "loops": "once" if any(row["loops"] for row in out) else ""}
    total |= {k: out[0][k] for k in ("temp_bytes", "around_bytes", "ideal_bytes")}
    total["bytes"] = sums["bytes"]
    cycles = sums["cycles"] if estimated else 0
    out.append(finish(total, sums["bundles"], cycles, sums["hbm"], sums["matmul"]))
  return out


def version(package: str) -> str:
  """A package's version, empty where it is not installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def to_csv(rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> str:
  """The table as CSV."""
  text = io.StringIO()
  writer = csv.DictWriter(text, columns, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def read(path: pathlib.Path) -> list[dict]:
  """The rows of a table that was written as CSV."""

  def value(text):
    try:
      return float(text) if "." in text else int(text)
    except ValueError:
      return text

  with path.open() as file:
    rows = csv.DictReader(file)
    return [{k: v if k in _TEXT else value(v) for k, v in row.items()} for row in rows]


def merged(old: list[dict], new: list[dict], programs: list[tuple[str, ...]]) -> list[dict]:
  """The old rows but for those of programs that there are new rows of, or that are no more; in order.

  Args:
    programs: all that there are: (kernel, phase, shape), and the chip where rows have one.
  """

  def program(row):
    return tuple(row[k] for k in ("kernel", "phase", "shape", "chip") if k in row)

  made = {program(row) for row in new}
  rows = [row for row in old if program(row) not in made and program(row) in programs] + new
  return sorted(
    rows, key=lambda row: programs.index(program(row)) if program(row) in programs else -1
  )


def programs(platform: str) -> list[tuple[str, ...]]:
  """(kernel, phase, shape) of all cases, on TPUs with each chip."""
  found = [((c.kernel, c.phase, c.shape), c) for c in cases(platform).values()]
  if platform == "gpu":
    return [name for name, _ in found]
  return [(*name, chip) for name, case in found for chip in CHIPS if case.on(chip)]


def _mib(n) -> str:
  return "-" if n == "" else f"{n / 2**20:.1f}"


def _moved(row: dict) -> tuple[str, str]:
  """What a row's kernels and the rest of its program move; where they are all of it, how often the ideal that is."""
  if not row["bytes"]:
    return "-", "-"
  moved = row["bytes"] + row["around_bytes"]
  whole = row["call"] == "all" or row["phase"] != "forward_backward"
  return _mib(moved), f"{moved / row['ideal_bytes']:.2f}" if whole else "-"


def refused(row: dict) -> bool:
  """Whether the kernel said that it cannot serve the call on this chip, which is no failure."""
  return row["error"].startswith("NotImplementedError")


def _program(row: dict) -> str:
  """A program and, where it has several, which of its kernels."""
  call = row["call"].removeprefix(row["kernel"]).lstrip("_")
  text = row["phase"].replace("forward_backward", "both").replace("_", " ")
  return text if call in ("", row["phase"]) else f"{text}: {call}"


def print_table(rows: list[dict]) -> None:
  """The table as text, a block for each family of kernels."""
  from rich.console import Console
  from rich.table import Table

  console = Console()
  if not console.is_terminal:
    console = Console(width=170)  # a file takes the table whole
  for kernel, unit in dict.fromkeys((row["kernel"], row["unit"]) for row in rows):
    table = Table(title=f"{kernel}: {unit}, in cycles of one core", title_justify="left")
    for name in ("program", "shape", "chip"):
      table.add_column(name, no_wrap=True)
    names = ["a step", "bundles", "cycles", "HBM", "MXU", "x floor", "busiest"]
    for name in (*names, "VMEM MiB", "spilled MiB", "temp MiB", "moved MiB", "x bytes"):
      table.add_column(name, justify="right")
    for row in (r for r in rows if r["kernel"] == kernel):
      head = _program(row)
      if row["error"]:
        table.add_row(
          head,
          row["shape"],
          row["chip"],
          "refused" if refused(row) else "[red]error[/]",
          *[""] * 11,
        )
        continue
      figures = [row["bundles_per_step"], row["bundles_per_unit"], row["cycles_per_unit"]]
      figures += [row["hbm_floor_per_unit"], row["matmul_floor_per_unit"]]
      texts = ["-" if x == "" else f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in figures]
      texts[1] += "*" if row["loops"] else ""
      texts.append(f"{row['times_floor']:.2f}" if row["times_floor"] else "-")
      texts.append(row["busiest"] or "-")
      sizes = [_mib(row[s]) for s in ("vmem_bytes", "spilled_bytes", "temp_bytes")]
      table.add_row(head, row["shape"], row["chip"], *texts, *sizes, *_moved(row))
    console.print(table)

  if any(row["loops"] for row in rows):
    print("* a loop inside the kernel counted once")
  for row in rows:
    if row["error"]:
      print(f"{row['kernel']}/{row['phase']}/{row['shape']} on {row['chip']}: {row['error']}")


def plot(rows: list[dict], path: pathlib.Path) -> None:
  """Bundles a unit of each program and chip, over the larger floor."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  # The forward kernel of a program that also has the backward one is told nearly twice otherwise.
  rows = [r for r in rows if not r["error"] and _program(r) not in ("both: forward", "both: all")]
  names = [f"{r['kernel'].replace('_', ' ')}, {r['shape']}, {_program(r)}" for r in rows]
  labels = list(dict.fromkeys(names))
  fig, axis = plt.subplots(figsize=(10, 1.5 + 0.25 * len(labels)), layout="constrained")
  for i, chip in enumerate(CHIPS):
    mine = [(r, name) for r, name in zip(rows, names, strict=True) if r["chip"] == chip]
    if not mine:
      continue
    y = [labels.index(name) + 0.15 * (i - 2) for _, name in mine]
    floors = [max(r["hbm_floor_per_unit"], r["matmul_floor_per_unit"]) for r, _ in mine]
    bundles = [r["bundles_per_unit"] for r, _ in mine]
    axis.hlines(y, floors, bundles, color=f"C{i}", linewidth=0.8, alpha=0.5)
    axis.plot(bundles, y, "o", color=f"C{i}", markersize=3.5, label=chip)
    axis.plot(floors, y, "|", color=f"C{i}", markersize=6)
  axis.set(xscale="log", xlabel="cycles a unit of work: bundles (dot) and floor (tick)")
  axis.set_yticks(range(len(labels)), labels, fontsize=7)
  axis.set_ylim(len(labels) - 0.4, -0.6)
  axis.grid(axis="x", alpha=0.3)
  fig.legend(ncols=5, fontsize=8, loc="outside upper right")
  fig.savefig(path, dpi=130)


BEGIN, END = "<!-- cost: begin -->", "<!-- cost: end -->"


def markdown(rows: list[dict]) -> str:
  """Bundles a unit of work, and how often the floor that is, in short."""
  whole = {}
  for row in rows:  # the sum of a program's kernels comes last
    whole[row["kernel"], row["phase"], row["shape"], row["chip"]] = row

  def cell(kernel, phase, shape, chip):
    row = whole.get((kernel, phase, shape, chip))
    if not row or row["error"]:
      return "-"
    return f"{row['bundles_per_unit']:.0f} ({row['times_floor']:.1f})"

  head = [f"{phase}, {chip}" for chip in ("v5e", "v6e") for phase in ("forward", "+ backward")]
  lines = [
    "| " + " | ".join(["", *head, "decode step, v6e"]) + " |",
    "|---" * (len(head) + 2) + "|",
  ]
  for name in dict.fromkeys((row["kernel"], row["shape"]) for row in rows):
    kernel, shape = name
    if kernel == "linear_recurrence_step":
      continue
    cells = [
      cell(kernel, phase, shape, chip)
      for chip in ("v5e", "v6e")
      for phase in ("forward", "forward_backward")
    ]
    cells.append(cell(f"{kernel}_step", "float32_state", shape, "v6e"))
    label = shape if kernel == "linear_recurrence" else f"{kernel}, {shape}"
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def with_table(text: str, rows: list[dict]) -> str:
  """A document with the table between its two marks made anew."""
  before, rest = text.split(BEGIN)
  after = rest.split(END)[1]
  return f"{before}{BEGIN}\n{markdown(rows)}\n{END}{after}"
