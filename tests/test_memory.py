"""Temporary memory of attnlab's own train step: at twice the length at most 2.1 times the bytes."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from attnlab import memory
from attnlab.mixers import mixers

SPARSE = [name for name, cls in mixers().items() if cls.family == "sparse"]


@pytest.mark.parametrize("name", ["infllm2", pytest.param("moba", marks=pytest.mark.slow)])
def test_two_lengths(name):
  """One with scores of queries and pools, and one whose choice has no gradient: once both were kept for all chunks."""
  lengths = {"infllm2": (8192, 16384), "moba": (16384, 32768)}[name]
  row = {n: memory.temporary(name, n) for n in lengths}
  assert memory.growth(row) <= 2.1, row


def test_devices_that_share_a_row_share_its_memory():
  """Maps of the parts, and the head, are all that each has whole."""
  alone, shared = (memory.temporary("gated_deltanet", 8192, context=n) for n in (1, 8))
  assert shared < alone / 6


@pytest.mark.parametrize("lengths", [[8192], [8192, 12288], [8192, 16384, 24576]], ids=str)
def test_any_lengths_are_shown_and_recorded(lengths, monkeypatch, tmp_path, capsys):
  """Also where none is twice another."""
  monkeypatch.setattr(memory, "table", lambda *_, **__: {"nsa": {n: 1024 * n for n in lengths}})
  out = tmp_path / "record.json"
  options = dict(chip="cpu", size="tiny", dense=False, context=1, child=None, out=str(out))
  flags = SimpleNamespace(mixers=["nsa"], lengths=list(map(str, lengths)), **options)
  monkeypatch.setattr(memory.flags, "FLAGS", flags)
  memory.main(None)
  shown = next(line for line in capsys.readouterr().out.splitlines() if "nsa" in line)
  cells = [cell.strip() for cell in shown.strip("│").split("│")]
  assert cells[1:] == [*(str(n // 1024) for n in lengths), "2.00" if 16384 in lengths else "-"]
  assert json.loads(out.read_text())["bytes"] == {"nsa": {str(n): 1024 * n for n in lengths}}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dense", [False, True])
def test_every_mechanism(name, dense):
  row = {n: memory.temporary(name, n, dense=dense) for n in memory.LENGTHS}
  assert memory.growth(row) <= 2.1, row


@pytest.mark.compile
@pytest.mark.parametrize("name", SPARSE)
def test_every_mechanism_on_a_tpu(name):
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu, the TPU compiler, is not installed")
  row = memory.table([name], chip="v6e")[name]
  assert memory.growth(row) <= 2.1, row


def test_the_record_is_of_every_mechanism():
  """At the size of a 1.3b model, on a v6e: two to twelve minutes a program, and the README's table."""
  root = Path(__file__).parent.parent
  record = json.loads((root / "benchmarks/records/train_memory_v6e.json").read_text())["bytes"]
  assert sorted(record) == sorted(SPARSE)
  readme = (root / "README.md").read_text()
  for name, row in record.items():
    assert memory.growth({int(n): size for n, size in row.items()}) <= 2.1, name
    cells = " | ".join(str(round(size / 2**20)) for size in row.values())
    assert f"| `{name}` | {cells} |" in readme
