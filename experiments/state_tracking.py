"""Parity, modular arithmetic and group words by mechanism, eigenvalue range and number of Householder steps.

python -m experiments.state_tracking [--size=cpu|gpu|paper] [--only=task=parity] [--seeds=3]
"""

import dataclasses

from experiments.cells import Cell, Experiment, Prediction, Test, config
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
    tests: longest lengths of tests; the shortest is the one before it, or all have the longest.
    batch_size: of training.
    prefixes: whether training has a target at every prefix of a word, not at its end alone (group words: always).
  """

  label: str
  name: str
  args: dict
  chance: float
  layers: int
  train: tuple[int, int]
  tests: tuple[int, ...]
  batch_size: int = 256
  prefixes: bool = False

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
    d_model, heads, head_dim, mlp: of every model; mlp 0: none.
    steps: of training. No run ends early: what is right on short words becomes right on longer ones later.
    learning_rates: the grid.
    householder: numbers of Householder steps for group words.
  """

  tasks: tuple[Task, ...]
  d_model: int
  heads: int
  head_dim: int
  mlp: int
  steps: int
  learning_rates: tuple[float, ...]
  householder: tuple[int, ...]


def arithmetic(label: str, brackets: bool, layers: int, tests: tuple[int, ...]) -> Task:
  name = "modular_arithmetic_brackets" if brackets else "modular_arithmetic"
  return Task(label, name, dict(modulus=5), 1 / 5, layers, (3, 40), tests)


def _group(name: str, train: int, tests: tuple[int, ...], layers: int = 1) -> Task:
  order = {"s3": 6, "s4": 24, "a5": 60, "s5": 120}[name]
  return Task(name, "group_word", dict(group=name), 1 / order, layers, (0, train), tests)


SIZES = {
  "cpu": Size(
    (
      Task("parity", "parity", {}, 1 / 2, 1, (3, 40), (40, 128, 256), batch_size=64),
      _group("s3", 16, (16, 64)),
    ),
    128, 4, 32, 0, 300, (3e-3, 6e-3), (2,),
  ),
  "gpu": Size(
    (
      Task("parity", "parity", {}, 1 / 2, 2, (3, 40), (40, 128, 256)),
      arithmetic("arithmetic", False, 2, (40, 256)),
      *(_group(g, 64, (64, 256)) for g in ("s3", "s4", "a5", "s5")),
    ),
    128, 4, 32, 256, 10_000, (1e-3, 3e-3), (2, 3, 4),
  ),
  # Parity and arithmetic as in arXiv:2411.12537, group words as in arXiv:2502.10297.
  "paper": Size(
    (
      Task("parity", "parity", {}, 1 / 2, 2, (3, 40), (40, 256)),
      arithmetic("arithmetic", False, 2, (40, 256)),
      arithmetic("arithmetic with brackets", True, 2, (40, 256)),
      *(_group(g, 128, (128, 512)) for g in ("s3", "s4", "a5", "s5")),
    ),
    128, 12, 32, 256, 100_000, (5e-4, 1e-3, 2e-3), (2, 3, 4),
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


def mechanisms(size: Size) -> dict[str, str]:
  """Name in the table -> pattern. Without convolutions, which would do short words by themselves."""
  heads = f"num_heads={size.heads}, head_dim={size.head_dim}"
  linear = f"{heads}, value_dim={size.head_dim}, conv_size=0"
  out = {
    "softmax": f"softmax({heads})",
    "mamba2": f"mamba2({heads}, state_dim={size.head_dim}, conv_size=0)",
  }
  for name in ("deltanet", "gated_deltanet"):
    for negative in (False, True):
      out[f"{name} negative" if negative else name] = (
        f"{name}({linear}, negative_eigenvalues={negative})"
      )
  for steps in size.householder:
    pattern = f"gated_delta_product({linear}, steps={steps}, forget_gate=False)"
    out[f"delta_product {steps} negative"] = pattern
  return out


def cell(s: Size, task: Task, name: str, pattern: str, published: float | None) -> Cell:
  """A mechanism on a task; what is published is of the tests at 256."""
  training = task.data(*task.train, everywhere=True)
  c = config(
    pattern, task.name, training["task_args"], seq_len=training["seq_len"], layers=task.layers,
    d_model=s.d_model, mlp=s.mlp, steps=s.steps, batch_size=task.batch_size, evaluations=12,
  )  # fmt: skip
  tests, shortest = [], task.train[0]
  for longest in task.tests:
    data = task.data(shortest, longest, everywhere=False)
    value = published if longest == 256 else None
    tests.append(Test({"length": longest}, data, task.chance, value))
    if task.name == "group_word":
      data = task.data(shortest, longest, everywhere=True)
      axes = {"task": f"{task.label}, every prefix", "length": longest}
      tests.append(Test(axes, data, measure="rows"))
    shortest = longest if shortest else 0
  return Cell({"task": task.label, "mechanism": name}, c, s.learning_rates, tuple(tests))


def cells(size: str) -> list[Cell]:
  s, out = SIZES[size], []
  for task in s.tasks:
    for name, pattern in mechanisms(s).items():
      values = dict(zip(PUBLISHED_TASKS, PUBLISHED.get(name, ()), strict=False))
      out.append(cell(s, task, name, pattern, values.get(task.label)))
  return out


def parity(names: tuple[str, ...], solved: bool):
  """That mechanisms solve parity at the greatest length, or that none does better than a quarter of the way."""

  def holds(value):
    got = [value(task="parity", mechanism=name, length=256) for name in names]
    if None in got:
      return None
    return all(x > 99 for x in got) if solved else all(x < 25 for x in got)

  return holds


def steps_help(value) -> bool | None:
  longest = [
    value(task="s3", mechanism=m, length=64)
    for m in ("delta_product 2 negative", "deltanet negative")
  ]
  if None in longest:
    return None
  return longest[0] > longest[1] + 20


EXPERIMENT = Experiment(
  name="state_tracking",
  title="State tracking: parity, modular arithmetic and group words",
  about=(
    "A state that is only ever shrunk cannot count modulo two: that needs an eigenvalue of -1, which the delta rule "
    "has where its step may be 2 (`negative`). Permutations of more things need more reflections a token. Trained on "
    "short words, tested on longer ones: words are from the length before `length` to it (group words: of it).\n\n"
    "Accuracy is of the one answer at the end of a word; of group words also (`every prefix`) the share of words all "
    "of whose prefixes are right, which DeltaProduct's paper reports. The published values of parity and arithmetic "
    "are of lengths 40 to 256."
  ),
  source="arXiv:2411.12537, Table 3; arXiv:2603.15569, Table 5b",
  cells=cells,
  plot={"x": "length", "line": "mechanism", "facet": "task"},
  predictions=(
    Prediction(
      "DeltaNet and Gated DeltaNet with eigenvalues in [-1, 1] solve parity beyond the training length.",
      parity(("deltanet negative", "gated_deltanet negative"), True),
    ),
    Prediction(
      "Nothing with eigenvalues in [0, 1] alone, and no softmax attention, does.",
      parity(("softmax", "mamba2", "deltanet", "gated_deltanet"), False),
    ),
    Prediction(
      "On S3, two Householder steps a token are better than one at four times the training length.",
      steps_help,
    ),
  ),
)  # fmt: skip

if __name__ == "__main__":
  main(EXPERIMENT)
