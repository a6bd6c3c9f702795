"""The kernels through the real TPU compiler, for chips that are not here, in processes of its own.

A few programs in the default tier; all of them, on every chip, with ``-m compile`` (one to two hours on two cores).
"""

import importlib.metadata
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from recurrence_programs import SPECIALISATIONS, temporary_bound

from attnlab.mixers import mixers
from pallas_kernels import dispatch
from pallas_kernels.cost import CHIPS, cases, environment, measure, report
from pallas_kernels.cost.__main__ import INSTALL, RECORD
from pallas_kernels.cost.kernels import pallas_calls
from pallas_kernels.linear_recurrence import linear_recurrence, tpu
from pallas_kernels.linear_recurrence.shapes import SHAPES, Shape, inputs

ROOT = pathlib.Path(__file__).resolve().parent.parent
GRADIENTS = "tests.recurrence_programs:gradients:"
SPARSE = "tests.sparse_programs:gradients"

pytestmark = [
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason=f"libtpu, the TPU compiler, is not installed: {INSTALL}",
  ),
  # Compilers take all the cores that there are: one at a time.
  pytest.mark.xdist_group("tpu_compiler"),
]


def compiled(chip, names):
  """All errors in one failure."""
  answers = dict(measure(chip, names))
  errors = [error for name, answer in answers.items() for error in wrong(chip, name, answer)]
  assert not errors, "\n".join(errors)
  assert list(answers) == list(names)


def wrong(chip, name, answer):
  """What a program that is not on record failed at: compiling, or temporary memory where that is bounded."""
  if "error" in answer:
    return [f"{name} on {chip}: {answer['error']}"]
  if name.startswith(GRADIENTS):
    chunk = 64 if chip == "v4" and "float32" in name else 128
    bound = temporary_bound(name.removeprefix(GRADIENTS), chunk)
    if answer["rows"][0]["temp"] > bound:
      return [f"{name} on {chip}: {answer['rows'][0]['temp']:,} bytes of at most {bound:,}"]
  return []


def same_cost(chip, names, also=()):
  """Figures of the compiler, and refusals of the kernels, are the recorded ones; programs of ``also`` compile.

  They are the same on every machine with one version of the compiler. 3 %: what an unrelated change of the
  scheduler's choices may cost without anybody looking at it.
  """
  record = report.read(ROOT / RECORD)
  version = importlib.metadata.version("libtpu")
  if other := {row["libtpu"] for row in record} - {version}:
    pytest.skip(f"the record is of libtpu {', '.join(other)}; here is {version}")
  keys = ("kernel", "phase", "shape", "chip", "call")
  wanted = {tuple(row[k] for k in keys): row for row in record}
  problems = []
  for name, answer in measure(chip, [*names, *also]):
    if name in also:
      problems += wrong(chip, name, answer)
      continue
    for row in report.records(name, chip, answer):
      want = wanted.get(tuple(row[k] for k in keys))
      if want is None:
        problems.append(f"{name} on {chip}: {row['call'] or row['error']}: not recorded")
        continue
      if row["error"] or want["error"]:
        # A kernel may refuse a chip, if that is on record; anything else is an error.
        if not report.refused(row) or row["error"] != want["error"]:
          problems.append(f"{name} on {chip}: {row['error'] or 'no longer refused'}")
        continue
      # Two tiles are no news where a kernel allocates next to nothing.
      for column, slack in (("bundles_per_unit", 0.05), ("vmem_bytes", 8192), ("temp_bytes", 8192)):
        got, was = row[column] or 0, want[column] or 0
        if abs(got - was) > max(0.03 * was, slack):
          problems.append(f"{name} on {chip}: {row['call']}: {column} was {was}, is {got}")
  hint = "if that is meant: python -m pallas_kernels.cost --out benchmarks/records"
  assert not problems, "\n".join([*problems, hint])


def specialisation(*parts):
  return "tests.recurrence_programs:specialisation:tpu:" + "-".join(parts)


def of_heads(sizes, case, T, dtype):
  """Heads that no model of the record has."""
  return f"tests.recurrence_programs:heads:tpu:{sizes}:{case}:{T}:{dtype}"


# A backward pass of a real shape on every chip; a v5p's, which is between a v5e's and a v6e's, with -m compile.
FEW = {
  "v4": ["linear_recurrence/forward_backward/rwkv7"],
  "v5e": [
    "linear_recurrence/forward_backward/qwen3_next",
    "linear_recurrence_step/bfloat16_state/rwkv7",
    "short_conv/forward/mamba2",
  ],
  "v5p": ["linear_recurrence/forward_backward/gla_128"],
  "v6e": [
    "linear_recurrence/forward_backward/kimi_linear",
    "linear_recurrence_step/float32_state/qwen3_next",
    "short_conv/forward_backward/qwen3_next_packed",
    "rope/forward/half",
  ],
  "7x": ["linear_recurrence/forward_backward/ssd_128"],
}
# The least usual input on the newest chip.
ALSO = {
  "7x": [specialisation("scalar", "none", "decayed", "bonus", "float32")],
}


@pytest.mark.parametrize(
  "chip", [pytest.param(c, marks=[pytest.mark.compile] * (c == "v5p")) for c in FEW]
)
def test_costs_are_the_recorded_ones(chip, monkeypatch):
  monkeypatch.chdir(ROOT)
  same_cost(chip, FEW[chip], ALSO.get(chip, ()))


@pytest.mark.compile
@pytest.mark.parametrize("chip", CHIPS)
def test_all_costs_are_the_recorded_ones(chip):
  same_cost(chip, [name for name, case in cases().items() if case.on(chip)])


@pytest.mark.compile
@pytest.mark.parametrize("chip", CHIPS)
def test_scores_compile(chip):
  pools = [f"pool_attention/{phase}/nsa" for phase in ("forward_backward", "weights")]
  compiled(
    chip, [*pools, *(f"index_scores/{phase}/dsa" for phase in ("forward", "forward_backward"))]
  )


@pytest.mark.compile
def test_pools_compile_where_vmem_is_small(monkeypatch):
  """DeepSeek-V4's channels; NSA's in float32; heads that share nothing."""
  monkeypatch.chdir(ROOT)
  shapes = ("32:1:512:512:bfloat16", "64:4:192:128:float32", "4:4:128:128:bfloat16")
  compiled("v4", [f"tests.sparse_programs:of_pools:{shape}" for shape in shapes])


@pytest.mark.compile
@pytest.mark.parametrize("chip", CHIPS)
def test_block_sparse_compiles(chip, monkeypatch):
  """With and without documents, forward and backward; a v4's 16 MB of VMEM hold none of MoBA's blocks."""
  monkeypatch.chdir(ROOT)
  shapes = ["nsa:2048", "minimax_m3:2048", "infllm_v2:8192", "dsa:4096"]
  shapes += ["moba:65536"] * (chip != "v4")
  compiled(chip, [f"{SPARSE}:{shape}:{ids}" for shape in shapes for ids in ("", "packed")])


@pytest.mark.compile
def test_block_sparse_of_any_group_compiles(monkeypatch):
  """Heads that are no power of two: block by block, query by query, and of chosen tokens."""
  monkeypatch.chdir(ROOT)
  groups = ("3:64:8", "5:64:8", "6:1024:2", "7:64:8", "12:64:8", "5:1:512")
  compiled("v5e", [f"tests.sparse_programs:of_group:{group}" for group in groups])


@pytest.mark.compile
@pytest.mark.parametrize("chip", CHIPS)
def test_every_specialisation_compiles(chip, monkeypatch):
  """With packed segments, initial and final state, and every gradient."""
  monkeypatch.chdir(ROOT)
  for dtype in ("bfloat16", "float32"):
    compiled(chip, [specialisation(*parts, dtype) for parts in SPECIALISATIONS])


REAL = [name for name in SHAPES if not name.startswith("cpu_")]
LENGTHS = [
  *itertools.product(REAL, (131072,), ("bfloat16",)),
  *itertools.product(REAL, (4096,), ("float32",)),
  *itertools.product(("kimi_linear", "mamba2", "rwkv7"), (65537,), ("bfloat16",)),
  *itertools.product(
    ("kimi_linear", "qwen3_next", "mamba2", "rwkv7"), (2, 127, 128, 129), ("bfloat16",)
  ),
]


@pytest.mark.compile
@pytest.mark.parametrize("chip", CHIPS)
def test_every_shape_compiles_at_any_length(chip, monkeypatch):
  """From a part of a chunk to 131072 tokens, from an initial state to a final one; in float32 too.

  A program has 16 GB on v4 and v5e, which does not hold all heads of that many tokens: there it has a quarter.
  """
  monkeypatch.chdir(ROOT)
  split = {"v4": ":4", "v5e": ":4"}.get(chip, "")
  programs = (f"{name}:{T}:{dtype}{split * (T > 4096)}" for name, T, dtype in LENGTHS)
  compiled(chip, [f"tests.recurrence_programs:real:tpu:{program}" for program in programs])


LOW_RANK, KEY = "channel-low_rank-undecayed", "channel-key-decayed"
HEADS = [
  # Fewer channels than lanes, which are padded in registers; heads that end within a register.
  ("2-16-4-8", "scalar-key-decayed", 300, "bfloat16"),
  ("4-32-4-32", KEY, 300, "float32"),
  ("7-16-7-16", LOW_RANK, 300, "float32"),
  ("40-16-40-16", LOW_RANK, 300, "float32"),
  ("3-80-3-80", LOW_RANK, 300, "bfloat16"),
  # Steps whose last one has fewer heads.
  ("25-64-25-64", KEY, 1024, "bfloat16"),
  ("25-64-25-64", LOW_RANK, 1024, "float32"),
  ("17-128-17-128", KEY, 300, "bfloat16"),
  ("25-64-50-64", KEY, 300, "float32"),
  # States of four registers of lanes by as many.
  ("5-256-5-256", LOW_RANK, 1024, "bfloat16"),
  ("4-256-4-256", LOW_RANK, 1024, "float32"),
  ("4-256-4-256", KEY, 65537, "bfloat16"),
  # As many states as VMEM may hold where it is smallest.
  ("1-128-160-64", "scalar-key-decayed", 300, "float32"),
  ("1-128-112-64", LOW_RANK, 300, "float32"),
]


@pytest.mark.compile
@pytest.mark.parametrize("chip", CHIPS)
def test_any_heads_compile(chip, monkeypatch):
  monkeypatch.chdir(ROOT)
  compiled(chip, [of_heads(*parts) for parts in HEADS])


@pytest.mark.compile
@pytest.mark.parametrize("chip", CHIPS)
def test_the_largest_states_of_a_step_compile(chip, monkeypatch):
  monkeypatch.chdir(ROOT)
  states = ("1024-512:float32", "512-1024:float32", "1024-1024:bfloat16")
  compiled(chip, [f"tests.recurrence_programs:one_token:tpu:{state}" for state in states])


# The dtype, layout and packing of gradients; test_tpu_cost.py has bfloat16 as projections write it, of every shape.
MEMORY = [
  *itertools.product(("kimi_linear", "mamba2", "rwkv7"), ("bfloat16",), ("flat",), ("packed",)),
  *itertools.product(("kimi_linear", "qwen3_next"), ("float32",), ("flat",), ("", "packed")),
  *itertools.product(("kimi_linear", "qwen3_next"), ("bfloat16",), ("heads",), ("",)),
]


@pytest.mark.compile
@pytest.mark.parametrize("chip", CHIPS)
def test_temporary_memory_is_bounded(chip, monkeypatch):
  monkeypatch.chdir(ROOT)
  names = (f"tpu:{s}:8192:{dtype}:{layout}:{packed}" for s, dtype, layout, packed in MEMORY)
  compiled(chip, [GRADIENTS + name for name in names])


def test_heads_that_are_no_whole_lanes_are_refused(monkeypatch):
  """Better than the compiler's end for want of VMEM: "auto" goes on with XLA."""
  shape = Shape(1, 128, 25, 64, "scalar")
  r = jax.eval_shape(lambda: inputs(shape, length=256, dtype=jnp.bfloat16))
  with pytest.raises(NotImplementedError, match="16 of 25 heads at a time"):
    monkeypatch.setattr(dispatch, "vmem", lambda: 128 * 2**20)
    tpu.supports(r, None)


@pytest.mark.parametrize("heads, batch, serves", [(80, 2, True), (160, 1, True), (256, 1, False)])
def test_states_that_vmem_does_not_hold_are_refused(monkeypatch, heads, batch, serves):
  """Those of all heads that share a key head stay there; "auto" goes on with XLA."""
  shape = Shape(1, 128, heads, 64, "scalar", batch=batch)
  r = jax.eval_shape(lambda: inputs(shape, length=256, dtype=jnp.bfloat16))
  monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
  traced = jax.make_jaxpr(lambda r: linear_recurrence(r)[0])(r)
  assert bool(pallas_calls(traced.jaxpr)) == serves
  if not serves:
    with pytest.raises(NotImplementedError, match="256 states of 128 x 64"):
      tpu.supports(r, None)


def told(module, *arguments):
  """The JSON lines of a program that compiles for chips that are not here."""
  child = subprocess.run(
    [sys.executable, "-m", module, *arguments],
    env=environment(),
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert child.returncode == 0, child.stderr[-2000:]
  return [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]


# Not looked at: several steps, inputs or states a token, between which tokens and heads change places; a window
# besides; no kernel of this project's.
UNSEEN = (
  "gated_delta_product", "mamba3", "mom", "window_linear", "ttt_linear", "ttt_mlp", "log_linear_mamba2",
  "log_linear_gated_deltanet",
)  # fmt: skip


@pytest.mark.compile
@pytest.mark.parametrize(
  "name", [n for n, m in mixers().items() if m.family == "linear" and n not in UNSEEN]
)
def test_layers_copy_nothing_large(name):
  """From projections to kernels and back heads lie side by side, so that XLA need not lay them out again."""
  (layer,) = told("tests.layer_programs", "v6e", name)
  assert layer["copies"] == []


@pytest.mark.compile
@pytest.mark.parametrize("name", ["softmax", "swa", "mla"])
def test_attention_copies_no_heads(name):
  """From projections to kernels and back heads come first. What is copied is splash attention's own: lse, 128 times."""
  (layer,) = told("tests.layer_programs", "v6e", name)
  assert layer["copies"] == ["f32[4,16,4096,128]"]


def test_compiles_in_a_sharded_program():
  """For 128 chips, gradients included: each device runs the kernels on its part, and nothing moves between them."""
  names = "recurrence", "parts", "step", "conv", "rope"
  recurrence, parts, step, conv, rope = told("tests.tpu_programs", "v5p:4x4x8", *names)
  assert recurrence["kernels"] == 2 and recurrence["collectives"] == []
  # A row and 4 of Kimi Linear's heads a device: the bound of all programs, in test_tpu_cost.py.
  heads, T, D = 4, 4096, 128
  cotangent = 2 * T * heads * D
  gradients = recurrence["argument"] - cotangent
  assert recurrence["temp"] <= 4 * heads * T / 128 * D * D + 1.2 * gradients
  # The same of a row that four chips share: two runs more forward, which tell what a part does to states, and none
  # backward. The four parts' maps and states are gathered. Beside them there are what tokens read of the state at the
  # start, and values that are zero.
  assert parts["kernels"] == 4 and parts["collectives"] == ["all-gather", "all-reduce"]
  assert parts["temp"] <= recurrence["temp"] + 2 * cotangent + 9 * 4 * heads * D * D
  # The state is written where it was; what is made of a token for the kernel is small beside it.
  assert step["kernels"] == 1 and step["collectives"] == []
  assert step["alias"] >= step["largest"] and step["temp"] < step["largest"] / 8
  # Each device's rows give a part of the weight's gradient.
  assert conv["kernels"] == 1 and conv["collectives"] == ["all-reduce"]
  assert conv["temp"] < conv["largest"] / 4
  assert rope["kernels"] == 1 and rope["collectives"] == []
