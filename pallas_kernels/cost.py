"""What the kernels cost on TPUs that are not there: compiled by the real TPU compiler, on any Linux machine.

    python -m pallas_kernels.cost                                        every kernel, shape and chip
    python -m pallas_kernels.cost --chips v6e --kernels linear_recurrence --shapes kimi_linear,mamba2
    python -m pallas_kernels.cost --chips v6e,v5e --cycles               the compiler's own estimate too; slower
    python -m pallas_kernels.cost --out benchmarks/records               also tpu_cost.csv and tpu_cost.png
    python -m pallas_kernels.cost --spec my_module:my_function           any function that returns (fn, arguments)

libtpu, a package, compiles for a described chip with no chip there (pip install "jax[tpu]"). A row is one
pallas_call of one program on one chip:

- bundles: VLIW instructions of the final schedule, a cycle each at the least; a grid step, and a unit of work
  (128 tokens of a head, for the recurrence). The same on every machine.
- cycles: the compiler's own static estimate, with its stalls, where it survives making one.
- HBM, MXU: the floors, in cycles. Bytes of the pallas_call's operands and results over the bandwidth; FLOPs of
  the kernel's matmuls, once for bfloat16 and as often as the precision asks for float32, over the peak.
- x floor: bundles over the larger floor. busiest: the unit with the fewest idle slots, and the part it works.
- VMEM: what the kernel allocates, of it for spilled registers. temp: HBM that the whole program allocates beside
  its arguments and results. around: what XLA's own instructions, before and between the kernels, write to HBM.

Everything is of one TensorCore, which has half of the bandwidth of a v4, v5p and 7x chip.

Limits. Waits for memory and stalls of the matrix units are no bundles. Both sides of a pl.when count. A loop inside the
kernel counts as often as it runs where its trip count is known and the compiler kept it as one loop; elsewhere it
counts once, which the row says ("once").
"""

import argparse
import collections
import concurrent.futures
import csv
import dataclasses
import functools
import glob
import importlib
import importlib.util
import io
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_recurrence import linear_recurrence, linear_recurrence_step
from pallas_kernels.linear_recurrence.shapes import SHAPES, inputs
from pallas_kernels.short_conv import short_conv

INSTALL = f'pip install "jax[tpu]=={jax.__version__}"'


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TensorCore of a TPU, by data sheet.

  Attributes:
    topology: the name that libtpu knows.
    clock: GHz. 7x: what its peak at v6e's FLOPs a cycle comes to; no source gives it.
    bandwidth: GB/s of HBM, of one core.
    flops: bfloat16 multiplications and additions a cycle.
  """

  topology: str
  clock: float
  bandwidth: float
  flops: int


CHIPS = {
  "v4": Chip("v4:2x2x1", 1.05, 1228 / 2, 131072),
  "v5e": Chip("v5e:2x2", 1.5, 819, 131072),
  "v5p": Chip("v5p:2x2x1", 1.75, 2765 / 2, 131072),
  "v6e": Chip("v6e:2x2", 1.75, 1640, 524288),
  "7x": Chip("tpu7x:2x2x1", 2.2, 7380 / 2, 524288),
}

# For the processes that compile, and for them alone: do not ask for a TPU's metadata, let several processes load
# libtpu and leave no lock behind, and run what runs on the CPU.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_PLATFORMS": "cpu",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One program to compile.

  Attributes:
    kernel, phase, shape: its name, in three parts.
    unit: the work that costs are told for, in words.
    units: how many of them the program does.
    build: returns the function and its arguments, which may be ShapeDtypeStructs.
    donate: positions of the arguments that the results may overwrite.
  """

  kernel: str
  phase: str
  shape: str
  unit: str
  units: float
  build: Callable[[], tuple[Callable, tuple]]
  donate: tuple[int, ...] = ()

  @property
  def name(self) -> str:
    return f"{self.kernel}/{self.phase}/{self.shape}"


def _projected(tree):
  """[B, T, heads, D] as a projection gives it, [B, T, heads D]: tiled otherwise, one is a copy of the other."""
  return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x, tree)


def _recurrence_cases() -> Iterator[Case]:
  def build(shape, phase):
    r = jax.eval_shape(lambda: inputs(shape, dtype=jnp.bfloat16))

    def forward(projected):
      own = jax.tree.map(lambda x, like: x.reshape(like.shape), projected, r)
      return _projected(linear_recurrence(own, backend="tpu")[0])

    def both(projected, do):
      o, vjp = jax.vjp(forward, projected)
      return o, vjp(do)

    arguments = jax.eval_shape(_projected, r)
    return (forward, (arguments,)) if phase == "forward" else (both, (arguments, arguments.v))

  for name, shape in SHAPES.items():
    if name.startswith("cpu_"):
      continue
    units = shape.batch * shape.value_heads * shape.length / 128
    for phase in ("forward", "forward_backward"):
      run = functools.partial(build, shape, phase)
      yield Case("linear_recurrence", phase, name, "128 tokens x head", units, run)


def _step_cases() -> Iterator[Case]:
  B = 64

  def build(shape, dtype):
    r = jax.eval_shape(lambda: inputs(shape, batch=B, length=1, dtype=jnp.bfloat16))
    state = jax.ShapeDtypeStruct((B, r.v.shape[2], r.k.shape[3], r.v.shape[3]), dtype)
    return functools.partial(linear_recurrence_step, backend="tpu"), (r, state)

  for name, shape in SHAPES.items():
    if name.startswith("cpu_"):
      continue
    for dtype in ("float32", "bfloat16"):
      run = functools.partial(build, shape, jnp.dtype(dtype))
      units = B * shape.value_heads
      phase = f"{dtype}_state"
      yield Case("linear_recurrence_step", phase, name, "1 token x head", units, run, (1,))


# Channels of the short convolutions, with 4 taps: Qwen3-Next's over q, k and v at once, and Mamba-2 2.7B's over
# x, B and C.
_CONVOLUTIONS = {"qwen3_next": 8192, "mamba2": 5376}


def _short_conv_cases() -> Iterator[Case]:
  T = 8192

  def build(D, phase, packed):
    def array(*shape, dtype=jnp.bfloat16):
      return jax.ShapeDtypeStruct(shape, dtype)

    x, weight = array(1, T, D), array(4, D, dtype=jnp.float32)
    ids = array(1, T, dtype=jnp.int32) if packed else None

    def forward(x, weight, ids):
      return short_conv(x, weight, segment_ids=ids, backend="tpu")[0]

    def both(x, weight, ids, dy):
      y, vjp = jax.vjp(lambda *a: forward(*a, ids), x, weight)
      return y, vjp(dy)

    return (forward, (x, weight, ids)) if phase == "forward" else (both, (x, weight, ids, x))

  for name, D in _CONVOLUTIONS.items():
    for packed in (False, True):
      for phase in ("forward", "forward_backward"):
        shape = name + "_packed" * packed
        run = functools.partial(build, D, phase, packed)
        unit = "128 tokens x 128 channels"
        yield Case("short_conv", phase, shape, unit, T * D / 128**2, run)


def _spec_case(spec: str) -> Case:
  """The case of "module:function"."""
  module, function = spec.split(":")
  sys.path.insert(0, os.getcwd())
  build = getattr(importlib.import_module(module), function)
  return Case(module, function, "-", "call", 1, build)


def cases() -> dict[str, Case]:
  """All cases by name. To add a kernel, add a function that yields its cases."""
  return {
    case.name: case
    for make in (_recurrence_cases, _step_cases, _short_conv_cases)
    for case in make()
  }


# --- what the kernel is asked to do, from its jaxpr ---


def _subjaxprs(value) -> Iterator[Any]:
  for x in value if isinstance(value, tuple | list) else (value,):
    if hasattr(x, "jaxpr"):
      yield x.jaxpr
    elif hasattr(x, "eqns"):
      yield x


def pallas_calls(jaxpr) -> list:
  """The pallas_call equations of a jaxpr, in order, whatever they are nested in."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      found.append(eqn)
    else:
      for value in eqn.params.values():
        for sub in _subjaxprs(value):
          found += pallas_calls(sub)
  return found


def _passes(eqn) -> int:
  """How often the matrix unit, whose numbers are bfloat16, goes over a dot_general."""
  if all(v.aval.dtype.itemsize <= 2 for v in eqn.invars):
    return 1
  precision = str(eqn.params["precision"])
  return (
    6
    if "HIGHEST" in precision or "X6" in precision
    else 3
    if "HIGH" in precision or "X3" in precision
    else 1
  )


def matmul_flops(jaxpr) -> int:
  """FLOPs of the matmuls of a kernel's body, times the passes; loops as often as they run, the dearer branch."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      k = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
      total += 2 * k * math.prod(eqn.outvars[0].aval.shape) * _passes(eqn)
      continue
    inner = [matmul_flops(j) for value in eqn.params.values() for j in _subjaxprs(value)]
    if inner:
      branches = eqn.primitive.name == "cond"
      total += eqn.params.get("length", 1) * (max(inner) if branches else sum(inner))
  return total


def trip_counts(jaxpr, outer: int = 1) -> list[tuple[int, int | None]]:
  """(depth, how often the body runs in all) of the loops of a kernel's body, in order; None where unknown."""

  def walk(jaxpr, depth, runs):
    for eqn in jaxpr.eqns:
      name, inner = eqn.primitive.name, (depth, runs)
      if name == "scan":
        trips = eqn.params["length"] // max(int(eqn.params["unroll"]), 1)
        if trips > 1:
          inner = depth + 1, None if runs is None else runs * trips
          yield inner
      elif name == "while":
        inner = depth + 1, None
        yield inner
      for value in eqn.params.values():
        for sub in _subjaxprs(value):
          yield from walk(sub, *inner)

  return list(walk(jaxpr, 1, outer))


def _nbytes(atom) -> int:
  aval = atom.aval
  return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def describe(eqn) -> dict:
  """Grid steps, HBM bytes and FLOPs of a pallas_call equation, all of the whole call."""
  steps = math.prod(int(n) for n in eqn.params["grid_mapping"].grid) or 1
  body = eqn.params["jaxpr"]
  return {
    "call": eqn.params["name"] or "kernel",
    "grid_steps": steps,
    "bytes": sum(map(_nbytes, [*eqn.invars, *eqn.outvars])),
    "flops": steps * matmul_flops(body),
    "trips": trip_counts(body),
  }


# --- what the compiler made of it, from its dump ---

# A line of a schedule: an address, perhaps a label (LB: the first bundle of a loop), a ">" for each loop around it.
_BUNDLE = re.compile(
  r"\s*(?:0x)?[0-9a-f]+\s*(?:(LH|LB|LE|PB|PF|CT)\s*)?:\s*((?:>\s*)*)\{(\})?", re.ASCII
)
_UNITS = "final_hlo-static-per-bundle-utilization"
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


def _dumped(folder: str, kind: str) -> dict[str, str]:
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
  schedules, allocations = _dumped(folder, "final_bundles"), _dumped(folder, "post-delay-converter")
  units = _dumped(folder, _UNITS)
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


# --- the process that compiles ---


def _around(hlo: str) -> int:
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


def compile_case(case: Case, topology: str, dump: str | None = None) -> list[dict]:
  """Compiles for one device of a topology; a row for each pallas_call. In a process with ``environment`` set."""
  from jax.experimental import topologies
  from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  sharding = SingleDeviceSharding(devices[0])
  fn, args = case.build()
  args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
  # Kernels that ask what chip they are for are told by the mesh.
  with use_abstract_mesh(Mesh(np.array(devices[:1]), ("x",)).abstract_mesh):
    traced = jax.jit(fn, donate_argnums=case.donate).trace(*args)
    calls = [describe(eqn) for eqn in pallas_calls(traced.jaxpr.jaxpr)]
    if dump:
      # What the parent needs should the compiler end this process.
      pathlib.Path(dump, "calls.json").write_text(json.dumps(calls))
    compiled = traced.lower().compile()
  hlo = compiled.as_text()
  kernels = re.findall(r"%([\w.\-]+) = [^\n]*tpu_custom_call", hlo)
  rows = read_dump(dump, calls, kernels) if dump else calls
  memory = compiled.memory_analysis()
  for row in rows:
    row["temp"] = memory.temp_size_in_bytes
    row["around"] = _around(hlo)
  return rows


def _serve(chip: str, names: list[str], dump: str) -> None:
  """The child: compiles the cases one after the other, a line of JSON on stdout for each."""
  known = cases()
  for name in names:
    for path in glob.glob(f"{dump}/*"):
      os.remove(path)
    try:
      case = known[name] if name in known else _spec_case(name)
      answer = {"rows": compile_case(case, CHIPS[chip].topology, dump)}
    except Exception as error:
      text = str(error).strip() or type(error).__name__
      answer = {"error": f"{type(error).__name__}: {text.splitlines()[0]}"}
    print("RESULT " + json.dumps({"name": name} | answer), flush=True)


# --- the process that asks ---


def environment(dump: str | None = None, cycles: bool = False) -> dict[str, str]:
  """The environment of a process that compiles for TPUs, writing the compiler's dumps to a folder."""
  root = str(pathlib.Path(__file__).resolve().parent.parent)
  env = os.environ | ENVIRONMENT
  env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
  if dump:
    passes = f"final_bundles|post-delay-converter|{_UNITS}"
    flags = [
      f"--xla_jf_dump_to={dump}",
      "--xla_jf_dump_llo_text=true",
      f"--xla_jf_dump_llo_pass_label_regex=.*({passes}).*",
    ]
    if cycles:
      flags.append(f"--xla_jf_dump_static_llo_profile_to={dump}")
    env["LIBTPU_INIT_ARGS"] = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags])
  return env


def _last_words(stderr: str, code: int) -> str:
  """One line of what a process said before it died."""
  how = f"the compiler ended with {signal.Signals(-code).name if code < 0 else f'exit {code}'}"
  hits = re.findall(r"(?:Check failed|RET_CHECK failure|INTERNAL:|F\d{4} [\d:.]+ +\d+ ).*", stderr)
  lines = hits or [
    line
    for line in stderr.splitlines()
    if line.strip() and not re.search("TPU_ACCELERATOR_TYPE|symbolize", line)
  ]
  return f"{how}: {lines[0].strip()[:200]}" if lines else how


def measure(
  chip: str, names: list[str], *, cycles: bool = False, timeout: float = 900
) -> Iterator[tuple[str, dict]]:
  """Compiles cases for a chip, in child processes; yields (name, {"rows": ...} or {"error": ...}) for each.

  A case that ends its process costs that process: the others go on in another. If it dies of the estimate of
  cycles, it is compiled without.

  Args:
    chip: of CHIPS.
    names: of ``cases``, or "module:function".
    cycles: whether to ask for estimated cycles.
    timeout: seconds for one case.
  """
  left = list(names)
  estimate, kept = cycles, {}
  while left:
    with tempfile.TemporaryDirectory() as dump, tempfile.TemporaryFile("w+") as stderr:
      batch = left[:1] if cycles and not estimate else list(left)
      command = [sys.executable, "-m", "pallas_kernels.cost", "--child", chip, dump, *batch]
      env = environment(dump, estimate)
      child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
      done, clock = 0, _killed_after(timeout, child)
      try:
        for line in child.stdout:
          if not line.startswith("RESULT "):
            continue
          clock.cancel()
          clock = _killed_after(timeout, child)
          answer = json.loads(line[len("RESULT ") :])
          name = answer.pop("name")
          for row, estimated in zip(answer.get("rows", []), kept.pop(name, []), strict=False):
            row["cycles"] = estimated
          left.remove(name)
          done += 1
          yield name, answer
        child.wait()
      finally:  # also where the caller wants no more
        clock.cancel()
        child.kill()
      if done == len(batch):
        estimate = cycles
        continue
      stderr.seek(0)
      name, words = left[0], _last_words(stderr.read(), child.returncode)
      if estimate:
        # The profile is made last: its figures are there, and the rest comes from a compilation without it.
        kept[name] = _cycles_of_the_dead(dump)
        estimate = False
        continue
      left.pop(0)
      estimate = cycles
      yield name, {"error": words}


def _killed_after(seconds: float, child: subprocess.Popen) -> threading.Timer:
  timer = threading.Timer(seconds, child.kill)
  timer.daemon = True
  timer.start()
  return timer


def _cycles_of_the_dead(dump: str) -> list[int | None]:
  path = pathlib.Path(dump, "calls.json")
  if not path.exists():
    return []
  calls = json.loads(path.read_text())
  kernels = [k for k in sorted(_dumped(dump, "final_bundles")) if k != "TLP" and k[0] != "<"]
  return [row.get("cycles") for row in read_dump(dump, calls, kernels)]


# --- tables ---

COLUMNS = (
  "kernel", "phase", "shape", "chip", "call", "unit", "grid_steps", "bundles_per_step", "bundles_per_unit",
  "cycles_per_unit", "hbm_floor_per_unit", "matmul_floor_per_unit", "times_floor", "busiest", "vmem_bytes",
  "spilled_bytes", "temp_bytes", "around_bytes", "loops", "error",
)  # fmt: skip


def records(case: Case, chip: str, answer: dict) -> list[dict]:
  """Rows of the table, with ``COLUMNS``: one for each pallas_call, and their sum where there are several."""
  base = dict.fromkeys(COLUMNS, "")
  base |= dict(kernel=case.kernel, phase=case.phase, shape=case.shape, chip=chip, unit=case.unit)
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
    out.append(finish(row, bundles, call["cycles"], hbm, matmul))
    sums.update(bundles=bundles, cycles=call["cycles"] or 0, hbm=hbm, matmul=matmul)
  if len(out) > 1 and not any(row["error"] for row in out):
    total = base | {"call": "all", "loops": "once" if any(row["loops"] for row in out) else ""}
    total |= {k: out[0][k] for k in ("temp_bytes", "around_bytes")}
    cycles = sums["cycles"] if estimated else 0
    out.append(finish(total, sums["bundles"], cycles, sums["hbm"], sums["matmul"]))
  return out


def to_csv(rows: list[dict]) -> str:
  """The table as CSV."""
  text = io.StringIO()
  writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _mib(n) -> str:
  return "-" if n == "" else f"{n / 2**20:.1f}"


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
    for name in (*names, "VMEM MiB", "spilled MiB", "temp MiB", "around MiB"):
      table.add_column(name, justify="right")
    for row in (r for r in rows if r["kernel"] == kernel):
      head = row["phase"].replace("forward_backward", "both")
      call = row["call"].removeprefix(row["kernel"]).lstrip("_")
      head += f": {call}" if call not in ("", row["phase"]) else ""
      if row["error"]:
        table.add_row(head, row["shape"], row["chip"], "[red]error[/]", *[""] * 10)
        continue
      figures = [row["bundles_per_step"], row["bundles_per_unit"], row["cycles_per_unit"]]
      figures += [row["hbm_floor_per_unit"], row["matmul_floor_per_unit"]]
      texts = ["-" if x == "" else f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in figures]
      texts[1] += "*" if row["loops"] else ""
      texts.append(f"{row['times_floor']:.2f}" if row["times_floor"] else "-")
      texts.append(row["busiest"] or "-")
      sizes = ("vmem_bytes", "spilled_bytes", "temp_bytes", "around_bytes")
      table.add_row(head, row["shape"], row["chip"], *texts, *(_mib(row[s]) for s in sizes))
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

  rows = [r for r in rows if not r["error"] and r["call"] != "all"]
  labels = list(dict.fromkeys(f"{r['kernel']}\n{r['shape']}: {r['call']}" for r in rows))
  fig, axis = plt.subplots(figsize=(10, 1.5 + 0.32 * len(labels)), layout="constrained")
  for i, chip in enumerate(dict.fromkeys(r["chip"] for r in rows)):
    mine = [r for r in rows if r["chip"] == chip]
    y = [labels.index(f"{r['kernel']}\n{r['shape']}: {r['call']}") + 0.12 * (i - 2) for r in mine]
    floors = [max(r["hbm_floor_per_unit"], r["matmul_floor_per_unit"]) for r in mine]
    axis.plot(
      [r["bundles_per_unit"] for r in mine], y, "o", color=f"C{i}", markersize=4, label=chip
    )
    axis.plot(floors, y, "|", color=f"C{i}", markersize=7)
  axis.set(xscale="log", xlabel="cycles a unit of work: bundles (dot) and floor (tick)")
  axis.set_yticks(range(len(labels)), [label.replace("\n", " ") for label in labels], fontsize=7)
  axis.invert_yaxis()
  axis.grid(axis="x", alpha=0.3)
  axis.legend(ncols=5, fontsize=8)
  fig.savefig(path, dpi=130)


# --- the command ---


def _progress(done: int, total: int, label: str, start: float) -> None:
  left = (time.monotonic() - start) / done * (total - done)
  text = f"cost: {done}/{total} {label}, about {left / 60:.0f} min {left % 60:02.0f} s left"
  if sys.stderr.isatty():
    print(f"\r{text:<100}", end="\n" if done == total else "", file=sys.stderr, flush=True)
  else:
    print(text, file=sys.stderr, flush=True)


def survey(chips: list[str], names: list[str], cycles: bool, jobs: int) -> list[dict]:
  """The table's rows for these chips and cases, ``jobs`` chips at a time, with a progress line."""
  known = cases()
  found: dict[tuple[str, str], list[dict]] = {}
  start = time.monotonic()

  def work(chip):
    for name, answer in measure(chip, names, cycles=cycles):
      case = known.get(name) or dataclasses.replace(_PLAIN, shape=name)
      found[chip, name] = records(case, chip, answer)
      _progress(len(found), len(chips) * len(names), f"{chip} {name}", start)

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    list(pool.map(work, chips))
  return [row for name in names for chip in chips for row in found[chip, name]]


# What is said of a function that is no case: the costs of one call.
_PLAIN = Case("-", "-", "-", "a call", 1, lambda: None)


def _chosen(p, what: str, given: str | None, known: list[str]) -> list[str]:
  names = given.split(",") if given else known
  if wrong := [n for n in names if n not in known]:
    p.error(f"unknown {what} {', '.join(wrong)}; known: {', '.join(known)}")
  return names


def main(argv: list[str] | None = None) -> None:
  argv = sys.argv[1:] if argv is None else argv
  if argv[:1] == ["--child"]:
    return _serve(argv[1], argv[3:], argv[2])
  known = cases()
  p = argparse.ArgumentParser(
    prog="python -m pallas_kernels.cost",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  kernels, phases, shapes = (
    list(dict.fromkeys(getattr(c, f) for c in known.values())) for f in ("kernel", "phase", "shape")
  )
  p.add_argument("--chips", help=f"of: {', '.join(CHIPS)}")
  p.add_argument("--kernels", help=f"of: {', '.join(kernels)}")
  p.add_argument("--phases", help=f"of: {', '.join(phases)}")
  p.add_argument("--shapes", help=f"of: {', '.join(shapes)}")
  p.add_argument("--spec", help="MODULE:FUNCTION,... instead: each returns (function, arguments)")
  p.add_argument(
    "--cycles", action="store_true", help="the compiler's estimate; minutes on v5e, v5p"
  )
  p.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="chips compiled for at a time")
  p.add_argument("--out", type=pathlib.Path, help="directory for tpu_cost.csv and tpu_cost.png")
  a = p.parse_args(argv)
  if importlib.util.find_spec("libtpu") is None:
    sys.exit(f"cost: the TPU compiler, libtpu, is not installed (Linux only): {INSTALL}")
  chips = _chosen(p, "chip", a.chips, list(CHIPS))
  chosen = [
    (_chosen(p, what, given, all_of))
    for what, given, all_of in (
      ("kernel", a.kernels, kernels),
      ("phase", a.phases, phases),
      ("shape", a.shapes, shapes),
    )
  ]
  names = [
    c.name
    for c in known.values()
    if c.kernel in chosen[0] and c.phase in chosen[1] and c.shape in chosen[2]
  ]
  names = a.spec.split(",") if a.spec else names
  if not names:
    p.error("no kernel has these phases and shapes")
  rows = survey(chips, names, a.cycles, a.jobs)
  print_table(rows)
  if a.out:
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "tpu_cost.csv").write_text(to_csv(rows))
    plot(rows, a.out / "tpu_cost.png")
    print(f"wrote {a.out / 'tpu_cost.csv'} and {a.out / 'tpu_cost.png'}")
  if any(row["error"] for row in rows):
    sys.exit(1)


if __name__ == "__main__":
  main()
