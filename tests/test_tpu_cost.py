"""The table of costs: what is counted in a kernel and in a schedule, records, the command."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.cost import report
from pallas_kernels.cost.__main__ import RECORD
from pallas_kernels.cost.dump import around, read_schedule, read_units, read_vmem
from pallas_kernels.cost.kernels import describe, pallas_calls
from pallas_kernels.linear_recurrence.shapes import SHAPES, inputs

ROOT = pathlib.Path(__file__).resolve().parent.parent

SCHEDULE = """
LB: loop body
     0   :  { %s0 = smov 0 }
   0x1 LB: > { %v1 = vld }
   0x2   : > { %v2 = vadd }  /* 0x3 : > { not a bundle } */
   0x3 LB: >> { %v3 = vld }
   0x4   : > { %5 = sbr.rel (!%p) target = $region9 }
   0x5   :  {}
   0x6   : >> { %v4 = vst }
   0x7 LB: >> { %v5 = vld }
   0x8 LB: >>> { %v6 = vld }
   0x9   : >>> { %v7 = vld }
   0xa PF: > { %v8 = vst }
   0xb   :  { %9 = sfence }
"""


def kernel(x_ref, w_ref, o_ref):
  w = w_ref[...]
  once = jnp.dot(x_ref[...], w, preferred_element_type=jnp.float32)

  def body(_, y):
    return jnp.dot(y, w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

  o_ref[...] = jax.lax.fori_loop(0, 5, body, once)


def test_a_kernel_is_described_by_its_jaxpr():
  """Products once in bfloat16, six times at HIGHEST; loops as often as they run; bytes of operands and results."""

  @jax.jit
  def program(x, w):
    return pl.pallas_call(
      kernel,
      grid=(3,),
      in_specs=[
        pl.BlockSpec((8, 128), lambda i: (i, 0)),
        pl.BlockSpec((128, 128), lambda i: (0, 0)),
      ],
      out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
      out_shape=jax.ShapeDtypeStruct((24, 128), jnp.float32),
      name="products",
    )(x, w)

  x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((24, 128), (128, 128)))
  (call,) = map(describe, pallas_calls(jax.make_jaxpr(program)(x, w).jaxpr))
  product = 2 * 8 * 128 * 128
  assert call == {
    "call": "products",
    "grid_steps": 3,
    "bytes": 2 * (24 + 128) * 128 + 4 * 24 * 128,
    "flops": 3 * (product + 5 * 6 * product),
    "trips": [(2, 5)],
  }


def test_bundles_of_a_grid_step():
  """Depth 1 is a grid step: 4 bundles and the empty one of its branch. Loops in it run 10, and 4 times with 3 in it."""
  assert read_schedule(SCHEDULE, [(2, 10), (2, 4), (3, 12)]) == {
    "bundles": 5 + 2 * 10 + 1 * 4 + 2 * 12,
    "once": False,
  }
  for unknown in ([(2, 10)], [(2, 10), (2, None), (3, None)]):
    assert read_schedule(SCHEDULE, unknown) == {"bundles": 5 + 2 + 1 + 2, "once": True}
  assert read_schedule("   0x0   :  { a }\n   0x1   :  { b }\n", []) == {
    "bundles": 2,
    "once": False,
  }


def test_vmem_and_units():
  allocations = """
  #allocation2 [shape = 'f32[8]', space=vmem, size = 0x1000, offset = 0, scoped, tag = 'x']
  #allocation3 [shape = 's32[1]', space=sflag, size = 0x4, scoped]
    #allocation4_spill [shape = 'u32[8,128]{1,0}', space=vmem, size = 0x800, offset = 0x2000, scoped]
"""
  assert read_vmem(allocations) == {"vmem": 0x2800, "spilled": 0x800}
  units = "== CAPACITY:\nMXU, VALU, VLOAD:FILL\n  2  4  3\n== UTILIZATION:\n2 1 3\n1 1 3\n"
  assert read_units(units) == {"busiest": "MXU 0.75"}


def test_what_is_written_around_the_kernels():
  """Copies to VMEM, layout S(1), and what writes nothing are not counted."""
  hlo = """HloModule m

ENTRY %main {
  %p = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  %copy = bf16[128,64]{0,1:T(8,128)(2,1)} copy(%p)
  %fusion = (f32[8]{0}, f32[4]{0:T(128)S(1)}) fusion(%p), kind=kLoop
  %start = (f32[8]{0}, f32[8]{0:S(1)}, u32[]) copy-start(%p)
  %kernel = f32[999]{0} custom-call(%copy), custom_call_target="tpu_custom_call"
  ROOT %t = (f32[999]{0}) tuple(%kernel)
}
"""
  assert around(hlo) == 128 * 64 * 2 + 8 * 4


@pytest.fixture
def rows():
  call = dict(call="short_conv_forward", grid_steps=4, bytes=1 << 20, flops=0, bundles=500)
  call |= dict(
    once=False, vmem=1 << 20, spilled=0, busiest="VALU 0.5", cycles=9000, temp=0, around=0
  )
  call |= dict(ideal=1 << 21)
  backward = call | dict(call="short_conv_backward", bundles=700)
  name = "short_conv/forward_backward/mamba2"
  return report.records(name, "v6e", {"rows": [call, backward]})


def test_records(rows):
  """A row for each kernel and one for their sum; the floor is of bytes at 937 a cycle."""
  assert [row["call"] for row in rows] == ["short_conv_forward", "short_conv_backward", "all"]
  whole = rows[2]
  units = 8192 * 5376 / 128**2
  assert whole["bundles_per_unit"] == round(4 * (500 + 700) / units, 1)
  assert rows[0]["times_floor"] == round(4 * 500 / ((1 << 20) / 1640 * 1.75), 2)
  assert whole["cycles_per_unit"] == round(2 * 9000 / units, 1)
  assert whole["bytes"] == whole["ideal_bytes"] == 1 << 21


def test_records_are_kept_and_added_to(rows, tmp_path):
  path = tmp_path / "tpu_cost.csv"
  path.write_text(report.to_csv(rows))
  old = report.read(path)
  assert old == rows
  error = report.records("short_conv/forward_backward/mamba2", "v6e", {"error": "no"})
  other = report.records("linear_recurrence/forward/gla", "v4", {"error": "no"})
  assert report.merged(old, error, report.programs("tpu")) == error
  assert report.merged(old, other, report.programs("tpu")) == [*other, *old]


def test_table_and_plot(rows, tmp_path, capsys):
  error = report.records("linear_recurrence/forward/gla", "v4", {"error": "SIGABRT"})
  report.print_table([*error, *rows])
  out = capsys.readouterr().out
  assert (
    "linear_recurrence/forward/gla on v4: SIGABRT" in out
    and "both: backward" in out
    and "forward" in out
  )
  report.plot([*error, *rows], tmp_path / "cost.png")
  assert (tmp_path / "cost.png").stat().st_size > 1000


def test_the_record_and_the_readme_are_of_all_kernels():
  record = report.read(ROOT / RECORD)
  assert not [row for row in record if row["error"] and not report.refused(row)]
  programs = {(r["kernel"], r["phase"], r["shape"], r["chip"]) for r in record}
  assert programs == set(report.programs("tpu"))
  text = (ROOT / "README.md").read_text()
  assert report.with_table(text, record) == text, "python -m pallas_kernels.cost --readme README.md"


def test_a_recurrence_keeps_states_at_chunk_boundaries_and_little_else():
  """Temporary memory of forward and backward, by the record: the boundary states and 1.2 times the gradients at most.

  Of arrays as projections write them, [B, T, heads * dim]; test_tpu_compile.py holds the record to the compiler.
  """
  rows = [row for row in report.read(ROOT / RECORD) if row["kernel"] == "linear_recurrence"]
  rows = [row for row in rows if row["phase"] == "forward_backward" and row["call"] == "all"]
  assert rows
  for row in rows:
    shape = SHAPES[row["shape"]]
    r = jax.eval_shape(lambda shape=shape: inputs(shape, dtype=jnp.bfloat16))
    gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(r))
    state = 4 * shape.batch * shape.value_heads * shape.key_dim * shape.value_dim
    bound = state * shape.length / 128 + 1.2 * gradients
    assert row["temp_bytes"] <= bound, (row["shape"], row["chip"])


def test_a_step_moves_little_but_the_state():
  """By the record: the kernel the state once in and once out, and the token; XLA what the kernel takes of the token.

  XLA writes most, beside a small state in bfloat16, where 80 heads share a key head (Mamba-2 on v5p, a fifth).
  """
  rows = [row for row in report.read(ROOT / RECORD) if row["kernel"] == "linear_recurrence_step"]
  assert rows
  for row in rows:
    program = row["phase"], row["shape"], row["chip"]
    assert row["bytes"] <= 1.15 * row["ideal_bytes"], program
    assert row["around_bytes"] <= 0.25 * row["ideal_bytes"], program


def run(*arguments, **environment):
  command = [sys.executable, "-m", "pallas_kernels.cost", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **environment)


def test_the_command_names_what_it_knows():
  wrong = run("--chips", "v6f")
  assert wrong.returncode == 2 and "known: v4, v5e, v5p, v6e, 7x" in wrong.stderr
  assert "--spec" in run("--help").stdout
