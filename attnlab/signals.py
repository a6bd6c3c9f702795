"""Stopping a run from outside without losing it."""

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stopped(SystemExit):
  """A signal ended the run after its checkpoint was saved. As an exit code: 128 + the signal."""

  def __init__(self, number: signal.Signals):
    super().__init__(128 + number)


class Signals:
  """While entered, SIGTERM and SIGINT are noted instead of obeyed. A second one acts as ever.

  With several processes the first to get one is not followed at once: JAX has them agree on an update
  after which all stop, so that the checkpoint is of one state. JAX listens to SIGTERM alone, from the start of a
  process to its end; a SIGINT becomes one.
  """

  def __init__(self):
    self.stopped: signal.Signals | None = None
    self._noted: signal.Signals | None = None
    self._handlers: dict[signal.Signals, object] = {}

  def __enter__(self) -> "Signals":
    # Only the main thread may set handlers. With several processes SIGTERM is JAX's own.
    if threading.current_thread() is threading.main_thread():
      ours = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
      for number in ours:
        self._handlers[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def stop(self, step: int) -> bool:
    """Whether to stop before another update, `step` being done."""
    if jax.process_count() == 1:
      self.stopped = self._noted
    elif multihost_utils.reached_preemption_sync_point(step):
      self.stopped = self._noted or signal.SIGTERM
    return self.stopped is not None

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self._noted = signal.Signals(number)
    signal.signal(number, self._handlers[self._noted])
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
