"""Parity, modular arithmetic and group words by mechanism, eigenvalue range and number of Householder steps.

python -m experiments.state_tracking [--size=cpu|gpu|paper] [--only=task=parity] [--seeds=3]
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.cells import Cell, Experiment, Prediction, Test, better, config
from experiments.harness import main


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained and tested.

  Attributes:
    label: heading of this task.
    name, args: of attnlab.tasks.
    chance: of guessing.
    layers: of the model.
    train: lengths in training, the shortest (0: all have the longest) and the longest.
    tests: longest lengths of tests, the first of them training's; later ones are of all lengths from there (group
      words: of the longest alone).
    steps, batch_size: of training. No run ends early: what is right on short words becomes right on longer ones later.
    prefixes: whether training has a target at every prefix of a word, not at its end alone (group words: always).
    heads: of every model.
    conv_size: of the short convolutions; 0: none, for they would do short words by themselves.
    optim: what differs from the recipe that all experiments share.
  """

  label: str
  name: str
  args: dict
  chance: float
  layers: int
  train: tuple[int, int]
  tests: tuple[int, ...]
  steps: int
  batch_size: int = 256
  prefixes: bool = False
  heads: int = 4
  conv_size: int = 0
  optim: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def data(self, shortest: int, longest: int, *, everywhere: bool) -> dict:
    """Keys of a config's `data` for examples of some lengths."""
    args = dict(self.args)
    if shortest:
      args |= dict(min_length=shortest, max_length=longest)
    if self.name == "group_word" or self.prefixes:
      args["everywhere"] = everywhere
    return dict(seq_len=longest + (longest % 2), task_args=args)


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    tasks: what is asked.
    d_model, head_dim, mlp: of every model; mlp 0: none.
    learning_rates: the grid.
    householder: numbers of Householder steps for group words.
  """

  tasks: tuple[Task, ...]
  d_model: int
  head_dim: int
  mlp: int
  learning_rates: tuple[float, ...]
  householder: tuple[int, ...]


def parity(layers: int, tests: tuple[int, ...], steps: int, **more: Any) -> Task:
  return Task("parity", "parity", {}, 1 / 2, layers, (3, 40), tests, steps, **more)


def arithmetic(layers: int, steps: int, *, brackets: bool = False, **more: Any) -> Task:
  name = "modular_arithmetic_brackets" if brackets else "modular_arithmetic"
  label = "arithmetic with brackets" if brackets else "arithmetic"
  return Task(label, name, dict(modulus=5), 1 / 5, layers, (3, 40), (40, 256), steps, **more)


def group(name: str, tests: tuple[int, ...], steps: int, **more: Any) -> Task:
  order = {"s3": 6, "s4": 24, "a5": 60, "s5": 120}[name]
  args = dict(group=name)
  return Task(name, "group_word", args, 1 / order, 1, (0, tests[0]), tests, steps, **more)


GROUPS = ("s3", "s4", "a5", "s5")
# arXiv:2411.12537, and arXiv:2502.10297: two million words a hundred times, of one element less than there.
UNLOCKING: dict[str, Any] = dict(conv_size=4, optim=dict(warmup_steps=2000, final_fraction=1e-3))
LONGER: dict[str, Any] = dict(
  conv_size=4, optim=dict(warmup_steps=10_000, final_fraction=1e-3, weight_decay=0.1)
)
PRODUCT: dict[str, Any] = dict(batch_size=2048, heads=12, optim=dict(weight_decay=1e-6))
SIZES = {
  "cpu": Size(
    (parity(1, (40, 128, 256), 300, batch_size=64), group("s3", (16, 64), 300)),
    128, 32, 0, (3e-3, 6e-3), (2,),
  ),
  "gpu": Size(
    (
      parity(2, (40, 128, 256), 1500),
      arithmetic(2, 1500),
      *(group(name, (64, 256), 1500) for name in GROUPS),
    ),
    128, 32, 256, (1e-3, 3e-3), (2, 4),
  ),
  # Of the rates the papers have the middle one.
  "paper": Size(
    (
      parity(2, (40, 256), 20_000, **UNLOCKING),
      arithmetic(2, 100_000, **LONGER),
      arithmetic(2, 100_000, brackets=True, **LONGER),
      *(group(name, (128, 512), 97_656, **PRODUCT) for name in GROUPS),
    ),
    128, 32, 256, (5e-4, 1e-3, 2e-3), (2, 3, 4),
  ),
}  # fmt: skip

# Scaled accuracy in percent at lengths of 40 to 256: Table 3 of arXiv:2411.12537 (best of three seeds; the later
# version's column with brackets), and for Gated DeltaNet and Mamba-2 Table 5b of arXiv:2603.15569.
PUBLISHED = {
  "softmax": (2.2, 3.1, 6.7),
  "mamba2": (0.9, 47.81, 0.88),
  "deltanet": (1.7, 31.4, 19.4),
  "deltanet negative": (100.0, 97.1, 26.0),
  "gated_deltanet negative": (100.0, 99.25, 93.5),
}
PUBLISHED_TASKS = ("parity", "arithmetic", "arithmetic with brackets")


def mechanisms(size: Size, task: Task) -> dict[str, str]:
  """Name in the table -> pattern."""
  heads = f"num_heads={task.heads}, head_dim={size.head_dim}"
  linear = f"{heads}, value_dim={size.head_dim}, conv_size={task.conv_size}"
  out = {
    "softmax": f"softmax({heads})",
    "mamba2": f"mamba2({heads}, state_dim={size.head_dim}, conv_size={task.conv_size})",
  }
  for negative in (False, True):
    more, end = f"negative_eigenvalues={negative}", " negative" * negative
    for name in ("deltanet", "gated_deltanet"):
      out[name + end] = f"{name}({linear}, {more})"
    for steps in size.householder:
      pattern = f"gated_delta_product({linear}, steps={steps}, forget_gate=False, {more})"
      out[f"delta_product {steps}{end}"] = pattern
  return out


def cell(s: Size, task: Task, name: str, pattern: str, published: float | None) -> Cell:
  """A mechanism on a task; what is published is of lengths 40 to 256."""
  training = task.data(*task.train, everywhere=True)
  c = config(
    pattern, task.name, training["task_args"], seq_len=training["seq_len"], layers=task.layers,
    d_model=s.d_model, mlp=s.mlp, steps=task.steps, batch_size=task.batch_size, evaluations=12,
  )  # fmt: skip
  c.optim.update(task.optim)
  tests, shortest = [], task.train[0]
  for longest in task.tests:
    data = task.data(shortest, longest, everywhere=False)
    value = published if longest == 256 else None
    tests.append(Test({"length": longest}, data, task.chance, value))
    if task.name == "group_word":
      data = task.data(shortest, longest, everywhere=True)
      axes = {"task": f"{task.label}, every prefix", "length": longest}
      tests.append(Test(axes, data, measure="rows"))
    shortest = task.train[1] if shortest else 0
  return Cell({"task": task.label, "mechanism": name}, c, s.learning_rates, tuple(tests))


def cells(size: str) -> list[Cell]:
  s, out = SIZES[size], []
  for task in s.tasks:
    for name, pattern in mechanisms(s, task).items():
      values = dict(zip(PUBLISHED_TASKS, PUBLISHED.get(name, ()), strict=False))
      out.append(cell(s, task, name, pattern, values.get(task.label)))
  return out


def predictions(size: str) -> tuple[Prediction, ...]:
  def parity(value, *names: str) -> list[float]:
    return [value(task="parity", mechanism=name, length=256) for name in names]

  return (
    Prediction(
      "DeltaNet and Gated DeltaNet with eigenvalues in [-1, 1] solve parity beyond the training length.",
      lambda value: min(parity(value, "deltanet negative", "gated_deltanet negative")) > 99,
    ),
    Prediction(
      "Nothing with eigenvalues in [0, 1] alone, and no softmax attention, comes a quarter of the way.",
      lambda value: max(parity(value, "softmax", "mamba2", "deltanet", "gated_deltanet")) < 25,
    ),
    Prediction(
      "On S3, two Householder steps a token are better by 20 points than one at four times the training length.",
      better(
        dict(mechanism="delta_product 2 negative"), dict(mechanism="deltanet negative"), 20, task="s3", length=64,
      ),
    ),
  )  # fmt: skip


EXPERIMENT = Experiment(
  name="state_tracking",
  title="State tracking: parity, modular arithmetic and group words",
  about=(
    "A state that is only ever shrunk cannot count modulo two: that needs an eigenvalue of -1, which the delta rule "
    "has where its step may be 2 (`negative`). Permutations of more things need more reflections a token. Trained on "
    "short words (the first `length`), tested on longer ones, of all lengths up to `length` (group words: of it).\n\n"
    "Accuracy is of the one answer at the end of a word; of group words also (`every prefix`) the share of words all "
    "of whose prefixes are right, which DeltaProduct's paper reports. The published values of parity and arithmetic "
    "are of lengths 40 to 256, after longer trainings than the CPU's, of two layers where that has one; those of "
    "Mamba-2 and Gated DeltaNet are of length 256, of one layer for parity and three for arithmetic."
  ),
  source="arXiv:2411.12537, Table 3; arXiv:2603.15569, Table 5b",
  cells=cells,
  plot={"x": "length", "line": "mechanism", "facet": "task"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
