"""What a synthetic task is, and how tasks are found by name."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32

from attnlab import errors
from attnlab.digest import digest
from attnlab.errors import UserError

_TASKS: dict[str, type["Task"]] = {}


class Example(NamedTuple):
  """One row of a task, at most seq_len long.

  Attributes:
    inputs: ids in [0, vocab_size).
    targets: id to predict at each position; anything (0, say) where the weight is 0.
    weights: weight of each position in the loss and in accuracy.
  """

  inputs: Int32[np.ndarray, " n"]
  targets: Int32[np.ndarray, " n"]
  weights: Float32[np.ndarray, " n"]


def labelled(
  inputs: Int[np.ndarray, " n"],
  where: Int[np.ndarray, " labels"],
  values: Int[np.ndarray, " labels"],
) -> Example:
  """An example whose targets are `values` at the positions `where`, and that has no others."""
  targets = np.zeros(len(inputs), np.int32)
  weights = np.zeros(len(inputs), np.float32)
  targets[where], weights[where] = values, 1.0
  return Example(np.asarray(inputs, np.int32), targets, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
  """A synthetic task: its parameters are dataclass fields, which `data.task_args` sets.

  A task also has `vocab_size: int`, as a field or as a property. It keeps no state: an example
    comes from the generator that it is handed, which depends on the seed, the split and the
    example's number alone.

  Attributes:
    train_examples: examples of an epoch. A finite training set, as in the papers: a very large
      number makes every example new.
    validation_examples: examples of validation, the same for every seed of a run.
    label_slots: a row's labels are given at least so many places; tasks with equally many share a compiled program.
  """

  train_examples: int = 100_000
  validation_examples: int = 3_000
  label_slots: int = 0

  @abc.abstractmethod
  def check(self, seq_len: int) -> None:
    """Raises UserError if the parameters do not go together or do not fit into seq_len."""

  def labels(self, seq_len: int) -> int:
    """At most so many positions of a row have a label. The loss needs no logits at the others."""
    return seq_len

  @abc.abstractmethod
  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    """One example, drawn from `rng` alone."""


def register(name: str) -> Callable[[type[Task]], type[Task]]:
  """Class decorator: makes a task known as `data.task=name`."""

  def decorate(cls: type[Task]) -> type[Task]:
    if name in _TASKS and _TASKS[name].__qualname__ != cls.__qualname__:
      raise ValueError(f"two tasks are called {name!r}: {_TASKS[name]} and {cls}")
    _TASKS[name] = cls
    return cls

  return decorate


def names() -> list[str]:
  return sorted(_TASKS)


def make(name: str, args: Mapping[str, Any]) -> Task:
  """A task by name.

  Args:
    name: as registered.
    args: over its defaults.

  Raises:
    UserError: unknown name or argument, or an argument of another type than its default.
  """
  if name not in _TASKS:
    raise errors.unknown("task (config.data.task)", name, _TASKS)
  cls = _TASKS[name]
  fields = {f.name: f for f in dataclasses.fields(cls)}
  values = {}
  for key, value in args.items():
    if key not in fields:
      raise errors.unknown(f"key in config.data.task_args of task {name!r},", key, fields)
    default = fields[key].default
    if isinstance(default, float) and type(value) is int:
      value = float(value)
    if default is not dataclasses.MISSING and type(value) is not type(default):
      raise UserError(
        f"config.data.task_args.{key}={value!r}: task {name!r} takes a {type(default).__name__}, "
        f"such as {default!r}"
      )
    values[key] = value
  task = cls(**values)
  for key in ("train_examples", "validation_examples"):
    if getattr(task, key) < 1:
      raise UserError(f"config.data.task_args.{key}={getattr(task, key)}: at least 1")
  return task


class TaskSource:
  """A task's examples as grain's random-access source: example i is a function of (seed, split, i).

  Args:
    task: the task.
    seq_len: positions of a row; shorter examples are padded.
    seed: of the examples; not negative.
    split: "train" or "validation".
  """

  def __init__(self, task: Task, seq_len: int, seed: int, split: str):
    self._task, self._seq_len, self._seed, self._split = task, seq_len, seed, split

  def __len__(self) -> int:
    return getattr(self._task, f"{self._split}_examples")

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    split = ("train", "validation").index(self._split)
    rng = np.random.default_rng([self._seed, split, int(i)])
    example = self._task.example(rng, self._seq_len)
    n = len(example.inputs)
    row: dict[str, Any] = {key: np.zeros(self._seq_len, np.int32) for key in ("inputs", "targets")}
    row["weights"] = np.zeros(self._seq_len, np.float32)
    for key, value in example._asdict().items():
      row[key][:n] = value
    row["segment_ids"] = np.zeros(self._seq_len, np.int32)
    row["segment_ids"][:n] = 1
    row["positions"] = np.arange(self._seq_len, dtype=np.int32) * row["segment_ids"]
    # Where labels are, filled up with places where there are none.
    labels = self._task.labels(self._seq_len)
    if np.count_nonzero(row["weights"]) > labels:
      raise ValueError(f"{self._task} has more labels in a row than it says")
    places = np.argsort(row["weights"] == 0, kind="stable").astype(np.int32)
    row["labels"] = places[: max(labels, self._task.label_slots)]
    row["index"] = np.int32(i)
    return row

  def name(self, i: int) -> str:
    return f"{self._split} example {i} of {self._task}, seed {self._seed}"

  def identity(self) -> str:
    # The first example too: a task may come to mean something else by the same settings.
    first = digest(*self[0].values())
    return f"{self._task} {self._seq_len} {self._seed} {self._split} {first}"
