"""Temporary memory of attnlab's own train step: at twice the length at most 2.1 times the bytes."""

import importlib.util

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
