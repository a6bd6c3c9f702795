"""Checkpoints: orbax's, written while training goes on, each provably whole or passed over.

A checkpoint holds the model (parameters and constants), the optimiser's state and the data
iterator's, and beside them the config and one checksum an array. Orbax commits a directory by
renaming it, so one that a kill cut short never counts; but bits that rot inside a committed one
load without an error. The checksums tell (sums of the bits as integers, hence independent of
sharding and of the order of summation), and the checkpoint before is used.
"""

import contextlib
import gc
import logging as std_logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Bool, PyTree, UInt32
from ml_collections import ConfigDict
from orbax.checkpoint.experimental import v1 as ocp

from attnlab.config import flatten, read_json, to_json
from attnlab.errors import UserError

# A run may go on with any change but to these: what is learned from would be another, or the
# arrays would not fit.
_FIXED = ("model.", "data.", "seed", "optim.name", "optim.only", "train.batch_size")
# Except these: what the backward pass recomputes, and where files lie. That the files hold the same
# as before the iterator's own state tells.
_FREE = ("model.remat", "data.train", "data.validation", "data.tokenizer")
# For broken files orbax and tensorstore raise a dozen types, but none of these: what the data iterator refuses, memory
# that runs out, devices that fail.
_NOT_OF_FILES = (UserError, MemoryError, RuntimeError)


class NonFiniteError(Exception):
  """A loss, gradient or parameter that is not finite. The message says where."""


class Checkpoints:
  """The checkpoints of a run, in `directory`/STEP.

  Args:
    directory: made when the first is saved.
    keep: how many of the newest to keep.
    read_only: only to restore, perhaps while another process goes on saving.
  """

  def __init__(self, directory: Path, keep: int = 1, *, read_only: bool = False):
    self._directory = Path(directory).resolve()
    self._damaged: set[int] = set()
    half_written = sorted(p.name for p in self._directory.glob("*.orbax-checkpoint-tmp*"))
    if not read_only:
      for name in half_written:
        logging.warning("checkpoint %s was left half-written; ignored", self._directory / name)
    self._manager = ocp.training.Checkpointer(
      self._directory,
      preservation_policy=_KeepNewest(keep, self._damaged),
      cleanup_tmp_directories=bool(half_written) and not read_only,
    )

  @property
  def directory(self) -> Path:
    return self._directory

  def steps(self) -> list[int]:
    """Steps of the committed checkpoints, ascending, but those that `restore` passed over."""
    return [step for step in self._committed() if step not in self._damaged]

  def _committed(self) -> list[int]:
    return [c.step for c in self._manager.checkpoints]

  def save(self, step: int, state: dict[str, PyTree], data: Any, config: ConfigDict) -> None:
    """Starts to save, returns when the arrays have been copied off the devices.

    Args:
      step: updates done.
      state: {"model": ..., "optimizer": ...}, trees of arrays.
      data: the data iterator, or anything that orbax can save.
      config: the run's, stored beside.

    Raises:
      NonFiniteError: an array is not finite; nothing is written.
    """
    arrays = {}
    for name, tree in state.items():
      checksums, finite = jax.device_get(_inspect(tree))
      if not finite.all():
        path = paths(tree)[int(np.argmin(finite))]
        raise NonFiniteError(f"{path} of the {name} is not finite")
      arrays[name] = {
        path: {"shape": list(x.shape), "checksum": checksum}
        for path, x, checksum in zip(
          paths(tree), jax.tree.leaves(tree), checksums.tolist(), strict=True
        )
      }
    self._manager.save_checkpointables_async(
      step,
      {**state, "data": data},
      force=True,
      overwrite=step in self._committed(),
      custom_metadata=dict(config=to_json(config), arrays=arrays),
    )
    self._damaged.discard(step)

  def restore(
    self, abstract: dict[str, PyTree], data: Any = None, step: int | None = None
  ) -> tuple[int, dict[str, PyTree]] | None:
    """The newest whole checkpoint, or the one of `step`.

    Args:
      abstract: {"model": ...} and what else of a saved state is wanted, as ShapeDtypeStructs with
        shardings. They may be others than those it was saved with.
      data: the data iterator to set; None: leave it out.
      step: None: the newest that is whole. Damaged ones are passed over with a warning.

    Returns:
      (step, state), or None if there is no checkpoint.

    Raises:
      UserError: none is whole, or not that of `step`; arrays of another model or optimizer; what the iterator refuses.
    """
    steps = self._committed()
    if step is not None and step not in steps:
      raise UserError(f"{self._directory} has no checkpoint {step}; it has {steps or 'none'}")
    for candidate in [step] if step is not None else reversed(steps):
      with _quiet():
        try:
          state, problem = self._load(candidate, abstract, data)
        except Exception as error:
          problem = _damage(error)
        if problem is not None:
          gc.collect()  # Abandoned coroutines complain when they are collected: let them do so here.
      if problem is None:
        return candidate, state
      damage = f"checkpoint {self._directory / str(candidate)} is damaged"
      damage += f" ({' '.join(problem.split())})"
      if step is not None:
        raise UserError(damage)
      self._damaged.add(candidate)
      logging.warning("%s; the one before it is used", damage)
    if not steps:
      return None
    raise UserError(f"no checkpoint in {self._directory} can be read: all are damaged")

  def _load(
    self, step: int, abstract: dict[str, PyTree], data: Any
  ) -> tuple[dict[str, PyTree], str | None]:
    """The state of a step, and what is damaged in it, if anything."""
    arrays = self._manager.checkpointables_metadata(step).custom_metadata.get("arrays")
    if arrays is None:
      return {}, "its metadata is gone"
    for name, tree in abstract.items():
      if other := _other_shape(arrays[name], tree):
        raise UserError(f"{self._directory / str(step)} is of another {name}: {other}")
    state = self._manager.load_checkpointables(step, abstract)
    problem = _wrong_checksum(arrays, state)
    if problem is None and data is not None:
      self._manager.load_checkpointables(step, {"data": data})
    return state, problem

  def wait(self) -> None:
    """Waits until the last save is committed."""
    self._manager.wait()

  def close(self) -> None:
    """Waits for the last save and lets go of the directory."""
    self._manager.close()


def check_same_run(stored: dict[str, Any], config: ConfigDict, where: Path) -> None:
  """Raises UserError, naming the first key, if a run cannot go on under another config.

  Args:
    stored: the run's config as `to_json` gave it.
    config: the config to go on with.
    where: the run's directory, for the message.
  """
  old, new = dict(flatten(stored)), dict(flatten(to_json(config)))
  # A key that only one of them has came or went with another version of the program.
  for key in sorted(old.keys() & new.keys(), key=lambda k: (not k.startswith("model."), k)):
    fixed = key.startswith(_FIXED) and key not in _FREE
    if fixed and old[key] != new[key]:
      raise UserError(
        f"{where} holds a run with config.{key} = {old[key]!r}, not {new[key]!r}:"
        " go on with its own value, or give another --workdir"
      )


def stored_run(workdir: Path) -> dict[str, Any] | None:
  """The config, as JSON values, of the run in a directory; None if it has no checkpoint yet."""
  path, saved = Path(workdir) / "config.json", Path(workdir) / "checkpoints"
  if not path.exists() or not any(p.name.isdigit() for p in saved.glob("*")):
    return None
  return read_json(path)


def first_non_finite(tree: PyTree) -> str | None:
  """The path of the first array of a tree that is not finite everywhere."""
  finite = jax.device_get(_inspect(tree)[1])
  return None if finite.all() else paths(tree)[int(np.argmin(finite))]


def paths(tree: PyTree) -> list[str]:
  """The dotted path of each array of a tree, in the order of its leaves."""
  return [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


class _KeepNewest:
  """Keeps the newest checkpoints, not counting those found damaged, which stay for inspection."""

  def __init__(self, keep: int, damaged: set[int]):
    self._keep, self._damaged = keep, damaged

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    whole = [c.step for c in checkpoints if c.step not in self._damaged]
    keep = set(sorted(whole)[-self._keep :]) | self._damaged
    return [c.step in keep for c in checkpoints]


@jax.jit
def _inspect(tree: PyTree) -> tuple[UInt32[jax.Array, " n"], Bool[jax.Array, " n"]]:
  """A checksum of each array, and whether all of it is finite."""

  def checksum(x):
    bits = x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
      width = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
      bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    return jnp.sum(bits, dtype=jnp.uint32)

  leaves = jax.tree.leaves(tree)
  finite = [jnp.isfinite(x).all() for x in leaves]
  return jnp.stack([checksum(x) for x in leaves]), jnp.stack(finite)


def _wrong_checksum(stored: dict[str, Any], state: dict[str, PyTree]) -> str | None:
  for name, tree in state.items():
    sums = jax.device_get(_inspect(tree)[0]).tolist()
    for path, checksum in zip(paths(tree), sums, strict=True):
      if stored[name][path]["checksum"] != checksum:
        return f"the checksum of {path} of the {name} is wrong"
  return None


def _other_shape(stored: dict[str, Any], wanted: PyTree) -> str | None:
  """The first difference between a checkpoint's arrays and those to fill."""
  has = {path: tuple(array["shape"]) for path, array in stored.items()}
  needs = dict(zip(paths(wanted), (x.shape for x in jax.tree.leaves(wanted)), strict=True))
  for path in sorted(has.keys() | needs.keys()):
    if has.get(path) != needs.get(path):
      return f"its {path} is {has.get(path, 'missing')}, the config's {needs.get(path, 'has none')}"
  return None


def _damage(error: BaseException) -> str:
  """What first went wrong with a file, which orbax wraps; what is no error of files is raised again."""
  while True:
    if isinstance(error, _NOT_OF_FILES):
      raise error from None
    cause = error.__cause__ or error.__context__
    if cause is None:
      return f"{type(error).__name__}: {str(error)[:300]}"
    error = cause


def _name(path: tuple[Any, ...]) -> str:
  """a.b.0.c from a tree path, without the last step from an nnx.Variable to its array."""
  parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
  return ".".join(parts[:-1] if parts and parts[-1] == "value" else parts)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps what orbax and asyncio print about a broken file from burying our one line about it."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  std_logging.disable(std_logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    std_logging.disable(std_logging.NOTSET)
    sys.unraisablehook = hook
