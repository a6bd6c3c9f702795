"""What kernels take on a GPU, as a table and CSV."""

import jax

from pallas_kernels.cost.cases import case_of
from pallas_kernels.cost.report import refused, version

COLUMNS = (
  "kernel", "phase", "shape", "call", "registers", "spilled_bytes", "shared_bytes", "kernel_bytes", "temp_bytes",
  "jax", "ptxas", "error",
)  # fmt: skip


def records(name: str, answer: dict) -> list[dict]:
  """Rows of the table, with ``COLUMNS``: one for each kernel.

  Args:
    name: of ``case_of``.
    answer: of ``gpu.measure``.
  """
  case = case_of(name, "gpu")
  base = dict.fromkeys(COLUMNS, "")
  base |= dict(kernel=case.kernel, phase=case.phase, shape=case.shape)
  base |= dict(jax=jax.__version__, ptxas=version("nvidia-cuda-nvcc"))
  if "error" in answer:
    return [base | {"error": answer["error"]}]
  rows = []
  for call in answer["rows"]:
    row = base | {"call": call["call"], "kernel_bytes": call["bytes"], "temp_bytes": call["temp"]}
    for name in ("registers", "spilled", "shared"):
      column = name if name == "registers" else f"{name}_bytes"
      row[column] = "" if call[name] is None else call[name]
    rows.append(row)
  return rows


def print_table(rows: list[dict]) -> None:
  """The table as text; what went wrong comes after it."""
  from rich.console import Console
  from rich.table import Table

  console = Console()
  if not console.is_terminal:
    console = Console(width=170)  # a file takes the table whole
  table = Table(title="H200 (sm_90a)", title_justify="left")
  for name in ("kernel", "phase", "shape", "call"):
    table.add_column(name, no_wrap=True)
  for name in ("registers", "spilled B", "shared KiB", "operands MiB", "temp MiB"):
    table.add_column(name, justify="right")
  for row in rows:
    head = [row[k] for k in ("kernel", "phase", "shape", "call")]
    if row["error"]:
      table.add_row(*head[:3], "refused" if refused(row) else "[red]error[/]")
      continue
    figures = [str(row[k]) if row[k] != "" else "-" for k in ("registers", "spilled_bytes")]
    for key, unit in (("shared_bytes", 10), ("kernel_bytes", 20), ("temp_bytes", 20)):
      figures.append("-" if row[key] == "" else f"{row[key] / 2**unit:.1f}")
    table.add_row(*head, *figures)
  console.print(table)
  for row in rows:
    if row["error"]:
      print(f"{row['kernel']}/{row['phase']}/{row['shape']}: {row['error']}")
