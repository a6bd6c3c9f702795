"""The compiler in processes of its own: a check of its own that fails ends the process."""

import glob
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

import jax
import numpy as np

from pallas_kernels.cost import dump as dumps
from pallas_kernels.cost.cases import Case, case_of
from pallas_kernels.cost.chips import CHIPS
from pallas_kernels.cost.kernels import describe, pallas_calls

# For the processes that compile, and for them alone: do not ask for a TPU's metadata, let several processes load
# libtpu and leave no lock behind, and run what runs on the CPU.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_PLATFORMS": "cpu",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


# Cases that a process compiles: it starts in a second or two, but gives no memory back; estimates take gigabytes.
_BATCH = 8


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
  rows = dumps.read_dump(dump, calls, kernels) if dump else calls
  memory = compiled.memory_analysis()
  for row in rows:
    row["temp"] = memory.temp_size_in_bytes
    row["around"] = dumps.around(hlo)
  return rows


def serve(chip: str, names: list[str], dump: str) -> None:
  """The child: compiles the cases one after the other, a line of JSON on stdout for each."""
  for name in names:
    for path in glob.glob(f"{dump}/*"):
      os.remove(path)
    try:
      answer = {"rows": compile_case(case_of(name), CHIPS[chip].topology, dump)}
    except Exception as error:
      text = str(error).strip() or type(error).__name__
      answer = {"error": f"{type(error).__name__}: {text.splitlines()[0]}"}
    print("RESULT " + json.dumps({"name": name} | answer), flush=True)


# --- the process that asks ---


def environment(dump: str | None = None, cycles: bool = False) -> dict[str, str]:
  """The environment of a process that compiles for TPUs, writing the compiler's dumps to a folder."""
  root = str(pathlib.Path(__file__).resolve().parents[2])
  env = os.environ | ENVIRONMENT
  env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
  if dump:
    passes = f"final_bundles|post-delay-converter|{dumps.UNITS}"
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
    names: as ``case_of`` takes them.
    cycles: whether to ask for estimated cycles.
    timeout: seconds for one case.
  """
  left = list(names)
  estimate, kept = cycles, {}
  while left:
    with tempfile.TemporaryDirectory() as dump, tempfile.TemporaryFile("w+") as stderr:
      batch = left[: 1 if cycles else _BATCH]
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
  kernels = [k for k in sorted(dumps.dumped(dump, "final_bundles")) if k != "TLP" and k[0] != "<"]
  return [row.get("cycles") for row in dumps.read_dump(dump, calls, kernels)]
