"""Types and ranges of settings: one checker for the config's keys and for the mixers', whose errors are one line."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from attnlab.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
  """Bounds of a number, or of each of several: ``rope_fraction: Annotated[float, Range(least=0, most=1)]``."""

  least: float | None = None
  most: float | None = None
  above: float | None = None
  below: float | None = None

  def __contains__(self, x: float) -> bool:
    """Not of NaN, whatever the bounds."""
    return (
      x == x
      and (self.least is None or x >= self.least)
      and (self.most is None or x <= self.most)
      and (self.above is None or x > self.above)
      and (self.below is None or x < self.below)
    )

  def __str__(self) -> str:
    words = dict(least="at least", most="at most", above="above", below="below")
    bounds = {word: getattr(self, name) for name, word in words.items()}
    return " and ".join(f"{w} {b:g}" for w, b in bounds.items() if b is not None)


# Sizes and counts that may be none at all, shares, and weights of a loss.
Natural = typing.Annotated[int, Range(least=0)]
Fraction = typing.Annotated[float, Range(least=0, most=1)]
Weight = typing.Annotated[float, Range(least=0)]

# As pallas_kernels.rope.Scaling is.
RopeScaling = tuple[typing.Literal["llama3", "yarn"], float, int, float, float]

# What a mixer's numbers are where its Config does not say otherwise: sizes, counts, scales.
POSITIVE = {int: Range(least=1), float: Range(above=0, below=float("inf"))}


def checked(
  what: str, value: Any, kind: Any, ranges: Mapping[type, Range] = types.MappingProxyType({})
) -> Any:
  """A value of a type, an int made a float and a list a tuple where that is what is wanted.

  Args:
    what: names it in the error, with its value: "config.train.steps = 0".
    kind: a type, ``int | None``, a ``Literal``, ``tuple[float, float]``, or one of these ``Annotated`` with its Range.
    ranges: of numbers whose type has none.

  Raises:
    UserError: a value of another type, or out of its range.
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is typing.Annotated:
    own = next((a for a in args[1:] if isinstance(a, Range)), None)
    return checked(what, value, args[0], ranges if own is None else {int: own, float: own})
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in args:
      return None
    return checked(what, value, next(a for a in args if a is not type(None)), ranges)
  if origin is typing.Literal:
    if value not in args:
      raise UserError(f"{what} must be one of {', '.join(map(str, args))}")
    return value
  if kind is tuple or kind is list or origin is tuple:
    if not isinstance(value, tuple | list):
      raise UserError(f"{what} must be of type {(origin or kind).__name__}")
    if not args:
      return value
    if len(value) != len(args):
      raise UserError(f"{what} must be {len(args)} values")
    return tuple(checked(what, v, a, ranges) for v, a in zip(value, args, strict=True))
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if kind is bool and not isinstance(value, bool):
    raise UserError(f"{what} must be True or False")
  right = number if kind is float else isinstance(value, kind) and (kind is not int or number)
  if not right:
    raise UserError(f"{what} must be of type {kind.__name__}")
  if kind in ranges and value not in ranges[kind]:
    raise UserError(f"{what} must be {ranges[kind]}")
  return float(value) if kind is float else value


def check_ranges(section: str, config: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
  """Raises UserError for the first number of ``config.SECTION`` that is out of its range; keys may have dots."""
  for key, bounds in ranges.items():
    value: Any = config
    for name in key.split("."):
      value = value[name]
    if value not in bounds:
      raise UserError(f"config.{section}.{key} = {value} must be {bounds}")
