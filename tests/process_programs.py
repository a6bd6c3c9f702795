"""What test_processes.py runs in several processes that JAX has joined, and what needs libtpu's description of a pod.

python -m tests.process_programs rows
"""

import json
import sys
import time

import jax
import numpy as np

from attnlab import cli, data, sharding
from attnlab.evaluate import placer
from attnlab.signals import Signals

BATCH, PARTS, MODEL = 16, 4, 2
# Eight devices of two processes, by where they lie in the mesh: as they come; so that rows of a process do not follow
# each other; the second process first; and so that both processes hold every row.
ORDERS = {
  "as they come": (0, 1, 2, 3, 4, 5, 6, 7),
  "apart": (0, 1, 4, 5, 2, 3, 6, 7),
  "backwards": (7, 6, 5, 4, 3, 2, 1, 0),
  "the same": (0, 4, 1, 5, 2, 6, 3, 7),
}
PODS = {
  "v5e:4x4": ({"data": 16}, {"data": 4, "model": 4}, {"data": 2, "context": 8}, {"model": 16}),
  "v5e:8x8": ({"data": 64}, {"data": 8, "model": 8}, {"replica": 2, "data": 4, "model": 8}),
  "v5p:4x4x4": ({"data": 64}, {"data": 16, "model": 4}, {"data": 32, "model": 2}),
  "v6e:4x4": ({"data": 8, "model": 2},),
}


def config():
  c = data.data_config()
  c.update(dict(name="task", task="mqar", seq_len=32))
  c.task_args = dict(vocab_size=64, num_kv_pairs=4)
  return c


def batch(split: str, share: tuple[int, int]) -> data.Batch:
  return next(data.make_iterator(config(), split=split, batch_size=BATCH, seed=0, share=share))


def rows() -> dict:
  """By order of the devices and split: the share, and the rows [first, inputs] that each device of this process has."""
  found = {}
  for name, order in ORDERS.items():
    devices = [jax.devices()[i] for i in order]
    mesh = sharding.make_mesh({"data": PARTS, "model": MODEL}, devices)
    share = sharding.share(mesh)
    for split, microbatches in (("train", None), ("train", 2), ("validation", None)):
      place = placer(mesh, data.tokenizer(config()).token_bytes(), microbatches)
      inputs = place(batch(split, share))["inputs"]
      assert inputs.size == BATCH * 32
      held = [
        (s.index[-2].start or 0, np.asarray(s.data).tolist()) for s in inputs.addressable_shards
      ]
      found[f"{name}, {split}, {microbatches}"] = share, held
  return found


def stop() -> dict:
  """The update after which a signal to one of the processes stops this one."""
  with Signals() as signals:
    step = 0
    print("running", flush=True)
    while not signals.stop(step):
      step += 1
      time.sleep(0.02)
  return {"step": step, "signal": signals.stopped.name}


def pods() -> dict:
  """The share of each process of a pod's slice, by its name and config.mesh."""
  from jax.experimental import topologies

  found = {}
  for name, sizes in PODS.items():
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    for size in sizes:
      mesh = sharding.make_mesh(size, devices)
      processes = sorted({d.process_index for d in devices})
      found[f"{name} {size}"] = [sharding.share(mesh, process) for process in processes]
  return found


if __name__ == "__main__":
  program = {"rows": rows, "stop": stop, "pods": pods}[sys.argv[1]]
  if cli.in_cluster():
    jax.config.update("jax_num_cpu_devices", PARTS)
    cli.join_processes()
  print(json.dumps(program()))
