"""What the compiler made of a program, from the text that it dumps."""

import glob
import math
import os
import re

import jax.numpy as jnp
import numpy as np

# A line of a schedule: an address, perhaps a label (LB: the first bundle of a loop), a ">" for each loop around it.
_BUNDLE = re.compile(
  r"\s*(?:0x)?[0-9a-f]+\s*(?:(LH|LB|LE|PB|PF|CT)\s*)?:\s*((?:>\s*)*)\{(\})?", re.ASCII
)
UNITS = "final_hlo-static-per-bundle-utilization"
_VMEM = re.compile(
  r"#allocation(\S*) \[.*?space=vmem, size = 0x([0-9a-f]+), offset = (0x[0-9a-f]+|0)[,\]]"
)


def read_schedule(text: str, trips: list[tuple[int, int | None]]) -> dict:
  """Bundles of one grid step, and whether a loop within it was counted only once.

  Args:
    text: a final_bundles dump; depth 1 is one step of the pipeline over the grid.
    trips: of ``trip_counts``.
  """
  bundles: list[list[int]] = []  # [depth, count] of each loop, in order of its first bundle
  inside: dict[int, int] = {}  # depth -> the loop, of those that the bundle is in
  depth = straight = 0
  for line in text.splitlines():
    if not (m := _BUNDLE.match(line)):
      continue
    label, marks, empty = m.groups()
    # An empty bundle waits for a branch; it has no marks, and belongs to where the branch is.
    depth = depth if empty else marks.count(">")
    if not depth:
      straight += 1
      continue
    # Near its end a loop holds bundles of its surroundings: only a label begins another.
    if label == "LB" or depth not in inside:
      inside = {d: i for d, i in inside.items() if d < depth} | {depth: len(bundles)}
      bundles.append([depth, 0])
    bundles[inside[depth]][1] += 1
  step = sum(count for depth, count in bundles if depth == 1)
  inner = [(depth, count) for depth, count in bundles if depth > 1]
  known = [d for d, _ in inner] == [d for d, _ in trips] and all(n for _, n in trips)
  step += sum(
    count * (n if known else 1)
    for (_, count), (_, n) in zip(inner, trips if known else inner, strict=True)
  )
  return {"bundles": step or straight, "once": bool(inner) and not known}


def read_vmem(text: str) -> dict:
  """Bytes of VMEM up to the last allocation, and those for spilled registers."""
  top = spilled = 0
  for name, size, offset in _VMEM.findall(text):
    size = int(size, 16)
    top = max(top, int(offset, 16) + size)
    spilled += size if "spill" in name else 0
  return {"vmem": top, "spilled": spilled}


def read_units(text: str) -> dict:
  """The unit of the core that is used most, and in what part of the slots that it has in all bundles."""
  names, capacity, rows = None, None, []
  for line in text.splitlines():
    if line.startswith("MXU"):
      names = [n.strip() for n in line.split(",")]
    elif names and re.fullmatch(r"[\d\s]+", line):
      figures = [int(n) for n in line.split()]
      capacity, rows = (capacity, [*rows, figures]) if capacity else (figures, rows)
  if not rows:
    return {"busiest": ""}
  used = np.array(rows).mean(0) / capacity
  # Fills and spills share the slots of loads and stores.
  own = [i for i, n in enumerate(names) if ":" not in n]
  top = max(own, key=lambda i: used[i])
  return {"busiest": f"{names[top]} {used[top]:.2f}"}


def dumped(folder: str, kind: str) -> dict[str, str]:
  """Dumps of one kind by HLO name."""
  found = {}
  for path in glob.glob(f"{folder}/*-{kind}.txt"):
    name = re.fullmatch(rf"\d+-(.+?)-\d+-{kind}\.txt", os.path.basename(path))
    if name and "schedule-analysis" not in path:
      found[name.group(1)] = path
  return found


def _matched(calls: list[dict], kernels: list[str]) -> list[str | None]:
  """The kernel of each call: the first that is left whose name has the call's in it, or else any."""
  left, found = list(kernels), []
  for call in sorted(calls, key=lambda c: -len(c["call"])):
    name = next((k for k in left if call["call"] in k), left[0] if left else None)
    found.append((call, name))
    if name:
      left.remove(name)
  return [next(name for c, name in found if c is call) for call in calls]


def read_dump(folder: str, calls: list[dict], kernels: list[str]) -> list[dict]:
  """The calls with what the dump says of each.

  Args:
    calls: of ``describe``, in program order.
    kernels: HLO names of the TPU kernels, in program order. Equal kernels may be dumped once.
  """
  schedules, allocations = dumped(folder, "final_bundles"), dumped(folder, "post-delay-converter")
  units = dumped(folder, UNITS)
  profile = "".join(open(p).read() for p in glob.glob(f"{folder}/*static_llo_profile*"))
  cycles = dict(re.findall(r'hlo_op_name: "([^"]*)"\s+estimated_cycles: (\d+)', profile))
  names = _matched(calls, kernels)
  rows = []
  for call, name in zip(calls, names, strict=True):
    row = dict(call)
    trips = row.pop("trips")
    if name in schedules:
      row |= read_schedule(open(schedules[name], errors="replace").read(), trips)
      row |= read_vmem(open(allocations[name], errors="replace").read())
      row |= read_units(open(units[name], errors="replace").read()) if name in units else {}
      row["cycles"] = int(cycles[name]) if name in cycles else None
    rows.append(row)
  return rows


def around(hlo: str) -> int:
  """Bytes written to HBM by the instructions of the entry computation that are not TPU kernels."""
  total = 0
  for line in hlo[hlo.index("\nENTRY ") :].splitlines()[1:]:
    m = re.match(r"\s*(?:ROOT )?%[\w.\-]+ = (.*?) ([\w\-]+)\((.*)", line)
    if not m:
      continue
    shapes, op, rest = m.groups()
    free = op in ("parameter", "tuple", "get-tuple-element", "bitcast", "constant")
    # What ends in -start or -done moves arrays to VMEM, which is layout S(1), or says so again.
    if free or op.endswith(("-start", "-done")) or "tpu_custom_call" in rest:
      continue
    for kind, dims, layout in re.findall(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?", shapes):
      if kind in _DTYPES and "S(" not in layout:
        sizes = map(int, filter(None, dims.split(",")))
        total += math.prod(sizes) * jnp.dtype(_DTYPES[kind]).itemsize
  return total


_DTYPES = {
  "pred": "bool", "s8": "int8", "u8": "uint8", "s16": "int16", "u16": "uint16", "s32": "int32",
  "u32": "uint32", "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64",
}  # fmt: skip
