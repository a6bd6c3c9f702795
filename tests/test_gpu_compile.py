"""The kernels through the real GPU compilers, for an H200 that is not here, in processes of its own."""

import importlib.util
import pathlib

import pytest

from pallas_kernels.cost import gpu

ROOT = pathlib.Path(__file__).resolve().parent.parent

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'products_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for products_mosaic_gpu_kernel
    256 bytes stack frame, 352 bytes spill stores, 360 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 256 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compile time = 100.327 ms
"""

needs_compilers = pytest.mark.skipif(gpu.missing() is not None, reason=str(gpu.missing()))
# Compilers take all the cores that there are: one at a time.
pytestmark = pytest.mark.xdist_group("gpu_compiler")


def test_a_report_is_read():
  assert gpu.read_ptxas(REPORT) == [("products", {"registers": 255, "spilled": 712})]


def test_a_missing_compiler_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setenv("PATH", "")
  monkeypatch.setenv("CUDA_ROOT", "/nowhere")
  assert "jax_cuda13_plugin" in gpu.missing() and "ptxas" in gpu.missing()


@needs_compilers
def test_every_program_has_an_answer(monkeypatch):
  """One that compiles, one that the compiler refuses, one that ends its process, and what comes after it."""
  monkeypatch.chdir(ROOT)
  names = [f"tests.gpu_programs:{name}" for name in ("doubled", "too_large", "fatal", "doubled")]
  answers = list(gpu.measure(names))
  assert [name for name, _ in answers] == names
  (row,) = answers[0][1]["rows"]
  assert row == answers[3][1]["rows"][0]
  assert row["call"] == "doubled" and row["spilled"] == 0 and 0 < row["registers"] < 128
  assert row["bytes"] == 2 * 64 * 128 * 4 and 64 * 128 * 4 <= row["shared"] < 64 * 128 * 4 + 1024
  assert "error" in answers[1][1]
  assert "SIGABRT" in answers[2][1]["error"]
