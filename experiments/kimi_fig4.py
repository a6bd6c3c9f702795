"""Palindrome, MQAR and stacks by length: Kimi Linear's Figure 4 (arXiv:2510.26692, section 5.1).

python -m experiments.kimi_fig4 [--size=cpu|gpu|paper] [--only=task=stack] [--seeds=3]
"""

import dataclasses

from experiments.cells import Cell, Experiment, Prediction, Test, better, config, layer
from experiments.harness import main

TASKS = ("palindrome", "mqar", "stack")
MIXERS = ("kda", "gated_deltanet", "gated_deltanet ungated", "mamba2")


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    lengths: of the rows.
    head_dim: of keys and values; every model has two layers of two heads, mixers alone.
    d_model: width.
    steps, batch_size: of training, which ends early at 99.5 % of validation.
    learning_rates: the grid.
  """

  lengths: tuple[int, ...]
  head_dim: int
  d_model: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]


SIZES = {
  "cpu": Size((16, 32), 16, 64, 600, 32, (5e-3, 1e-2)),
  "gpu": Size((256, 512), 64, 256, 3500, 64, (1e-3, 2e-3)),
  # The paper's lengths, heads, updates and grid. It does not state batch, width and vocabulary.
  "paper": Size((256, 512, 1024, 2048), 128, 256, 20_000, 64, (5e-5, 1e-4, 5e-4, 1e-3)),
}

# Read off the figure (error about half a point): peak accuracy in training, by length.
PUBLISHED = {
  ("palindrome", "kda"): (100, 100, 100, 42.2),
  ("palindrome", "gated_deltanet"): (100, 100, 97.0, 37.1),
  ("palindrome", "mamba2"): (100, 0, 0, 0),
  ("mqar", "kda"): (100, 100, 100, 47.6),
  ("mqar", "gated_deltanet"): (100, 100, 78.7, 29.1),
  ("mqar", "mamba2"): (97.6, 0, 0, 0),
  ("stack", "kda"): (100, 100, 100, 100),
  ("stack", "gated_deltanet"): (100, 100, 100, 100),
  ("stack", "mamba2"): (100, 100, 0, 0),
}
PUBLISHED_LENGTHS = (256, 512, 1024, 2048)


def task_args(task: str, size: str, length: int) -> dict:
  """The paper states 64 stacks, and no more."""
  ids = {"cpu": 128, "gpu": 1024, "paper": 8192}[size]
  return {
    "palindrome": dict(vocab_size=64),
    "mqar": dict(vocab_size=ids, num_kv_pairs=3 * length // 16, random_non_queries=False),
    "stack": dict(stacks=8 if size == "cpu" else 64, elements=64),
  }[task]


def cell(size: str, task: str, length: int, name: str) -> Cell:
  s = SIZES[size]
  c = config(
    layer(name, num_heads=2, head_dim=s.head_dim), task, task_args(task, size, length),
    seq_len=length, layers=2, d_model=s.d_model, steps=s.steps, batch_size=s.batch_size,
    evaluations=12, stop_accuracy=0.995,
  )  # fmt: skip
  published = None
  peaks = PUBLISHED.get((task, name))
  if peaks and size == "paper":  # The other sizes' tasks and trainings are others.
    published = peaks[PUBLISHED_LENGTHS.index(length)]
  axes = {"task": task, "length": length, "mixer": name}
  # Of the letters, of the values (half of the ids), of what may be pushed.
  chance = {
    "palindrome": 1 / 63,
    "mqar": 2 / c.data.task_args.get("vocab_size", 2),
    "stack": 1 / 64,
  }
  return Cell(axes, c, s.learning_rates, (Test(chance=chance[task], published=published),))


def cells(size: str) -> list[Cell]:
  lengths = SIZES[size].lengths
  return [cell(size, t, n, m) for t in TASKS for n in lengths for m in MIXERS]


def predictions(size: str) -> tuple[Prediction, ...]:
  def in_order(good: str, worse: str):
    longest = dict(length=SIZES[size].lengths[-1])
    each = [better(dict(mixer=good), dict(mixer=worse), -1, task=t, **longest) for t in TASKS]
    return lambda value: all([holds(value) for holds in each])

  return (
    Prediction(
      "KDA is at least as good as Gated DeltaNet, within a point, on every task at the longest length.",
      in_order("kda", "gated_deltanet"),
    ),
    Prediction(
      "Gated DeltaNet is at least as good as Mamba-2, within a point, on every task at the longest length.",
      in_order("gated_deltanet", "mamba2"),
    ),
  )


EXPERIMENT = Experiment(
  name="kimi_fig4",
  title="Palindrome, recall and stacks by length (Kimi Linear, Figure 4)",
  about=(
    "Two layers of two heads, mixers alone: how long a word can be said backwards, how many pairs recalled, how many "
    "operations on stacks followed? All have states of the same size (Mamba-2 but for its convolutions). Ungated: "
    "without the output gate.\n\n"
    "The paper reports the peak accuracy in training and does not state batch, width, vocabulary and number of "
    "pairs; compare the order of the mechanisms, not the values. At the CPU's size, states, lengths and vocabularies "
    "are small, and nothing published corresponds."
  ),
  source="arXiv:2510.26692, Figure 4, read off the drawing (error about half a point)",
  cells=cells,
  plot={"x": "length", "line": "mixer", "facet": "task"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
