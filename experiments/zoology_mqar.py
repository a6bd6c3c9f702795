"""Recall against the size of the state: Zoology's Figure 2 (arXiv:2312.04927), with the mixers of today.

python -m experiments.zoology_mqar [--size=cpu|gpu|paper] [--only=mixer=softmax] [--seeds=3]
"""

import dataclasses

from attnlab import accounting
from attnlab.config import resolve
from attnlab.mixers import mixers
from experiments.cells import Cell, Experiment, Prediction, Test, after_shift, better, config, layer
from experiments.harness import main

LINEAR = tuple(name for name, m in mixers().items() if m.family == "linear")
# The cheapest of each kind: none, decay, delta rule, both.
KINDS = ("linear_attention", "mamba2", "deltanet", "gated_deltanet")


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    rows: lengths and numbers of pairs.
    vocab_size: half keys, half values.
    widths: of the model; a mixer has two heads of half of it.
    lines: linear mixers that are there at every width, as softmax attention is; the others are at the second alone.
    shift: whether attention to two tokens comes before those without a convolution, as in the authors' later settings.
    examples, batch_size, epochs: of training, which ends early at 99 % of validation.
    learning_rates: the grid.
  """

  rows: tuple[tuple[int, int], ...]
  vocab_size: int
  widths: tuple[int, ...]
  lines: tuple[str, ...]
  shift: bool
  examples: int
  batch_size: int
  epochs: int
  learning_rates: tuple[float, ...]


SIZES = {
  "cpu": Size(((32, 8),), 128, (16, 24, 32), (*KINDS, "kda"), True, 20_480, 32, 1, (5e-3, 1e-2)),
  "gpu": Size(((256, 64),), 1024, (32, 64, 128), (*KINDS, "kda"), True, 100_000, 256, 6, (1e-3, 3e-3)),
  # Rows, examples, epochs, widths and the grid of Figure 2; what differs is told below.
  "paper": Size(
    ((64, 4), (128, 8), (256, 16), (512, 64)), 8192, (64, 128, 256, 512), LINEAR, False, 100_000, 256, 64,
    (1e-4, 4.6e-4, 2.2e-3, 1e-2),
  ),
}  # fmt: skip


def pattern(mixer: str, width: int, shift: bool) -> str:
  two = f"2*{layer(mixer, num_heads=2, head_dim=width // 2, rope=True, conv_size=4)}"
  return after_shift(two) if shift else two


def cell(size: str, length: int, pairs: int, width: int, mixer: str) -> Cell:
  s = SIZES[size]
  args = dict(vocab_size=s.vocab_size, num_kv_pairs=pairs, random_non_queries=False)
  steps = s.epochs * s.examples // s.batch_size
  c = config(
    pattern(mixer, width, s.shift), "mqar", args | dict(train_examples=s.examples), seq_len=length, layers=2,
    d_model=width, steps=steps, batch_size=s.batch_size, stop_accuracy=0.99,
  )  # fmt: skip
  facts = lambda: {"state bytes": accounting.cache_bytes(resolve(c).model, length)}  # noqa: E731
  axes = {"length": length, "pairs": pairs, "d_model": width, "mixer": mixer}
  return Cell(axes, c, s.learning_rates, (Test(chance=2 / s.vocab_size),), facts)


def cells(size: str) -> list[Cell]:
  s = SIZES[size]
  return [
    cell(size, *row, width, mixer)
    for row in s.rows
    for mixer in ("softmax", *LINEAR)
    for width in (s.widths if mixer in ("softmax", *s.lines) else s.widths[1:2])
  ]


def predictions(size: str) -> tuple[Prediction, ...]:
  """Of the longest rows."""
  s = SIZES[size]
  length, pairs = s.rows[-1]
  last = dict(length=length, pairs=pairs)
  narrowest, second, *_, widest = (dict(d_model=d) for d in s.widths)

  def gain(value, mixer: str) -> float:
    return value(mixer=mixer, **widest, **last) - value(mixer=mixer, **narrowest, **last)

  return (
    Prediction(
      "Softmax attention loses less than 10 points from the widest model to the narrowest.",
      lambda value: gain(value, "softmax") < 10,
    ),
    Prediction(
      "Every linear mixer of four (none, decay, delta, both) gains 20 points from the narrowest model to the widest.",
      lambda value: min([gain(value, mixer) for mixer in KINDS]) > 20,
    ),
    Prediction(
      "At the second width, Gated DeltaNet is better than linear attention by 10 points.",
      better(dict(mixer="gated_deltanet"), dict(mixer="linear_attention"), 10, **second, **last),
    ),
  )  # fmt: skip


EXPERIMENT = Experiment(
  name="zoology_mqar",
  title="Recall against the size of the state (Zoology, Figure 2)",
  about=(
    "Two layers of a mixer alone, at several widths: how many bytes of state does it take to recall the pairs? "
    "Softmax attention keeps all of them, so that its cache grows with the row and not with the width's square.\n\n"
    "The paper's figure shows attention at about 100 % at every width, and the recurrences and convolutions of its "
    "time in need of a width that grows with the row; its values are drawn, not told. Ours are without its dropout "
    "and weight decay, batches are 256 at every length (there 512 to 128), and attention has two heads (there one), as "
    "the other mixers have. At the smaller sizes, where training is short, attention to two tokens comes before "
    "models without a convolution."
  ),
  source="none: arXiv:2312.04927 draws Figure 2 without values",
  cells=cells,
  plot={"x": "state bytes", "line": "mixer", "facet": "length", "columns": "d_model"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
