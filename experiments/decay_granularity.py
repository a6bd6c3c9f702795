"""What a decay a channel, a convolution and a delta rule are worth: one part changed at a time.

python -m experiments.decay_granularity [--size=cpu|gpu|paper] [--only=task=recall] [--seeds=3]
"""

import dataclasses

from experiments.cells import Cell, Experiment, Prediction, Test, better, config
from experiments.harness import main


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    length: of a row.
    vocab_size, pairs: of recall.
    head_dim: of keys and values; two layers of two heads, mixers alone.
    d_model, steps, batch_size: of every model; training ends early at 99.5 % of validation.
    learning_rates: the grid.
  """

  length: int
  vocab_size: int
  pairs: int
  head_dim: int
  d_model: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]


SIZES = {
  "cpu": Size(32, 64, 6, 16, 64, 600, 32, (5e-3, 1e-2)),
  "gpu": Size(512, 1024, 64, 64, 256, 2000, 64, (1e-3, 2e-3)),
  "paper": Size(2048, 8192, 256, 128, 256, 20_000, 64, (1e-4, 5e-4, 1e-3)),
}

# Decay x update. The delta rule is that of DeltaNet, Gated DeltaNet and KDA; the sum that of linear
# attention and GLA. (A sum with one rate a head is Mamba-2, which has another step and layout; RetNet's rate is fixed.)
MIXERS = {
  ("none", "sum"): "linear_attention",
  ("a constant", "sum"): "retnet",
  ("a head", "sum"): "mamba2",
  ("a channel", "sum"): "gla",
  ("none", "delta"): "deltanet",
  ("a head", "delta"): "gated_deltanet",
  ("a channel", "delta"): "kda",
}
TASKS = ("palindrome", "recall")
# What is taken away from a mechanism, and of which: those that have it and can do without.
GATED = ("gated_deltanet", "kda")
PARTS = {
  "convolution": ("", tuple(MIXERS.values())),
  "no convolution": (", conv_size=0", tuple(MIXERS.values())),
  "no output gate": (", output_gate=False", GATED),
  "no norm of q and k": (", qk_norm=False", GATED),
}


def pattern(s: Size, mixer: str, part: str) -> str:
  values = "state_dim" if mixer == "mamba2" else "value_dim"
  shape = f"num_heads=2, head_dim={s.head_dim}, {values}={s.head_dim}"
  conv = ", conv_size=4" if "conv_size" not in PARTS[part][0] else ""
  return f"{mixer}({shape}{conv}{PARTS[part][0]})"


def cell(size: str, task: str, decay: str, update: str, part: str) -> Cell:
  s = SIZES[size]
  name, args, chance = {
    "palindrome": ("palindrome", dict(vocab_size=64), 1 / 63),
    "recall": (
      "mqar",
      dict(vocab_size=s.vocab_size, num_kv_pairs=s.pairs, random_non_queries=False),
      2 / s.vocab_size,
    ),
  }[task]
  c = config(
    pattern(s, MIXERS[decay, update], part), name, args, seq_len=s.length, layers=2,
    d_model=s.d_model, steps=s.steps, batch_size=s.batch_size, stop_accuracy=0.995,
  )  # fmt: skip
  c.model.vocab_size = max(64, s.vocab_size)  # One program a model for both tasks.
  c.data.task_args.label_slots = s.length
  axes = {"task": task, "decay": decay, "update": f"{update}, {part}"}
  return Cell(axes, c, s.learning_rates, (Test(chance=chance),))


def cells(size: str) -> list[Cell]:
  return [
    cell(size, task, *key, part)
    for part, (_, which) in PARTS.items()
    for key, mixer in MIXERS.items()
    if mixer in which
    for task in TASKS
  ]


def predictions(size: str) -> tuple[Prediction, ...]:
  return (
    Prediction(
      "Palindrome: with the delta rule, a decay for each channel is better than one for each head.",
      better(dict(decay="a channel"), dict(decay="a head"), task="palindrome", update="delta, convolution"),
    ),
    Prediction(
      "Recall: without decay, the delta rule is better than the sum by 10 points.",
      better(dict(update="delta, convolution"), dict(update="sum, convolution"), 10, task="recall", decay="none"),
    ),
    Prediction(
      "Recall: without the convolution, Gated DeltaNet loses 20 points.",
      better(
        dict(update="delta, convolution"), dict(update="delta, no convolution"), 20, task="recall", decay="a head",
      ),
    ),
  )  # fmt: skip


EXPERIMENT = Experiment(
  name="decay_granularity",
  title="Decay: none, constant, a head, a channel; with and without delta rule and convolution",
  about=(
    "Seven mechanisms are one table of two parts: how finely the state is decayed, and whether a new value is added "
    "to the old one or takes its place (the delta rule). Each with its short convolution and without; Gated DeltaNet "
    "and KDA also without their output gates, and without the norm of their queries and keys. Heads, states and "
    "training are the same.\n\n"
    "Mechanisms keep their own output gates and norms, so a column is not one part alone: Mamba-2 has a wider output "
    "and its own step, RetNet rotates its keys."
  ),
  source="none",
  cells=cells,
  plot={"x": "decay", "line": "update", "facet": "task"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
