"""The kernels through the GPU compilers, for a Hopper GPU that is not there (sm_90a): registers, spills, memory.

XLA and Pallas's Mosaic GPU compile for a described device; ptxas, which they start, tells what a kernel takes.
"""

import glob
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

import jax

from pallas_kernels.cost import child
from pallas_kernels.cost.cases import Case, case_of
from pallas_kernels.cost.kernels import moved, pallas_calls

INSTALL = (
  f'pip install "jax-cuda13-plugin=={jax.__version__}" "jax-cuda13-pjrt=={jax.__version__}" '
  '"nvidia-cuda-nvcc==13.0.88" "nvidia-nvvm==13.0.88"'
)

# An H200 by its data sheet and the CUDA programming guide's table of compute capability 9.0; not read off a device.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
  l2_cache_size: 62914560
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
}
"""

# Programs that a process compiles.
_BATCH = 8


def missing() -> str | None:
  """What of the compilers is not installed, in words; None where everything is."""
  packages = [n for n in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13") if not _found(n)]
  ptxas = [pathlib.Path(p, "cu13/bin/ptxas") for p in _paths("nvidia")]
  ptxas += [pathlib.Path(os.environ.get("CUDA_ROOT", "/usr/local/cuda"), "bin/ptxas")]
  if not shutil.which("ptxas") and not any(p.exists() for p in ptxas):
    packages.append("ptxas")
  return (
    f"{', '.join(packages)} not installed (Linux on x86-64 only): {INSTALL}" if packages else None
  )


def _found(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    return False


def _paths(package: str) -> list[str]:
  spec = importlib.util.find_spec(package) if _found(package) else None
  return list(spec.submodule_search_locations or []) if spec else []


def device():
  """A device to compile for; in a process with ``environment``."""
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
  return topology.devices[0]


def compile_case(case: Case, dump: str) -> list[dict]:
  """Compiles a program; a row for each kernel, in a process with ``environment`` of the same dump.

  Where it has no kernel, XLA's own program is the row.
  """
  import numpy as np
  from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

  target = device()
  sharding = SingleDeviceSharding(target)
  fn, args = case.build()
  args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
  with use_abstract_mesh(Mesh(np.array([target]), ("x",)).abstract_mesh):
    traced = jax.jit(fn, donate_argnums=case.donate).trace(*args)
    calls = [moved(eqn) for eqn in pallas_calls(traced.jaxpr.jaxpr)]
    memory = traced.lower().compile().memory_analysis()
  reports = read_dump(dump)
  for call in calls:
    mine = reports.get(call["call"])
    if not mine:
      raise RuntimeError(f"ptxas reported nothing of {call['call']}; it reported {list(reports)}")
    # Equal kernels are compiled once.
    call |= mine.pop(0) if len(mine) > 1 else mine[0]
  size = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  rows = calls or [{"call": "", "bytes": size, "registers": None, "spilled": None, "shared": None}]
  return [row | {"temp": memory.temp_size_in_bytes} for row in rows]


def read_dump(folder: str) -> dict[str, list[dict]]:
  """Registers, spilled bytes and shared memory of the kernels of a dump, by name, in the order of compilation."""
  found: dict[str, list[dict]] = {}
  for path in sorted(glob.glob(f"{folder}/*.ptxas"), key=os.path.getmtime):
    resources = pathlib.Path(path).with_suffix(".resources.txt").read_text()
    for name, row in read_ptxas(pathlib.Path(path).read_text()):
      shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
      found.setdefault(name, []).append(row | {"shared": int(shared[1])})
  return found


def read_ptxas(text: str) -> list[tuple[str, dict]]:
  """(name, what it takes) of each kernel of a report; spilled bytes are those stored and those loaded."""
  rows = []
  for name, report in re.findall(
    r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?' (.*?)(?=Compile time|\Z)", text, re.S
  ):
    registers = re.search(r"Used (\d+) registers", report)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    rows.append((name, {"registers": int(registers[1]), "spilled": spilled}))
  return rows


def serve(names: list[str], dump: str) -> None:
  """The child: compiles the programs one after the other."""

  def compile_one(name):
    for path in glob.glob(f"{dump}/*"):
      os.remove(path)
    return compile_case(case_of(name, "gpu"), dump)

  child.serve(names, compile_one)


# --- the process that asks ---


def environment(dump: str) -> dict[str, str]:
  """The environment of a process that compiles for GPUs, and writes to a folder what ptxas says.

  Its own programs run on the CPU; what XLA would try out on a GPU to choose from is chosen without.
  """
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
  extra = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": dump, "XLA_FLAGS": flags}
  return child.environment(extra | {"TF_CPP_MIN_LOG_LEVEL": "3"})


def measure(names: list[str], *, timeout: float = 600) -> Iterator[tuple[str, dict]]:
  """Compiles programs in child processes; yields (name, {"rows": ...} or {"error": ...}) for each.

  A program that ends its process costs that process: the others go on in another.

  Args:
    names: as ``case_of`` takes them.
    timeout: seconds for one program.
  """
  left = list(names)
  while left:
    batch = left[:_BATCH]
    with (
      tempfile.TemporaryDirectory() as dump,
      child.Child(["gpu", dump, *batch], environment(dump), timeout) as process,
    ):
      done = 0
      for name, answer in process.answers():
        done += 1
        yield name, answer
      left = left[done:]
      if done < len(batch):
        yield left.pop(0), {"error": process.last_words()}
