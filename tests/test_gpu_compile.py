"""The kernels through the real GPU compilers, for an H200 that is not here, in processes of its own."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
from recurrence_programs import SPECIALISATIONS

from pallas_kernels.cost import cases, gpu, gpu_report, report

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "records" / "gpu_cost.csv"

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


def same_cost(names):
  """What ptxas tells of the kernels is what is recorded, where the versions are: registers within 8, no new spills."""
  record = {tuple(row[k] for k in KEYS): row for row in report.read(RECORD)}
  problems = []
  for name, answer in gpu.measure(names):
    for row in gpu_report.records(name, answer):
      want = record.get(tuple(row[k] for k in KEYS))
      if want is None:
        problems.append(f"{name}: {row['call'] or row['error']}: not recorded")
        continue
      if (row["jax"], row["ptxas"]) != (want["jax"], want["ptxas"]):
        pytest.skip(f"the record is of jax {want['jax']} and ptxas {want['ptxas']}")
      for column, slack in (("registers", 8), ("spilled_bytes", 0), ("shared_bytes", 0)):
        if abs(row[column] - want[column]) > slack:
          problems.append(f"{name}: {row['call']}: {column} was {want[column]}, is {row[column]}")
  hint = "if that is meant: python -m pallas_kernels.cost --platform gpu --out benchmarks/records"
  assert not problems, "\n".join([*problems, hint])


KEYS = ("kernel", "phase", "shape", "call")
# One of each kind: what every run of the tests reads.
FEW = [
  "linear_recurrence/forward_backward/qwen3_next",
  "linear_recurrence_step/float32_state/kimi_linear",
  "block_sparse/forward/nsa",
]


def test_the_record_is_of_all_kernels_and_none_spills():
  record = report.read(RECORD)
  assert {tuple(row[k] for k in KEYS[:3]) for row in record} == set(report.programs("gpu"))
  assert not [row for row in record if row["error"] or row["spilled_bytes"]]


@needs_compilers
def test_costs_are_the_recorded_ones():
  same_cost(FEW)


@needs_compilers
@pytest.mark.compile
def test_all_costs_are_the_recorded_ones():
  same_cost(list(cases("gpu")))


def spilled(names):
  """Bytes that each kernel of each program spills; what does not compile is one failure."""
  answers = dict(gpu.measure(names))
  errors = [f"{name}: {answer['error']}" for name, answer in answers.items() if "error" in answer]
  assert not errors, "\n".join(errors)
  return {name: [row["spilled"] for row in answer["rows"]] for name, answer in answers.items()}


@needs_compilers
@pytest.mark.compile
def test_documents_spill_nothing(monkeypatch):
  monkeypatch.chdir(ROOT)
  names = [
    f"tests.gpu_programs:packed:{name}" for name in ("nsa", "minimax_m3", "infllm_v2", "moba")
  ]
  assert spilled(names) == dict.fromkeys(names, [0, 0, 0, 0])


@needs_compilers
@pytest.mark.compile
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@pytest.mark.parametrize("case", SPECIALISATIONS, ids="-".join)
def test_every_specialisation_compiles(case, dtype, monkeypatch):
  """With packed segments, initial and final state, and every gradient."""
  monkeypatch.chdir(ROOT)
  name = "tests.recurrence_programs:specialisation:gpu:" + "-".join((*case, dtype))
  assert set(spilled([name])[name]) == {0}


@needs_compilers
@pytest.mark.compile
@pytest.mark.parametrize("T", (2, 65, 131072))
def test_any_length_compiles(T, monkeypatch):
  """From a part of a chunk, from an initial state to a final one."""
  monkeypatch.chdir(ROOT)
  name = f"tests.recurrence_programs:real:gpu:kimi_linear:{T}:bfloat16"
  assert set(spilled([name])[name]) == {0}


@needs_compilers
@pytest.mark.compile
def test_real_float32_shapes_compile(monkeypatch):
  monkeypatch.chdir(ROOT)
  names = [
    f"tests.recurrence_programs:real:gpu:{name}:4096:float32"
    for name in ("mamba2", "qwen3_next", "rwkv7")
  ]
  assert {max(got) for got in spilled(names).values()} == {0}


@needs_compilers
@pytest.mark.compile
@pytest.mark.parametrize(
  "K, case",
  [
    (256, "scalar-key-decayed"),
    (256, "channel-key-decayed"),
    (128, "channel-low_rank-undecayed"),
    (256, "scalar-low_rank-decayed"),
  ],
)
def test_long_float32_keys_compile(K, case, monkeypatch):
  """More keys than the walk over chunks has room for. It spills nothing; what is local to a chunk may, with a low-rank
  erase."""
  monkeypatch.chdir(ROOT)
  name = f"tests.recurrence_programs:heads:gpu:2-{K}-4-64:{case}:300:float32"
  ((_, answer),) = gpu.measure([name])
  assert "error" not in answer, answer["error"]
  streams = [row for row in answer["rows"] if row["call"].endswith("_stream")]
  assert len(streams) == 2 and not any(row["spilled"] for row in streams)


@needs_compilers
def test_compiles_in_a_sharded_program(tmp_path):
  """For two GPUs, gradients included: each runs the kernels on its part, and nothing moves between them.

  And what XLA itself splits in two bfloat16 is two: rounded and made float32 again it would be what it was.
  """
  command = [sys.executable, "-m", "tests.gpu_programs"]
  env = gpu.environment(str(tmp_path))
  child = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
  assert child.returncode == 0, child.stderr[-2000:]
  answer = json.loads(child.stdout.splitlines()[-1])
  assert len(answer["kernels"]) == 4 and answer["collectives"] == []
  assert answer["split"] == [False, True]
