"""Synthetic tasks: `data.name="task"`, `data.task=NAME`. Any file here that registers one is found.

To add one, write `attnlab/tasks/NAME.py`:

  @register("copy")
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Copy(Task):
    vocab_size: int = 16

    def check(self, seq_len): ...             # UserError for parameters that do not fit
    def example(self, rng, seq_len): ...      # Example(inputs, targets, weights), from rng alone
"""

import importlib
import pkgutil

from attnlab.tasks.base import Example, Task, TaskSource, make, names, register

__all__ = ["Example", "Task", "TaskSource", "make", "names", "register"]

for _module in pkgutil.iter_modules(__path__):
  importlib.import_module(f"{__name__}.{_module.name}")
