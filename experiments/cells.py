"""What an experiment is made of: cells, which are trained, and tests, which say how well."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

Axes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Test:
  """One figure of a cell: accuracy on data that neither training nor the choice of a learning rate has seen.

  Attributes:
    axes: what it adds to the cell's axes, such as {"evaluated": 256}; may be empty.
    data: keys over the config's `data` section; `task_args` over its own.
    chance: the accuracy of guessing: 0 % in the report, perfect accuracy being 100 %.
    published: the paper's value in percent; None: there is none.
  """

  __test__ = False  # pytest's: not a class of tests

  axes: Axes = dataclasses.field(default_factory=dict)
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  chance: float = 0.0
  published: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
  """One model on one task.

  Attributes:
    axes: what it is, by the names of the table's columns: {"task": "mqar", "length": 256, "mixer": "kda"}.
    config: complete but for the seed and the learning rate.
    learning_rates: the grid. The one with the best validation accuracy (of the first seed) is taken for all seeds.
    tests: its figures.
  """

  axes: Axes
  config: ConfigDict
  learning_rates: tuple[float, ...]
  tests: tuple[Test, ...] = (Test(),)


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Something that was expected before the experiment was run.

  Attributes:
    text: in words.
    holds: of a function from axes to our value in percent (None: not run), whether it held; None: not known yet.
  """

  text: str
  holds: Callable[[Callable[..., float | None]], bool | None]


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A table.

  Attributes:
    name: of its module.
    title: a line.
    about: what is asked, and how; paragraphs are separated by empty lines.
    source: of the published values.
    cells: of a size, the cells.
    plot: names of axes: "x", "line", and "facet", each value of which has a plot of its own.
    predictions: written before it was run.
  """

  name: str
  title: str
  about: str
  source: str
  cells: Callable[[str], list[Cell]]
  plot: Mapping[str, str]
  predictions: tuple[Prediction, ...] = ()
