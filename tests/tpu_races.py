"""What the race detector of Pallas's TPU interpreter finds, in all kernels of a program."""

import contextlib
from collections.abc import Iterator

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

# Memory starts as NaN, so that what is read before it is written shows.
STRICT = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)


@contextlib.contextmanager
def found() -> Iterator[list[bool]]:
  """Of each kernel that runs in the block, in order, whether it has a race; filled when the block ends.

  The interpreter makes a new detector for each kernel and keeps the last one's answer alone.
  """
  detectors, answers = [], []
  make = interpreter.RaceDetectionState

  def kept(*args, **kwargs):
    detectors.append(make(*args, **kwargs))
    return detectors[-1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(interpreter, "RaceDetectionState", kept)
    yield answers
  answers += [detector.races_found for detector in detectors]


@contextlib.contextmanager
def none(kernels: int) -> Iterator[None]:
  """Fails unless just so many kernels run in the block, none of them with a race."""
  with found() as answers:
    yield
  assert answers == [False] * kernels
