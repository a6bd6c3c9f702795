"""Block-sparse attention beside full causal attention at 64k tokens, on a TPU that is not there.

    python -m pallas_kernels.cost.attention                             a table, for v6e
    python -m pallas_kernels.cost.attention --chip v5e --shapes nsa
    python -m pallas_kernels.cost.attention --out benchmarks/records    also block_sparse_64k.md

Both are compiled by the real compiler for one group of key heads: ours, and splash attention, the kernel that comes
with JAX (of at most 16 heads, and so often). Bundles are those of all grid steps, a cycle each at the least; of splash
attention's those that it runs, the half of the square that a causal mask leaves. FLOPs are of the matrix products as
the kernels do them, masked parts included; bytes are of operands and results. Blocks are chosen at random
(``pallas_kernels.cost.loops``), which is what costs most where neighbours could share them. What limits a kernel is the
unit with the fewest idle slots.

DSA's tokens are gathered before its kernels by XLA, and their gradients added up after them: the least that this reads
and writes is among the bytes. They take longer than the kernels' bundles: where that is so, "full / ours" and "ms at
least" are of the bytes.
"""

import argparse
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.shapes import SHAPES, Shape
from pallas_kernels.block_sparse.tpu_tiles import TILE
from pallas_kernels.cost import report
from pallas_kernels.cost.cases import cases
from pallas_kernels.cost.chips import CHIPS
from pallas_kernels.cost.compiler import measure
from pallas_kernels.softmax_attention import splash
from pallas_kernels.softmax_attention.visibility import Visibility

_SHAPES = ("nsa", "minimax_m3", "infllm_v2", "moba", "dsa")
_PHASES = ("forward", "forward_backward")
# Of splash attention, on each side of its square, and heads: 128 of DSA's at once do not fit HBM.
_BLOCK, _HEADS = 512, 16
_FULL = "pallas_kernels.cost.attention:full:"


def full(argument: str):
  """Splash attention for one group of key heads of a shape, or some of it: "SHAPE,PHASE"."""
  name, phase = argument.split(",")
  s = SHAPES[name]

  def array(heads, dim):
    return jax.ShapeDtypeStruct((1, s.length, heads, dim), jnp.bfloat16)

  heads = min(s.heads // s.kv_heads, _HEADS)
  q, k, v = array(heads, s.key_dim), array(1, s.key_dim), array(1, s.value_dim)

  def forward(q, k, v):
    line = jnp.arange(s.length)
    seen = Visibility(line, line, aligned=True)
    return splash.forward(q, k, v, None, seen, s.key_dim**-0.5)[0]

  def both(q, k, v, do):
    o, vjp = jax.vjp(forward, q, k, v)
    return o, vjp(do)

  return (
    (forward, (q, k, v)) if phase == "forward" else (both, (q, k, v, array(heads, s.value_dim)))
  )


@dataclasses.dataclass(frozen=True)
class Figures:
  """Of one group of key heads.

  Attributes:
    bundles, flops, bytes: of all kernels of a program; bytes also of what is gathered for them.
    limits: the unit that each kernel keeps busiest, in program order.
  """

  bundles: float
  flops: float
  bytes: float
  limits: tuple[str, ...]

  def seconds(self, chip: str) -> float:
    """The least that bundles or bytes take."""
    c = CHIPS[chip]
    return max(self.bundles / c.clock, self.bytes / c.bandwidth) / 1e9


def _figures(answer: dict, times: float, run: float = 1, gathered: float = 0) -> Figures | str:
  """Of an answer of ``measure``, so often, and of whose grid steps a part is run; or why there are none."""
  if "error" in answer:
    return answer["error"]
  rows = answer["rows"]
  total = lambda f: times * sum(map(f, rows))  # noqa: E731
  return Figures(
    run * total(lambda r: r["bundles"] * r["grid_steps"]),
    run * total(lambda r: r["flops"]),
    total(lambda r: r["bytes"]) + gathered,
    tuple(r.get("busiest", "") for r in rows),
  )


def _gathered(s: Shape, phase: str) -> float:
  """The bytes that XLA moves before and after the kernels of a key head, whose blocks are no parts of tiles.

  Each key is read and written as bfloat16, twice with gradients; that of each is float32 and is read, and its sum read
  and written.
  """
  if s.block_size % TILE == 0:
    return 0
  keys = s.length * s.top_k * s.block_size * s.key_dim
  return keys * (4 if phase == "forward" else 2 * 4 + 3 * 4)


def survey(chip: str, shapes: list[str]) -> dict[tuple[str, str], tuple]:
  """(shape, phase) -> figures of full and of block-sparse attention."""
  found = {}
  own = [f"block_sparse/{phase}/{name}" for name in shapes for phase in _PHASES]
  theirs = [f"{_FULL}{name},{phase}" for name in shapes for phase in _PHASES]
  for name, answer in measure(chip, [*own, *theirs]):
    found[name] = answer
    print(f"{len(found)}/{2 * len(own)} {name}", file=sys.stderr, flush=True)
  out, known = {}, cases()
  for name in shapes:
    s = SHAPES[name]
    blocks, heads = s.length // _BLOCK, s.heads // s.kv_heads
    for phase in _PHASES:
      case = f"block_sparse/{phase}/{name}"
      of_group = s.length * s.groups / s.kv_heads / known[case].units
      out[name, phase] = (
        _figures(
          found[f"{_FULL}{name},{phase}"], heads / min(heads, _HEADS), (blocks + 1) / (2 * blocks)
        ),
        _figures(found[case], of_group, gathered=_gathered(s, phase)),
      )
  return out


def table(chip: str, found: dict[tuple[str, str], tuple]) -> str:
  """As Markdown."""
  head = (
    "shape", "pass", "seen", "full, Mbundles", "ours, Mbundles", "full / ours", "full / ours, FLOPs", "ours, TFLOP",
    "ours, GB", "ours, ms at least", "limits of ours",
  )  # fmt: skip
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for (name, phase), (full_, ours) in found.items():
    s = SHAPES[name]
    first = [name, phase.replace("_", " + "), f"{s.top_k} x {s.block_size} of {s.length}"]
    if isinstance(ours, str) or isinstance(full_, str):
      lines.append(
        "| " + " | ".join([*first, str(ours if isinstance(ours, str) else full_)]) + " |"
      )
      continue
    cells = [
      f"{full_.bundles / 1e6:.1f}",
      f"{ours.bundles / 1e6:.1f}",
      f"{full_.seconds(chip) / ours.seconds(chip):.1f}",
      f"{full_.flops / ours.flops:.1f}",
      f"{ours.flops / 1e12:.2f}",
      f"{ours.bytes / 1e9:.2f}",
      f"{1e3 * ours.seconds(chip):.1f}",
      ", ".join(ours.limits),
    ]
    lines.append("| " + " | ".join([*first, *cells]) + " |")
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
  """The command line."""
  p = argparse.ArgumentParser(
    prog="python -m pallas_kernels.cost.attention",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument("--chip", default="v6e", choices=tuple(CHIPS))
  p.add_argument("--shapes", default=",".join(_SHAPES), help="of the shapes of block_sparse")
  p.add_argument("--out", type=pathlib.Path, help="folder of block_sparse_64k.md")
  a = p.parse_args(argv)
  shapes = a.shapes.split(",")
  if wrong := [name for name in shapes if name not in _SHAPES]:
    p.error(f"unknown shape {', '.join(wrong)}; known: {', '.join(_SHAPES)}")
  text = table(a.chip, survey(a.chip, shapes))
  print(text)
  if a.out:
    a.out.mkdir(parents=True, exist_ok=True)
    about = (
      f"# Block-sparse attention beside full causal attention, {a.chip}\n\n"
      f"One group of key heads, bfloat16, blocks chosen at random; libtpu {report.version('libtpu')}, "
      f"jax {jax.__version__}. What the columns are: `python -m pallas_kernels.cost.attention --help`.\n\n"
    )
    (a.out / "block_sparse_64k.md").write_text(about + text + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
