"""How tensors of a checkpoint become parameters, and back: functions with their inverses."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weights:
  """Some parameters, and the tensors that say the same.

  Attributes:
    ours: paths of the parameters within a layer ("mixer.q_proj.kernel"), or within the model.
    theirs: names of the tensors.
    read: the tensors, in that order, to the parameters.
    write: its inverse.
  """

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  read: Callable[[Arrays], Arrays]
  write: Callable[[Arrays], Arrays]


def one(
  ours: str,
  theirs: str,
  read: Callable[[np.ndarray], np.ndarray] = lambda x: x,
  write: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> Weights:
  """A parameter that is a tensor, changed."""
  return Weights((ours,), (theirs,), lambda x: [read(x[0])], lambda x: [write(x[0])])


def linear(ours: str, theirs: str) -> Weights:
  """The kernel of a Linear without bias: [inputs, outputs], theirs [outputs, inputs]."""
  return one(f"{ours}.kernel", f"{theirs}.weight", np.transpose, np.transpose)


def times(weights: Weights, factor: float | np.ndarray) -> Weights:
  """The same, the first parameter of which is ``factor`` times as large, a number for each of its outputs or one."""
  by = np.float32(factor)

  def read(tensors: Arrays) -> Arrays:
    first, *rest = weights.read(tensors)
    return [first * by, *rest]

  def write(parameters: Arrays) -> Arrays:
    first, *rest = parameters
    return weights.write([first / by, *rest])

  return Weights(weights.ours, weights.theirs, read, write)


def norm(ours: str, theirs: str, *, around_one: bool = False) -> Weights:
  """The scale of a norm; theirs is ``1 + weight`` where it is kept around one."""
  add = np.float32(around_one)
  return one(f"{ours}.scale", f"{theirs}.weight", lambda x: x + add, lambda x: x - add)


def our_taps(x: np.ndarray) -> np.ndarray:
  """A ShortConv's weight [width, channels] of theirs [channels, 1, width]."""
  return x[:, 0].T


def their_taps(x: np.ndarray) -> np.ndarray:
  return x.T[:, None]


def taps(ours: str, theirs: str) -> Weights:
  """The weight of a ShortConv."""
  return one(f"{ours}.weight", f"{theirs}.weight", our_taps, their_taps)


def stacked(ours: str, theirs: Sequence[str]) -> Weights:
  """Kernels that are one parameter [experts, inputs, outputs], theirs one by one [outputs, inputs]."""
  read = lambda each: [np.stack([x.T for x in each])]  # noqa: E731
  return Weights((ours,), tuple(f"{t}.weight" for t in theirs), read, lambda x: [e.T for e in x[0]])


def parts(
  ours: Sequence[str],
  theirs: str,
  counts: Sequence[int],
  read: Callable[[np.ndarray], np.ndarray] = lambda x: x,
  write: Callable[[np.ndarray], np.ndarray] = lambda x: x,
  groups: int = 1,
) -> Weights:
  """Several parameters that are one tensor's rows.

  Args:
    ours: their paths.
    theirs: the tensor [rows, ...].
    counts: how many of its rows each has, in turn, in every group.
    read, write: what makes of its rows a parameter, and back.
    groups: the rows are so many groups, of which each parameter has the same part (heads, say).
  """
  at = np.cumsum(counts)[:-1]

  def read_all(tensors: Arrays) -> Arrays:
    x = tensors[0].reshape(groups, sum(counts), *tensors[0].shape[1:])
    return [read(part.reshape(-1, *x.shape[2:])) for part in np.split(x, at, axis=1)]

  def write_all(parameters: Arrays) -> Arrays:
    made = [write(p) for p in parameters]
    cut = [x.reshape(groups, n, *x.shape[1:]) for x, n in zip(made, counts, strict=True)]
    return [np.concatenate(cut, axis=1).reshape(-1, *made[0].shape[1:])]

  return Weights(tuple(ours), (theirs,), read_all, write_all)


def rows(ours: Sequence[str], theirs: str, counts: Sequence[int], groups: int = 1) -> Weights:
  """``parts`` that are the kernels of Linears, whose outputs the rows are."""
  kernels = [f"{name}.kernel" for name in ours]
  return parts(kernels, theirs, counts, np.transpose, np.transpose, groups)
