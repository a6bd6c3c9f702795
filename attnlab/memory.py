"""Temporary memory of a compiled train step, by the length of a row: linear, whatever the mechanism.

  python -m attnlab.memory                                       all sparse mechanisms on a v6e, which need not be here
  python -m attnlab.memory --mixers=nsa,dsa --chip=cpu --lengths=8192,16384
  python -m attnlab.memory --size=1.3b --mixers=moba             with heads and blocks that the TPU kernels serve
  python -m attnlab.memory --mixers=kda --context=4              a device's, where four share the tokens of the row
  python -m attnlab.memory --dense --out=benchmarks/records/train_memory.json

Each is a model of one layer, configs/NAME.py at a size in bfloat16, through attnlab's own train step: loss, gradients
and update of one packed row. Nothing is run, only compiled, by a process for each mechanism. For TPUs this needs
libtpu, and no TPU, and one to three minutes a program on two cores, more at larger sizes. At the tiny size blocks are
too small for the TPU kernels, and what XLA has in their place pads heads to 128 channels.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from attnlab import cli, metrics, optim, sharding
from attnlab.config import load, resolve
from attnlab.errors import unknown
from attnlab.mixers import mixer, mixers
from attnlab.state import make_init
from attnlab.train import make_update

# Nothing is run: on a CPU most of the time would be LLVM's, which comes after memory is planned.
_UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

LENGTHS = (8192, 16384, 32768, 65536)


def temporary(
  name: str,
  length: int,
  *,
  chip: str = "cpu",
  size: str = "tiny",
  dense: bool = False,
  context: int = 1,
) -> int:
  """Bytes of temporary memory, on each device, of one train step of a model of one layer.

  Args:
    name: of the mixer, and of its config.
    length: tokens of the row.
    chip: "cpu", or a name of ``pallas_kernels.cost.CHIPS``: then in a process with that package's environment.
    size: of configs/base.py.
    dense: with everything seen, as in the first stage of some recipes.
    context: devices that share the row's tokens.
  """
  config = _config(name, size)
  config.model.update(dict(num_layers=1, dtype="bfloat16", dense=dense))
  config.train.batch_size, config.data.seq_len = 1, length
  config.mesh.update(dict(data=1, context=context))
  config = resolve(config)
  mesh = sharding.make_mesh(config.mesh, devices(chip)[:context])
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    tx = optim.optimizer(config.optim, config.train.steps)
    graphdef, _, state = make_init(config, tx, mesh)
    spec = sharding.batch_sharding(mesh).spec
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *spec))
    kinds = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32)
    kinds |= dict.fromkeys(("weights", "bytes"), jnp.float32)
    batch = {k: jax.ShapeDtypeStruct((1, 1, length), t, sharding=where) for k, t in kinds.items()}
    lowered = make_update(graphdef, tx, state).lower(state, batch)
  options = _UNOPTIMISED if chip == "cpu" else None
  return lowered.compile(compiler_options=options).memory_analysis().temp_size_in_bytes


def _config(name: str, size: str) -> ConfigDict:
  return load(f"configs/{mixer(name).name}.py:size={size}")


def devices(chip: str) -> Sequence[jax.Device]:
  """Devices to compile for: this machine's, or TPUs of ``pallas_kernels.cost.CHIPS`` that need not be here."""
  if chip == "cpu":
    return jax.devices("cpu")
  from jax.experimental import topologies

  from pallas_kernels.cost import CHIPS

  topology = CHIPS[chip].topology
  return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def table(
  names: Sequence[str],
  lengths: Sequence[int] = LENGTHS,
  *,
  chip: str,
  size: str = "tiny",
  dense: bool = False,
  context: int = 1,
  report: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[int, int]]:
  """Bytes by mixer and length, each mixer compiled in a process of its own; ``report`` gets a line for each length."""
  from pallas_kernels.cost import environment

  out: dict[str, dict[int, int]] = {name: {} for name in names}
  for name, row in out.items():
    what = [name, chip, size, *map(str, (int(dense), context, *lengths))]
    command = [sys.executable, "-m", "attnlab.memory", "--child", ",".join(what)]
    with tempfile.TemporaryFile("w+") as errors:
      child = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True
      )
      for line in child.stdout or ():
        if line.startswith("{"):
          got = json.loads(line)
          row[got["length"]] = got["bytes"]
          mib = got["bytes"] / 2**20
          report(f"{name}, {got['length']} tokens: {mib:.0f} MiB, compiled in {got['seconds']} s")
      if child.wait():
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:] or [f"exit {child.returncode}"]
        raise RuntimeError(f"{name} on {chip}: {last[0]}")
  return out


def growth(row: dict[int, int]) -> float:
  """The most that memory grows by from a length to twice that; NaN where no length is twice another."""
  return max((row[2 * n] / row[n] for n in row if 2 * n in row), default=math.nan)


def _print(result: dict[str, dict[int, int]]) -> None:
  shown = Table()
  shown.add_column("MiB")
  for length in next(iter(result.values())):
    shown.add_column(str(length), justify="right")
  shown.add_column("most a doubling", justify="right")
  for name, row in result.items():
    cells = (f"{size / 2**20:.0f}" for size in row.values())
    most = growth(row)
    shown.add_row(name, *cells, "-" if math.isnan(most) else f"{most:.2f}")
  Console(highlight=False).print(shown)


def main(_) -> None:
  f = flags.FLAGS
  if f.child:
    name, chip, size, *numbers = f.child.split(",")
    dense, context, *lengths = map(int, numbers)
    if chip == "cpu":
      jax.config.update("jax_num_cpu_devices", context)
    for n in lengths:
      start = time.monotonic()
      taken = temporary(name, n, chip=chip, size=size, dense=bool(dense), context=context)
      seconds = round(time.monotonic() - start)
      print(json.dumps({"length": n, "bytes": taken, "seconds": seconds}), flush=True)
    return
  from pallas_kernels.cost import CHIPS

  if f.chip not in ("cpu", *CHIPS):
    raise unknown("--chip", f.chip, ["cpu", *CHIPS])
  lengths = cli.lengths()
  names = f.mixers or [name for name, cls in mixers().items() if cls.family == "sparse"]
  for name in names:
    _config(name, f.size)  # What is unknown ends here, and not in a child.
  show = Console(stderr=True, highlight=False).print
  options = dict(chip=f.chip, size=f.size, dense=f.dense, context=f.context)
  result = table(names, lengths, **options, report=show)
  if f.out:
    record = options | dict(jax=jax.__version__, bytes=result)
    metrics.write_atomically(Path(f.out), json.dumps(record, indent=2) + "\n")
  _print(result)


if __name__ == "__main__":
  flags.DEFINE_list("mixers", [], "Mechanisms. Default: all sparse ones.")
  flags.DEFINE_list("lengths", [str(n) for n in LENGTHS], "Tokens of a row.")
  flags.DEFINE_string("chip", "v6e", "What to compile for: cpu, or a TPU of pallas_kernels.cost.")
  flags.DEFINE_string("size", "tiny", "Of every model, by the name of configs/base.py.")
  flags.DEFINE_bool("dense", False, "With everything seen.")
  flags.DEFINE_integer("context", 1, "Devices that share the row; of TPUs at most 4.", 1)
  flags.DEFINE_string("out", None, "Where to record the bytes as JSON.")
  flags.DEFINE_string("child", None, "For the processes that this program starts.")
  cli.run(main)
