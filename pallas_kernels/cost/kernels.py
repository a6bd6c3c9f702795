"""What a kernel is asked to do, from its jaxpr: grid steps, bytes, FLOPs, loops."""

import math
from collections.abc import Iterator
from typing import Any

from jax._src.state.types import AbstractRef


def subjaxprs(value) -> Iterator[Any]:
  for x in value if isinstance(value, tuple | list) else (value,):
    if hasattr(x, "jaxpr"):
      yield x.jaxpr
    elif hasattr(x, "eqns"):
      yield x


def pallas_calls(jaxpr) -> list:
  """The equations of a jaxpr that are Pallas kernels, in order, whatever they are nested in."""
  return [eqn for eqn, _ in _kernels(jaxpr, 1)]


def repeats(jaxpr) -> list[int]:
  """How often each of ``pallas_calls`` runs: as often as the scans around it."""
  return [times for _, times in _kernels(jaxpr, 1)]


def _kernels(jaxpr, times: int) -> Iterator[tuple[Any, int]]:
  for eqn in jaxpr.eqns:
    # plgpu.kernel, of GPUs, makes the second.
    if eqn.primitive.name in ("pallas_call", "mpmd_map"):
      yield eqn, times
    else:
      inner = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
      for value in eqn.params.values():
        for sub in subjaxprs(value):
          yield from _kernels(sub, inner)


def _passes(eqn) -> int:
  """How often the matrix unit, whose numbers are bfloat16, goes over a dot_general."""
  if all(v.aval.dtype.itemsize <= 2 for v in eqn.invars):
    return 1
  precision = str(eqn.params["precision"])
  return (
    6
    if "HIGHEST" in precision or "X6" in precision
    else 3
    if "HIGH" in precision or "X3" in precision
    else 1
  )


def matmul_flops(jaxpr, trips: float = 1) -> float:
  """FLOPs of the matmuls of a kernel's body, times the passes; loops as often as they run, the dearer branch.

  Args:
    trips: of loops of which that is not known.
  """
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      k = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
      total += 2 * k * math.prod(eqn.outvars[0].aval.shape) * _passes(eqn)
      continue
    inner = [matmul_flops(j, trips) for value in eqn.params.values() for j in subjaxprs(value)]
    if inner:
      branches = eqn.primitive.name == "cond"
      runs = trips if eqn.primitive.name == "while" else eqn.params.get("length", 1)
      total += runs * (max(inner) if branches else sum(inner))
  return total


def trip_counts(jaxpr, unknown: float | None = None) -> list[tuple[int, float | None]]:
  """(depth, how often the body runs in all) of the loops of a kernel's body, in order; None where unknown.

  Args:
    unknown: trips of loops of which the program does not say.
  """

  def times(runs, trips):
    return None if runs is None or trips is None else runs * trips

  def walk(jaxpr, depth, runs):
    for eqn in jaxpr.eqns:
      name, inner = eqn.primitive.name, (depth, runs)
      if name == "scan":
        trips = eqn.params["length"] // max(int(eqn.params["unroll"]), 1)
        if trips > 1:
          inner = depth + 1, times(runs, trips)
          yield inner
      elif name == "while":
        inner = depth + 1, times(runs, unknown)
        yield inner
      for value in eqn.params.values():
        for sub in subjaxprs(value):
          yield from walk(sub, *inner)

  return list(walk(jaxpr, 1, 1))


def moved(eqn) -> dict:
  """A kernel's name, and the bytes of its operands and results; one that it changes in place is both."""
  name = eqn.params["name"] or "kernel"
  size = sum(map(_nbytes, [*eqn.invars, *eqn.outvars]))
  changed = [v for v in eqn.invars if isinstance(getattr(v, "aval", None), AbstractRef)]
  return {"call": name, "bytes": size + sum(map(_nbytes, changed))}


def _nbytes(atom) -> int:
  aval = atom.aval
  return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


def describe(eqn, times: int = 1, trips: float | None = None) -> dict:
  """Grid steps, HBM bytes and FLOPs of a pallas_call equation, all of the whole call.

  Args:
    times: how often it runs.
    trips: of its loops of which that is not known, in a grid step.
  """
  steps = times * math.prod(int(n) for n in eqn.params["grid_mapping"].grid) or 1
  body, call = eqn.params["jaxpr"], moved(eqn)
  return call | {
    "bytes": times * call["bytes"],
    "grid_steps": steps,
    "flops": steps * matmul_flops(body, trips or 1),
    "trips": trip_counts(body, trips),
  }
