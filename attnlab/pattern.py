"""Layer patterns as text: which mixer stands where.

"kda kda kda mla"                        four layers, repeated over the model
"3*gdn + 1*softmax"                      counts; "+" is only for the eye
"3*swa(window=128) + softmax(rope_fraction=0.0)"     settings of single layers, over the config's
"7*gdn + softmax | softmax"              what follows the bar ends the model, once
"""

import ast
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

from attnlab.errors import UserError

# A count, a name, settings in parentheses, whose values may be tuples.
_ITEM = re.compile(
  r"\s*(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)(?!\w)\s*(?:\(((?:[^()]|\([^()]*\))*)\))?\s*"
  r"(?:\+|(?=\s|$|[A-Za-z_\d]))"
)
_COMMA = re.compile(r",(?![^(]*\))")  # between settings, not inside a tuple


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """One layer of a pattern: a mixer's name, and settings that hold for this layer only."""

  mixer: str
  settings: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Layers that repeat, and layers that end the model."""

  period: tuple[LayerSpec, ...]
  tail: tuple[LayerSpec, ...] = ()

  @property
  def mixers(self) -> set[str]:
    """The names of all mixers."""
    return {layer.mixer for layer in self.period + self.tail}


def parse_pattern(text: str) -> Pattern:
  """The pattern that a text writes.

  Raises:
    UserError: text that is no pattern. Names are not looked up here.
  """
  period, bar, tail = text.partition("|")
  return Pattern(_layers(period, text), _layers(tail, text) if bar else ())


def write_pattern(mixers: Sequence[str]) -> str:
  """A short pattern of a model whose layers have these mixers: what repeats, and what it does not cover at the end."""
  n = len(mixers)

  def tail(period: int) -> int:
    """Layers at the end, from the first on that does not repeat."""
    return n - next((i for i in range(n) if mixers[i] != mixers[i % period]), n)

  # A layer of its own at the end costs a reader more than one in the period.
  period = min(range(1, n + 1), key=lambda p: (p + 3 * tail(p), tail(p)))
  return write_layers(mixers[:period], mixers[n - tail(period) :])


def write_layers(period: Sequence[str], tail: Sequence[str] = ()) -> str:
  """The pattern of layers, each a name or what `write_layer` makes."""

  def text(names: Sequence[str]) -> str:
    return " + ".join(f"{len(list(same))}*{name}" for name, same in itertools.groupby(names))

  return " | ".join(text(names) for names in (period, tail) if names)


def write_layer(layer: LayerSpec) -> str:
  """A layer as a pattern has it: "softmax(rope_fraction=0.0)"."""
  settings = ", ".join(f"{key}={value!r}" for key, value in layer.settings)
  return f"{layer.mixer}({settings})" if settings else layer.mixer


def _layers(text: str, pattern: str) -> tuple[LayerSpec, ...]:
  layers: list[LayerSpec] = []
  at = 0
  while text[at:].strip():
    item = _ITEM.match(text, at)
    if not item or item.end() == at:
      raise UserError(
        f"pattern {pattern!r}: cannot read {text[at:].strip()!r};"
        ' write it like "3*kda + 1*softmax(rope_fraction=0.0)"'
      )
    count, name, settings = item.groups()
    if count and not int(count):
      raise UserError(f"pattern {pattern!r}: {count}*{name} is no layer; counts are at least 1")
    layers += [LayerSpec(name, _settings(pattern, settings or ""))] * int(count or 1)
    at = item.end()
  if not layers:
    raise UserError(f"pattern {pattern!r} names no layer")
  return tuple(layers)


def _settings(pattern: str, text: str) -> tuple[tuple[str, Any], ...]:
  """The settings in parentheses; a value that is no Python literal is a string."""
  out: dict[str, Any] = {}
  for part in filter(str.strip, _COMMA.split(text)):
    key, equals, value = (p.strip() for p in part.partition("="))
    if not equals or not key.isidentifier() or not value:
      raise UserError(f"pattern {pattern!r}: {part.strip()!r} is not of the form setting=value")
    if key in out:
      raise UserError(f"pattern {pattern!r}: {key} is set twice")
    try:
      out[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      out[key] = value
  return tuple(out.items())
