"""Which layers a parameter is of: those of the scan hold one of every superblock."""

import dataclasses

from ml_collections import ConfigDict

from attnlab.model import scanned


@dataclasses.dataclass(frozen=True)
class Place:
  """A parameter's place.

  Attributes:
    path: within its layer, or within the model where it is of no layer.
    layers: their numbers, one for each row of a stacked parameter.
    stacked: whether it has an axis of layers.
  """

  path: str
  layers: tuple[int, ...] = ()
  stacked: bool = False


def place(path: str, model: ConfigDict) -> Place:
  """The place of a parameter of ``attnlab.model.Model``.

  Args:
    path: its dotted path ("blocks.layers.0.mixer.q_proj.kernel").
    model: the ``model`` section of the model that has it.
  """
  lead, periods, period = scanned(model)
  part, _, rest = path.partition(".")
  if part == "blocks":
    _, number, rest = rest.split(".", 2)
    return Place(rest, tuple(lead + p * period + int(number) for p in range(periods)), True)
  if part in ("lead", "tail"):
    number, _, rest = rest.partition(".")
    return Place(rest, (int(number) + (0 if part == "lead" else lead + periods * period),))
  return Place(path)
