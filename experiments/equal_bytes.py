"""Sliding window against linear attention at equal state bytes, and at equal FLOPs.

python -m experiments.equal_bytes [--size=cpu|gpu|paper] [--only=head_dim=16] [--seeds=3]
"""

import bisect
import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from attnlab import accounting
from attnlab.config import resolve
from experiments.cells import (
  Cell,
  Experiment,
  Prediction,
  Test,
  after_shift,
  better,
  config,
  greatest,
)
from experiments.harness import main

LINEAR = ("deltanet", "kda", "linear_attention")
WINDOWS = ("window of equal bytes", "window of equal FLOPs")


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol: recall of a few pairs, at more and more distance.

  Attributes:
    vocab_size, pairs: of MQAR, whose queries are anywhere after the pairs.
    lengths: of rows in training, the shortest and the longest: the window must reach some answers to learn to look.
    inside: length and pairs of a test whose rows lie within every window.
    tests: lengths of the other tests' rows, with as many pairs as in training.
    head_dims: of keys and values; two layers of two heads; no MLPs. A linear state has head_dim^2 values a
      head.
    d_model, steps, batch_size: of every model; training ends early at 99.5 % of validation.
    learning_rates: the grid.
  """

  vocab_size: int
  pairs: int
  lengths: tuple[int, int]
  inside: tuple[int, int]
  tests: tuple[int, ...]
  head_dims: tuple[int, ...]
  d_model: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]


SIZES = {
  "cpu": Size(64, 4, (16, 32), (8, 2), (16, 32, 64, 256), (8, 16), 64, 2000, 32, (2.5e-3, 5e-3, 1e-2)),
  "gpu": Size(
    1024, 16, (64, 256), (12, 3), (64, 128, 256, 512, 1024), (16, 32, 64), 256, 5000, 64, (1e-3, 3e-3)
  ),
  # Not a paper's: what nobody has published. States are of the size that shipped models have.
  "paper": Size(
    8192, 64, (256, 1024), (20, 5), (256, 512, 1024, 2048, 4096), (32, 64, 128), 512, 20_000, 64,
    (5e-4, 1e-3, 2e-3),
  ),
}  # fmt: skip


def linear(name: str, head_dim: int) -> str:
  """The pattern of a linear mixer with two heads and head_dim x head_dim states. Convolutions are part of the
  state."""
  return after_shift(
    f"2*{name}(num_heads=2, head_dim={head_dim}, value_dim={head_dim}, conv_size=4)"
  )


def equal_window(
  linear: ConfigDict,
  windowed: Callable[[int], ConfigDict],
  equal: str = "bytes",
  length: int = 1 << 20,
) -> int:
  """The greatest window that costs no more than a linear model does in rows of a length.

  Args:
    linear: the linear model, resolved.
    windowed: of a window, the model with it.
    equal: "bytes" of states, keys, values and convolutions; or "FLOPs" of a token in training.
    length: of the rows; by default far beyond any window.
  """

  def cost(model: ConfigDict) -> float:
    if equal == "bytes":
      return accounting.cache_bytes(model, length)
    return accounting.costs(model, length).train_flops

  if equal == "FLOPs":  # A mean over the row: no straight line, and no more than the row is seen.
    windows = range(1, length + 1)
    return max(1, bisect.bisect_right(windows, cost(linear), key=lambda w: cost(windowed(w))))
  return greatest(lambda w: cost(windowed(w)), cost(linear))


def _swa(head_dim: int, window: int) -> str:
  return f"2*swa(num_heads=2, head_dim={head_dim}, window={window}, rope_fraction=0.0)"


def _config(size: str, pattern: str) -> ConfigDict:
  s = SIZES[size]
  args = dict(vocab_size=s.vocab_size, num_kv_pairs=s.pairs, power_a=1.0, random_non_queries=False)
  args["min_length"] = s.lengths[0]
  model = dict(layers=2, d_model=s.d_model)
  return config(
    pattern, "mqar", args, seq_len=s.lengths[1], steps=s.steps, batch_size=s.batch_size, stop_accuracy=0.995,
    **model,
  )  # fmt: skip


def cell(size: str, head_dim: int, name: str) -> Cell:
  s = SIZES[size]
  facts = {}
  if name in WINDOWS:
    delta = resolve(_config(size, linear("deltanet", head_dim))).model
    facts["window"] = w = equal_window(
      delta,
      lambda w: resolve(_config(size, _swa(head_dim, w))).model,
      name.split()[-1],
      s.lengths[1],
    )
    pattern = after_shift(_swa(head_dim, w))
  else:
    pattern = linear(name, head_dim)
  c = _config(size, pattern)
  chance = 2 / s.vocab_size  # of a value

  def test(length: int, pairs: int) -> Test:
    args = dict(min_length=0, num_kv_pairs=pairs)
    return Test({"length": length}, dict(seq_len=length, task_args=args), chance)

  tests = (test(*s.inside), *(test(n, s.pairs) for n in s.tests))
  return Cell({"head_dim": head_dim, "mixer": name}, c, s.learning_rates, tests, lambda: facts)


def cells(size: str) -> list[Cell]:
  names = (*LINEAR, *WINDOWS)
  return [cell(size, d, name) for d in SIZES[size].head_dims for name in names]


def predictions(size: str) -> tuple[Prediction, ...]:
  s = SIZES[size]
  delta, (of_bytes, of_flops) = dict(mixer="deltanet"), (dict(mixer=name) for name in WINDOWS)
  trained = dict(head_dim=s.head_dims[0], length=s.lengths[1])
  return (
    Prediction(
      "With the smallest heads, in rows that lie wholly within it, the window of equal bytes is as good as DeltaNet, "
      "within 2 points.",
      better(of_bytes, delta, -2, **trained | dict(length=s.inside[0])),
    ),
    Prediction(
      "At the shortest length of training, where most pairs lie inside it, too.",
      better(of_bytes, delta, -2, **trained | dict(length=s.tests[0])),
    ),
    Prediction(
      "At the training length, where most lie outside it, it is worse by 20 points.",
      better(delta, of_bytes, 20, **trained),
    ),
    Prediction(
      "The window of equal FLOPs is wider than that of equal bytes, and better at the training length.",
      better(of_flops, of_bytes, **trained),
    ),
  )  # fmt: skip


EXPERIMENT = Experiment(
  name="equal_bytes",
  title="Sliding window against linear attention, at equal bytes and at equal FLOPs",
  about=(
    "Decoding waits for memory, so the fair rival of a linear state is a window of keys and values of as many bytes. "
    "Both are asked for pairs seen at the beginning of a row, anywhere in it, with blanks between: the longer the "
    "row, the farther back. Trained on rows of several lengths, tested at each, and on rows of fewer pairs that lie "
    "wholly within every window: the shortest.\n\n"
    "The windows are derived by attnlab.accounting: the greatest that needs no more bytes than DeltaNet's state and "
    "convolutions in its two layers, or no more FLOPs a token in training. In rows as short as the CPU's and the GPU's "
    "a window over the whole row has fewer FLOPs still (at the CPU's size by a fifth): that of equal FLOPs sees all of "
    "a row in training. Models of windows begin with one of two tokens, in place of DeltaNet's convolutions, so that "
    "none has to learn which token came before; this they have for nothing, with its parameters and its cache (at the "
    "CPU's size 6 to 22 % more). No layer but that has position encoding: with RoPE, windows that see everything did "
    "not learn to look in as many updates."
  ),
  source="none",
  cells=cells,
  plot={"x": "length", "line": "mixer", "facet": "head_dim"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
