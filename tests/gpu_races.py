"""Races of all kernels of a program: jax forgets those of one when it interprets the next."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks


@dataclasses.dataclass
class Watched:
  """What was seen of the kernels that ran: a state of jax's race detector for each."""

  states: list = dataclasses.field(default_factory=list)

  @property
  def kernels(self) -> int:
    return len(self.states)

  @property
  def racy(self) -> list[int]:
    """Which kernels, in the order in which they began."""
    return [i for i, state in enumerate(self.states) if state.races_found]


@contextlib.contextmanager
def watch() -> Iterator[Watched]:
  """Collects the races of kernels that are interpreted with ``detect_races`` meanwhile."""
  watched, of_kernel = Watched(), gpu_callbacks.GPURaceDetectionState

  def begin(*args, **kwargs):
    watched.states.append(of_kernel(*args, **kwargs))
    return watched.states[-1]

  gpu_callbacks.GPURaceDetectionState = begin
  try:
    yield watched
    jax.effects_barrier()
  finally:
    gpu_callbacks.GPURaceDetectionState = of_kernel
