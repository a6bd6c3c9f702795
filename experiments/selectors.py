"""How well must a sparse layer choose? Accuracy of hybrids beside recall@k of what chooses their tokens.

python -m experiments.selectors [--size=cpu|gpu|paper] [--only="model=sparse from the start"] [--seeds=3]
"""

import dataclasses

from experiments.cells import Cell, Experiment, NotKnown, Prediction, Test, better, config, layer
from experiments.harness import main

LINEAR = "linear alone"
SPARSE, LATER = "sparse from the start", "sparse after training"
ACCURACY, FOUND = "accuracy", "recall@k"


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    length, pairs, vocab_size: of the task (MQAR).
    chosen: tokens that a sparse layer sees of `length`.
    linear_dim: of the linear layer's keys and values, two heads: too few for all pairs.
    head_dim: of the sparse layer and of its indexer, two heads each.
    d_model: of every model of two layers, mixers alone.
    steps, batch_size: of training.
    learning_rates: the grid.
  """

  length: int
  pairs: int
  vocab_size: int
  chosen: tuple[int, ...]
  linear_dim: int
  head_dim: int
  d_model: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]


SIZES = {
  "cpu": Size(64, 16, 128, (2, 4, 8, 16), 4, 16, 32, 600, 32, (5e-3, 1e-2)),
  "gpu": Size(512, 128, 1024, (2, 8, 32, 128), 8, 32, 128, 6000, 64, (1e-3, 2e-3)),
  # Not a paper's: the greatest share of what is seen is DeepSeek-V3.2's at 32k.
  "paper": Size(8192, 2048, 8192, (32, 128, 512), 32, 64, 512, 40_000, 64, (2.5e-4, 5e-4, 1e-3)),
}  # fmt: skip


def model(when: str, trained: bool = True) -> str:
  """A name: when the layer became sparse, and whether its indexer is trained."""
  return when if trained else f"{when}, indexer untrained"


def pattern(s: Size, chosen: int, trained: bool = True) -> str:
  """A linear layer, and one that sees the chosen tokens; 0: another linear one."""
  linear = layer("deltanet", num_heads=2, head_dim=s.linear_dim)
  if not chosen:
    return f"2*{linear}"
  d = s.head_dim
  return (
    f"{linear} + dsa(num_heads=2, nope_dim={d}, rope_dim=0, value_dim={d}, kv_lora_rank={2 * d}, top_k={chosen},"
    f" index_heads=2, index_dim={d}, index_rope_dim=0, index_weight={float(trained)})"
  )


def cell(size: str, name: str, training: str, tested: dict[int, str]) -> Cell:
  """A model.

  Args:
    size: of `SIZES`.
    name: the model's.
    training: its pattern in training.
    tested: its patterns in tests, by how many tokens are chosen.
  """
  s = SIZES[size]
  args = dict(vocab_size=s.vocab_size, num_kv_pairs=s.pairs, random_non_queries=False)
  c = config(
    training, "mqar", args, seq_len=s.length, layers=2, d_model=s.d_model, steps=s.steps, batch_size=s.batch_size,
  )  # fmt: skip

  def tests(n: int, pattern: str) -> list[Test]:
    own = None if pattern == training else pattern
    right = Test({"chosen": n, "measure": ACCURACY}, chance=2 / s.vocab_size, pattern=own)
    found = Test({"chosen": n, "measure": FOUND}, measure="indexer recall", pattern=own)
    return [right, found] if n else [right]

  axes = {"model": name} | (dict(chosen=min(tested)) if len(tested) == 1 else {})
  every = tuple(t for item in tested.items() for t in tests(*item))
  return Cell(axes, c, s.learning_rates, every)


def cells(size: str) -> list[Cell]:
  s = SIZES[size]
  alone = pattern(s, 0)
  out = [cell(size, LINEAR, alone, {0: alone})]
  for trained in (True, False):
    sparse = {n: pattern(s, n, trained) for n in s.chosen}
    out += [cell(size, model(SPARSE, trained), own, {n: own}) for n, own in sparse.items()]
  for trained in (True, False):
    whole = pattern(s, s.length, trained)
    sparse = {n: pattern(s, n, trained) for n in (*s.chosen, s.length)}
    out.append(cell(size, model(LATER, trained), whole, sparse))
  return out


def predictions(size: str) -> tuple[Prediction, ...]:
  s = SIZES[size]
  fewest, most = (dict(chosen=n, measure=ACCURACY) for n in (s.chosen[0], s.chosen[-1]))

  def keeps(when: str):
    """That wherever an indexer finds 80 % of the best, all but 5 points are kept of what seeing everything gives."""

    def holds(value):
      whole = value(model=LATER, chosen=s.length, measure=ACCURACY)
      told = [
        [value(model=m, chosen=n, measure=x) for x in (FOUND, ACCURACY)]
        for m in (model(when), model(when, trained=False))
        for n in s.chosen
      ]
      good = [right for found, right in told if found >= 80]
      if not good:
        raise NotKnown("no choice is that good")
      return min(good) > whole - 5

    return holds

  start, later = dict(model=model(SPARSE)), dict(model=model(LATER))
  return (
    Prediction(
      "Made sparse after training: wherever the indexer finds 80 % of the best, less than 5 points are lost.",
      keeps(LATER),
    ),
    Prediction("The same of those that are sparse from the start.", keeps(SPARSE)),
    Prediction(
      "With the most chosen tokens: what is sparse from the start is better by 10 points if its indexer is trained.",
      better(start, dict(model=model(SPARSE, trained=False)), 10, **most),
    ),
    Prediction(
      "With the fewest: what is made sparse after training is better by 10 points than what is so from the start.",
      better(later, start, 10, **fewest),
    ),
    Prediction(
      "With the fewest: what is made sparse after training is better than linear alone by 10 points.",
      lambda value: value(**later, **fewest) > value(model=LINEAR, chosen=0, measure=ACCURACY) + 10,
    ),
  )  # fmt: skip


EXPERIMENT = Experiment(
  name="selectors",
  title="How well must a sparse layer choose?",
  about=(
    "A linear layer (DeltaNet), whose state is too small for all pairs, and a sparse one (DSA), which sees k tokens: "
    "those that its indexer scores highest. Either k is what it is from the start of training, or the layer sees "
    "everything in training and k tokens only when it is tested. In place of the sparse layer another linear one: "
    "linear alone, which has fewer parameters.\n\n"
    "Choosing has no gradient. The indexer learns from a loss of its own to say what the layer's heads look at, of "
    "what it has chosen. An untrained one has no such loss, and chooses as it was born. Recall@k is the share, among "
    "the k tokens with the greatest weights of full attention, of those that the indexer has chosen, at 16 places "
    "evenly spaced over the row, most of which ask for nothing.\n\n"
    "The question is whether a hybrid of linear and sparse layers is as good as one with full attention as soon as "
    "the choice is good enough, and how good that is."
  ),
  source="none",
  cells=cells,
  plot={"x": "chosen", "line": "model", "facet": "measure"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
