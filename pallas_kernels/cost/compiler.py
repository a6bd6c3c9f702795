"""The compiler in processes of its own: a check of its own that fails ends the process."""

import glob
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

import jax
import numpy as np

from pallas_kernels.cost import child
from pallas_kernels.cost import dump as dumps
from pallas_kernels.cost.cases import Case, case_of
from pallas_kernels.cost.chips import CHIPS
from pallas_kernels.cost.kernels import describe, pallas_calls, repeats

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
    eqns, trips = pallas_calls(traced.jaxpr.jaxpr), case.trips()
    calls = [
      describe(eqn, times, trips.get(eqn.params["name"]))
      for eqn, times in zip(eqns, repeats(traced.jaxpr.jaxpr), strict=True)
    ]
    if dump:
      # What the parent needs should the compiler end this process.
      pathlib.Path(dump, "calls.json").write_text(json.dumps(calls))
    compiled = traced.lower().compile()
  hlo = compiled.as_text()
  kernels = re.findall(r"%([\w.\-]+) = [^\n]*tpu_custom_call", hlo)
  rows = dumps.read_dump(dump, calls, kernels) if dump else calls
  memory = compiled.memory_analysis()
  ideal = sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((args, traced.out_info))
  )
  for row in rows:
    row["ideal"] = ideal
    row["temp"] = memory.temp_size_in_bytes
    row["around"] = dumps.around(hlo)
  return rows


def serve(chip: str, names: list[str], dump: str) -> None:
  """The child: compiles the cases one after the other."""

  def compile_one(name):
    for path in glob.glob(f"{dump}/*"):
      os.remove(path)
    return compile_case(case_of(name), CHIPS[chip].topology, dump)

  child.serve(names, compile_one)


# --- the process that asks ---


def environment(dump: str | None = None, cycles: bool = False) -> dict[str, str]:
  """The environment of a process that compiles for TPUs, writing the compiler's dumps to a folder."""
  env = child.environment(ENVIRONMENT)
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
    batch, count = left[: 1 if cycles else _BATCH], len(left)
    with (
      tempfile.TemporaryDirectory() as dump,
      child.Child([chip, dump, *batch], environment(dump, estimate), timeout) as process,
    ):
      for name, answer in process.answers():
        for row, estimated in zip(answer.get("rows", []), kept.pop(name, []), strict=False):
          row["cycles"] = estimated
        left.remove(name)
        yield name, answer
      if len(left) == count - len(batch):
        estimate = cycles
        continue
      name, words = left[0], process.last_words()
      if estimate:
        # The profile is made last: its figures are there, and the rest comes from a compilation without it.
        kept[name] = _cycles_of_the_dead(dump)
        estimate = False
        continue
      left.pop(0)
      estimate = cycles
      yield name, {"error": words}


def _cycles_of_the_dead(dump: str) -> list[int | None]:
  path = pathlib.Path(dump, "calls.json")
  if not path.exists():
    return []
  calls = json.loads(path.read_text())
  kernels = [k for k in sorted(dumps.dumped(dump, "final_bundles")) if k != "TLP" and k[0] != "<"]
  return [row.get("cycles") for row in dumps.read_dump(dump, calls, kernels)]
