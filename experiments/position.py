"""Rotary, partly rotary or no position encoding in hybrids, and what becomes of longer rows.

python -m experiments.position [--size=cpu|gpu|paper] [--only=layers=hybrid] [--seeds=3]
"""

import dataclasses

from experiments.cells import (
  Cell,
  Experiment,
  Prediction,
  Test,
  after_shift,
  better,
  config,
  equal_mlp,
)
from experiments.harness import main

# What the share of rotated channels is called.
POSITIONS = {"RoPE": 1.0, "a quarter RoPE": 0.25, "none": 0.0}
TASKS = ("recall", "needle")


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    length: of a row in training; tests are at 1, 2, 4 and 8 times as much.
    vocab_size, pairs: of recall; the needle has the same words.
    head_dim: of keys and values; two heads.
    d_model, mlp: of softmax attention's model; the hybrid's MLPs make up for their parameters.
    layers: of every model; a multiple of four.
    steps, batch_size: of training. No run ends early: what is right at one length becomes right at others later.
    learning_rates: the grid.
  """

  length: int
  vocab_size: int
  pairs: int
  head_dim: int
  d_model: int
  mlp: int
  layers: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]


SIZES = {
  "cpu": Size(32, 64, 4, 16, 64, 64, 4, 600, 32, (5e-3, 1e-2)),
  "gpu": Size(512, 1024, 32, 64, 256, 512, 8, 5000, 64, (1e-3, 2e-3)),
  "paper": Size(2048, 8192, 128, 128, 512, 1024, 12, 30_000, 64, (2.5e-4, 5e-4, 1e-3)),
}
TIMES = (1, 2, 4, 8)
FAR = {"training lengths": TIMES[-1]}


def pattern(s: Size, layers: str, position: str) -> str:
  heads = f"num_heads=2, head_dim={s.head_dim}"
  full = f"softmax({heads}, rope_fraction={POSITIONS[position]})"
  if layers == "softmax":
    return after_shift(f"{s.layers}*{full}")
  # Without the output gate, which softmax attention does not have either.
  linear = f"gated_deltanet({heads}, value_dim={s.head_dim}, output_gate=False)"
  return after_shift(f"3*{linear} + {full}", s.layers // 4)


def cell(size: str, task: str, layers: str, position: str) -> Cell:
  s = SIZES[size]
  name, args, chance = {
    "recall": (
      "mqar",
      dict(num_kv_pairs=s.pairs, power_a=1.0, random_non_queries=False),
      2 / s.vocab_size,
    ),
    "needle": ("needle_filtering", {}, 1 / (s.vocab_size - 2)),
  }[task]
  model = dict(layers=s.layers, d_model=s.d_model)
  mlp = equal_mlp(pattern(s, layers, position), pattern(s, "softmax", "RoPE"), mlp=s.mlp, **model)
  args |= dict(vocab_size=s.vocab_size, label_slots=s.pairs)  # One program a model for both tasks.
  c = config(
    pattern(s, layers, position), name, args, seq_len=s.length, mlp=mlp, steps=s.steps,
    batch_size=s.batch_size, evaluations=5, **model,
  )  # fmt: skip
  tests = tuple(Test({"training lengths": n}, dict(seq_len=n * s.length), chance) for n in TIMES)
  axes = {"task": task, "layers": layers, "position": position}
  axes["model"] = f"{layers}, {'no position' if position == 'none' else position}"
  return Cell(axes, c, s.learning_rates, tests)


def cells(size: str) -> list[Cell]:
  return [
    cell(size, task, layers, position)
    for layers in ("softmax", "hybrid")
    for position in POSITIONS
    for task in TASKS
  ]


def predictions(size: str) -> tuple[Prediction, ...]:
  return (
    Prediction(
      "Recall at eight times the length: a hybrid without position encoding is better than one with RoPE.",
      better(dict(position="none"), dict(position="RoPE"), task="recall", layers="hybrid", **FAR),
    ),
    Prediction(
      "Recall at eight times the length: a hybrid with RoPE is better than softmax attention with RoPE.",
      better(dict(layers="hybrid"), dict(layers="softmax"), task="recall", position="RoPE", **FAR),
    ),
    Prediction(
      "Needle at eight times the length: a hybrid without position encoding is better than softmax attention "
      "without.",
      better(dict(layers="hybrid"), dict(layers="softmax"), task="needle", position="none", **FAR),
    ),
  )  # fmt: skip


EXPERIMENT = Experiment(
  name="position",
  title="Position encoding in hybrids, and longer rows",
  about=(
    "Linear layers know the order of tokens by themselves; do the softmax layers of a hybrid need it said again? "
    "Rotary encoding of all channels, of a quarter (Qwen3-Next) or of none (Kimi Linear), in hybrids of three Gated "
    "DeltaNet layers to one and in softmax attention alone; none has an output gate. Trained at one length, tested at "
    "up to eight times as much. Attention to two tokens comes before softmax attention alone, in place of the others' "
    "convolutions, so that none has to learn which token came before; all have as many parameters, by the width of "
    "their MLPs."
  ),
  source="none",
  cells=cells,
  plot={"x": "training lengths", "line": "model", "facet": "task"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
