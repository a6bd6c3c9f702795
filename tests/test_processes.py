"""Several processes: which rows each feeds, and how all stop together. The processes are real ones, on CPUs."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from process_programs import ORDERS, PARTS, batch

from attnlab import sharding
from attnlab.errors import UserError
from pallas_kernels.cost import environment

ROOT = Path(__file__).parent.parent


def start(name, **env):
  return subprocess.Popen(
    [sys.executable, "-m", "tests.process_programs", name],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": ""} | env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def start_two(name):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  return [start(name, **dict(zip(names, (address, "2", str(i)), strict=True))) for i in range(2)]


def answer(process):
  out, err = process.communicate()
  assert process.returncode == 0, err
  return json.loads(out.splitlines()[-1])


def test_processes_that_hold_the_same_rows_feed_the_same():
  """Whatever the order of devices, and every row of the batch is fed."""
  shares = {
    "as they come": [[0, 2], [1, 2]],
    "apart": [[0, 2], [1, 2]],
    "backwards": [[0, 2], [1, 2]],
    "the same": [[0, 1], [0, 1]],
  }
  assert shares.keys() == ORDERS.keys()
  answers = [answer(process) for process in start_two("rows")]
  for case in answers[0]:
    order, split, microbatches = case.split(", ")
    assert [found[case][0] for found in answers] == shares[order], case
    rows = {}
    for first, inputs in (shard for found in answers for shard in found[case][1]):
      assert rows.setdefault(first, inputs) == inputs, case
    assert len(rows) == PARTS
    count = shares[order][0][1]
    expected = np.concatenate([batch(split, (i, count))["inputs"] for i in range(count)])
    fed = np.concatenate([np.reshape(r, (-1, expected.shape[1])) for r in rows.values()])
    assert sorted(fed.tolist()) == sorted(expected.tolist()), case
    if (order, microbatches) == ("as they come", "None"):
      np.testing.assert_array_equal(np.concatenate([rows[i] for i in sorted(rows)]), expected)


def test_ctrl_c_in_one_process_stops_all_at_one_step():
  """As SIGTERM does, of which test_train has a whole run."""
  processes = start_two("stop")
  assert [process.stdout.readline() for process in processes] == ["running\n"] * 2
  processes[1].send_signal(signal.SIGINT)
  first, second = (answer(process) for process in processes)
  assert first["step"] == second["step"]
  assert (first["signal"], second["signal"]) == ("SIGTERM", "SIGINT")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_shares_of_a_pods_processes():
  """Devices lie in a mesh as in the torus: a host's four are a square of it, in rows and columns of the mesh."""
  found = answer(start("pods", **environment()))

  def groups(case):
    """Processes by their share, in the order of the shares."""
    shares = found[case]
    assert {count for _, count in shares} == {max(number for number, _ in shares) + 1}
    return [[p for p, (n, _) in enumerate(shares) if n == i] for i in range(shares[0][1])]

  alone = [[p] for p in range(16)]
  assert groups("v5e:4x4 {'data': 16}") == alone[:4]
  assert groups("v5e:4x4 {'data': 4, 'model': 4}") == [[0, 1], [2, 3]]
  assert groups("v5e:4x4 {'data': 2, 'context': 8}") == [[0, 1], [2, 3]]
  assert groups("v5e:4x4 {'model': 16}") == [[0, 1, 2, 3]]
  assert groups("v5e:8x8 {'data': 64}") == alone
  fours = [[4 * i + j for j in range(4)] for i in range(4)]
  assert groups("v5e:8x8 {'data': 8, 'model': 8}") == fours
  assert groups("v5e:8x8 {'replica': 2, 'data': 4, 'model': 8}") == fours
  assert groups("v5p:4x4x4 {'data': 64}") == alone
  assert len(groups("v5p:4x4x4 {'data': 16, 'model': 4}")) == 8
  # No product of some of 4, 4, 4 is 2, nor of 4, 4: axes of the torus are split.
  assert len(groups("v5p:4x4x4 {'data': 32, 'model': 2}")) == 16
  assert len(groups("v6e:4x4 {'data': 8, 'model': 2}")) == 4


@pytest.mark.parametrize("data", [3, 6])
def test_rows_that_processes_share_in_part_are_refused(data):
  """Two processes of three devices, or four and two, along rows in threes."""
  owners = [0, 0, 0, 1, 1, 1] if data == 3 else [0, 0, 0, 0, 1, 1]
  devices = np.array([SimpleNamespace(process_index=i) for i in owners], object)
  shape = dict(replica=1, data=data, context=1, model=6 // data)
  mesh = SimpleNamespace(devices=devices.reshape(tuple(shape.values())), shape=shape)
  with pytest.raises(UserError, match=rf"config\.mesh\.data {data} does not .* 2 processes"):
    sharding.share(mesh, 0)
