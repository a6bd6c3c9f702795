"""What an experiment is made of: cells, which are trained, and tests, which say how well."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from attnlab import accounting
from attnlab.config import resolve
from attnlab.mixers import configure, mixer
from attnlab.pattern import parse_pattern
from configs.base import base

Axes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Test:
  """One figure of a cell, on data that neither training nor the choice of a learning rate has seen.

  Attributes:
    axes: what it adds to the cell's axes, such as {"evaluated": 256}; may be empty.
    data: keys over the config's `data` section; `task_args` over its own.
    chance: the accuracy of guessing: 0 % in the report, perfect accuracy being 100 %.
    published: the paper's value in percent; None: there is none.
    measure: "accuracy" of targets; "rows": of examples, all of whose targets must be right; "indexer recall": the
      layers' own, of what their indexers choose; "bits" a byte of text, or "late bits", those of the second half of
      rows that are as long as the data says, which are told as they are: neither percent nor over chance.
    pattern: the model's in place of the one that was trained, with the same parameters; None: that one.
  """

  __test__ = False  # pytest's: not a class of tests

  axes: Axes = dataclasses.field(default_factory=dict)
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  chance: float = 0.0
  published: float | None = None
  measure: Literal["accuracy", "rows", "indexer recall", "bits", "late bits"] = "accuracy"
  pattern: str | None = None

  @property
  def is_bits(self) -> bool:
    return self.measure.endswith("bits")

  @property
  def spec(self) -> dict[str, Any]:
    """What determines its result, for experiments/worker.py."""
    more = {"measure": self.measure, "pattern": self.pattern}
    return dict(self.data) | {k: v for k, v in more.items() if v not in ("accuracy", None)}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One model on one task.

  Attributes:
    axes: what it is, by the names of the table's columns: {"task": "mqar", "length": 256, "mixer": "kda"}.
    config: complete but for the seed and the learning rate.
    learning_rates: the grid. The one with the best validation accuracy (of the first seed) is taken for all seeds.
    tests: its figures.
    facts: what makes more columns of the table, such as bytes at some length; they may be a plot's x.
  """

  axes: Axes
  config: ConfigDict
  learning_rates: tuple[float, ...]
  tests: tuple[Test, ...] = (Test(),)
  facts: Callable[[], Mapping[str, Any]] = dict


class NotKnown(Exception):
  """What a prediction is of has not been run."""


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Something that was expected before the experiment was run.

  Attributes:
    text: in words.
    holds: whether it held, of a function from axes to our value as the table tells it, which raises NotKnown where
      there is none yet.
  """

  text: str
  holds: Callable[[Callable[..., float]], bool]


def better(
  one: Axes, other: Axes, by: float = 0.0, **both: Any
) -> Callable[[Callable[..., float]], bool]:
  """What a prediction says: that one value is greater than another plus some points, which may be less than none.

  Args:
    one, other: the axes that tell the two apart.
    by: points.
    both: the axes that they share.
  """
  return lambda value: value(**one, **both) > value(**other, **both) + by


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A table.

  Attributes:
    name: of its module.
    title: a line.
    about: what is asked, and how; paragraphs are separated by empty lines.
    source: of the published values.
    cells: of a size, the cells.
    plot: names of axes: "x", "line", and "facet", each value of which has a plot of its own. x may also be a fact of
      the cells, a number: it is drawn on a logarithmic scale, and "columns", or the facet, are the table's.
    predictions: of a size, what was expected, written before it was run.
  """

  name: str
  title: str
  about: str
  source: str
  cells: Callable[[str], list[Cell]]
  plot: Mapping[str, str]
  predictions: Callable[[str], tuple[Prediction, ...]]


# A first layer that shows each token the one before it: attention over a window of two, which keeps nothing longer.
# It is for mixers without a convolution of their own: they would spend most of a short training on learning what the
# others are born with. (Before those it is in the way: with it Gated DeltaNet has learnt nothing of recall after 600
# updates, 18 %, and without it nearly all, 91 %. And it was a linear mixer's convolution once, whose state of one
# channel kept a needle for ever: with it, windows of 12 tokens found needles at any distance.)
SHIFT = "swa(num_heads=2, head_dim=16, window=2)"


def after_shift(period: str, times: int = 1) -> str:
  """The pattern of a period of layers so many times, after SHIFT if none of its mixers sees a token's neighbours."""
  alike = [period] * times
  return " + ".join(alike if _sees_neighbours(period) else [SHIFT, *alike])


def _sees_neighbours(pattern: str) -> bool:
  layers = parse_pattern(pattern).period
  configs = [configure(mixer(layer.mixer), dict(layer.settings)) for layer in layers]
  return any(getattr(c, "conv_size", 0) for c in configs) or any(
    layer.mixer.startswith("rwkv") for layer in layers
  )


def layer(
  name: str, *, num_heads: int, head_dim: int, rope: bool = False, conv_size: int | None = None
) -> str:
  """A layer of a table's mixer, as a pattern: its states are head_dim x head_dim a head.

  Args:
    name: of the registry, perhaps with " ungated", without output gate.
    rope: whether softmax attention has its position encoding; nothing else has one.
    conv_size: of the convolutions of those that have them, if it is not a mixer's own.
  """
  name, _, ungated = name.partition(" ")
  has = {field.name for field in dataclasses.fields(mixer(name).Config)}
  every: dict[str, float | None] = dict(
    num_heads=num_heads,
    head_dim=head_dim,
    state_dim=head_dim,
    value_dim=head_dim,
    conv_size=conv_size,
  )
  settings = {k: v for k, v in every.items() if k in has and v is not None}
  if name == "softmax" and not rope:
    settings["rope_fraction"] = 0.0
  if ungated:
    settings["output_gate"] = False
  return f"{name}({', '.join(f'{k}={v}' for k, v in settings.items())})"


def depth(pattern: str, layers: int) -> int:
  """How many layers a model has: SHIFT is one more."""
  return layers + pattern.startswith(SHIFT)


def config(
  pattern: str,
  task: str,
  task_args: Mapping[str, Any],
  *,
  seq_len: int,
  layers: int,
  d_model: int,
  mlp: int = 0,
  steps: int,
  batch_size: int,
  evaluations: int = 10,
  eval_batches: int = 8,
  stop_accuracy: float = 0.0,
) -> ConfigDict:
  """A cell's config under the recipe that all experiments share: AdamW without weight decay, 5 % warm-up, cosine.

  Args:
    pattern, layers, d_model, mlp: the model, layers without SHIFT; mlp 0: mixers alone.
    task, task_args, seq_len: what it is trained on, every example being new; task "text": bytes of the standard
      library's sources.
    steps, batch_size: of training, which ends early at stop_accuracy of validation (0: never).
    evaluations, eval_batches: how often it is validated, and on how many batches.
  """
  c = base()
  c.model.pattern = pattern
  c.model.num_layers, c.model.d_model = depth(pattern, layers), d_model
  c.model.mlp.hidden = mlp
  c.data.seq_len = seq_len
  if task == "text":
    c.train.sample_every = 0
    c.data.validation_half = 1  # The other half is the tests'.
  else:
    c.data.update(dict(name="task", task=task))
    c.data.task_args = ConfigDict({"train_examples": 1 << 22, **task_args})
  c.optim.update(dict(warmup_steps=steps // 20, weight_decay=0.0))
  c.train.update(dict(steps=steps, batch_size=batch_size, log_every=20, checkpoint_every=1000))
  c.train.update(dict(eval_every=steps // evaluations, eval_batches=eval_batches))
  c.train.stop_accuracy = stop_accuracy
  return c


def equal_mlp(pattern: str, reference: str, *, layers: int, d_model: int, mlp: int) -> int:
  """The MLP's width with which a model has as many parameters as another with MLPs of width `mlp`."""

  def parameters(pattern: str, mlp: int) -> int:
    c = base()
    c.model.pattern, c.model.num_layers, c.model.d_model = pattern, depth(pattern, layers), d_model
    c.model.mlp.hidden = mlp
    return _parameters(c.model.to_json_best_effort(sort_keys=True))

  target = parameters(reference, mlp)
  one = (parameters(reference, mlp + 1) - target) / depth(reference, layers)
  return max(1, mlp + round((target - parameters(pattern, mlp)) / one / depth(pattern, layers)))


@functools.lru_cache(maxsize=256)
def _parameters(model_json: str) -> int:
  c = base()
  c.model = ConfigDict(json.loads(model_json))
  return accounting.parameters(resolve(c).model)


def greatest(cost: Callable[[int], float], budget: float) -> int:
  """The greatest number from 1 whose cost is within a budget, the cost being nearly a straight line; at least 1."""
  one, two = cost(1), cost(2)
  n = max(1, 1 + int((budget - one) / (two - one)))
  while n > 1 and cost(n) > budget:
    n -= 1
  while cost(n + 1) <= budget:
    n += 1
  return n
