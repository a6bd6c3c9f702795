"""Three needles in haystacks, by mechanism and length: a small form of Gated DeltaNet's Table 2 (arXiv:2412.06464).

python -m experiments.niah [--size=cpu|gpu|paper] [--only=task=filtering] [--seeds=3]
"""

import dataclasses

from experiments.cells import Cell, Experiment, Prediction, Test, after_shift, better, config, layer
from experiments.harness import main

TASKS = ("retention", "filtering", "memorisation")
# DeltaNet has no output gate; what a decay does is seen beside mixers that have none either.
MIXERS = (
  "softmax", "mamba2", "deltanet",
  "gated_deltanet", "gated_deltanet ungated",
  "kda", "kda ungated",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    lengths: of the rows: the first is trained on, all are tested.
    vocab_size: of the hay.
    d_model, heads, head_dim, layers: of every model, with an MLP.
    steps, batch_size: of training. No run ends early: what is right at one length becomes right at others later.
    learning_rates: the grid.
  """

  lengths: tuple[int, ...]
  vocab_size: int
  d_model: int
  heads: int
  head_dim: int
  layers: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]


SIZES = {
  "cpu": Size((32, 64, 128, 256), 64, 64, 2, 16, 2, 400, 32, (5e-3, 1e-2)),
  "gpu": Size((512, 1024, 2048, 4096), 512, 256, 4, 64, 4, 4000, 64, (1e-3, 3e-3)),
  # The lengths of the paper, whose models are 1.3B and are trained on text: nothing here is its protocol.
  "paper": Size((1024, 2048, 4096, 8192), 4096, 512, 4, 128, 8, 20_000, 64, (5e-4, 1e-3)),
}


def cell(size: str, task: str, mixer: str) -> Cell:
  s = SIZES[size]
  own = layer(mixer, num_heads=s.heads, head_dim=s.head_dim)
  args = dict(vocab_size=s.vocab_size, label_slots=4 if size == "cpu" else 8)
  if task == "memorisation":
    args["value_size"] = 4 if size == "cpu" else 8
  c = config(
    after_shift(f"{s.layers}*{own}"), f"needle_{task}", args, seq_len=s.lengths[0], layers=s.layers,
    d_model=s.d_model, mlp=2 * s.d_model, steps=s.steps, batch_size=s.batch_size, eval_batches=16,
  )  # fmt: skip
  tests = tuple(Test({"length": n}, dict(seq_len=n), 1 / (s.vocab_size - 2)) for n in s.lengths)
  return Cell({"task": task, "mixer": mixer}, c, s.learning_rates, tests)


def cells(size: str) -> list[Cell]:
  return [cell(size, task, name) for name in MIXERS for task in TASKS]


def predictions(size: str) -> tuple[Prediction, ...]:
  mamba2, delta, gated = (dict(mixer=m) for m in ("mamba2", "deltanet", "gated_deltanet"))
  longest = dict(length=SIZES[size].lengths[-1])
  return (
    Prediction(
      "Retention at the longest length: DeltaNet, which never forgets by itself, is better than Mamba-2.",
      better(delta, mamba2, task="retention", **longest),
    ),
    Prediction(
      "Filtering at the longest length: Gated DeltaNet is better than DeltaNet.",
      better(gated, delta, task="filtering", **longest),
    ),
    Prediction(
      "Memorisation at the longest length: Gated DeltaNet is better than Mamba-2.",
      better(gated, mamba2, task="memorisation", **longest),
    ),
  )


EXPERIMENT = Experiment(
  name="niah",
  title="Needles in haystacks: keeping, finding and keeping much",
  about=(
    "A key and its value lie somewhere in the hay, and are asked for at the end. Retention: the hay is one phrase "
    "again and again. Filtering: random words. Memorisation: the same, and a value of many words. Trained at the "
    "first length, tested on that and longer ones; accuracy is a word's.\n\n"
    "Gated DeltaNet's paper tells of models of 1.3B trained on text; its values have no place beside these. What can "
    "be compared is the order of the mechanisms: there, decay costs retention, a gate helps to filter, and the delta "
    "rule helps to memorise. Attention to two tokens comes before models without a convolution: without it softmax "
    "attention learnt nothing. No other layer has position encoding. Ungated: without the output gate, which DeltaNet "
    "does not have."
  ),
  source="none: arXiv:2412.06464, Table 2, is of other models",
  cells=cells,
  plot={"x": "length", "line": "mixer", "facet": "task"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
