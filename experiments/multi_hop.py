"""Chained lookups: what large linear models were found to lose, for which a lab went back to full attention.

python -m experiments.multi_hop [--size=cpu|gpu|paper] [--only=model=kda|softmax] [--seeds=3]
"""

import dataclasses
import functools

from experiments.cells import (
  SHIFT,
  Cell,
  Experiment,
  Prediction,
  Test,
  after_shift,
  better,
  config,
  layer,
)
from experiments.harness import main

SHIFTS = "softmax, shifts"


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    length: of a row.
    vocab_size, chains, hops: of the task: chains of so many lookups.
    head_dim: of keys and values; two heads.
    block: of the sparse layers, which see three.
    d_model: of every model of four layers, mixers alone.
    steps, batch_size: of training, which ends early at 99.5 % of validation.
    learning_rates: the grid.
  """

  length: int
  vocab_size: int
  chains: int
  hops: int
  head_dim: int
  block: int
  d_model: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]


SIZES = {
  "cpu": Size(40, 62, 3, 3, 16, 4, 64, 800, 32, (2.5e-3, 5e-3)),
  "gpu": Size(512, 1022, 30, 4, 64, 32, 256, 6000, 64, (1e-3, 2e-3)),
  # Not a paper's: there is none.
  "paper": Size(4096, 8192, 240, 4, 64, 64, 512, 40_000, 64, (2.5e-4, 5e-4, 1e-3)),
}


def patterns(s: Size) -> dict[str, str]:
  """Name in the table -> pattern of a whole model."""
  pool = f"pool_size={s.block // 2}, pool_stride={s.block // 4}"
  choice = f"block_size={s.block}, top_k=3, {pool}, initial=1, local=1"
  sparse = f"infllm_v2(num_heads=2, head_dim={s.head_dim}, rope_fraction=0.0, {choice})"
  own = functools.partial(layer, num_heads=2, head_dim=s.head_dim)
  softmax, kda = own("softmax", rope=True), own("kda")
  return {
    "softmax": after_shift(f"4*{softmax}"),
    SHIFTS: " + ".join(4 * [SHIFT, softmax]),  # seven layers after the first shift
    "mamba2": f"4*{own('mamba2')}",
    "kda": f"4*{kda}",
    "kda, one shift": after_shift(f"4*{own('kda', conv_size=0)}"),
    "rwkv7": f"4*{own('rwkv7')}",
    "3 kda : 1 softmax": f"3*{kda} + {own('softmax')}",
    "3 kda : 1 infllm_v2": f"3*{kda} + {sparse}",
  }


def lookups(n: int) -> str:
  return f"{n} lookup" + "s" * (n > 1)


def lookup_tests(axis: str, hops: int, chains: int) -> tuple[Test, ...]:
  """Tests of the first to the last of `hops` chained lookups, told apart on an axis; guessing is among the chains."""
  return tuple(
    Test({axis: lookups(n)}, dict(task_args=dict(asked=n)), 1 / chains) for n in range(1, hops + 1)
  )


def cell(size: str, name: str, pattern: str) -> Cell:
  s = SIZES[size]
  args = dict(vocab_size=s.vocab_size, num_chains=s.chains, hops=s.hops, power_a=1.0)
  # Tests of one lookup have as many places for labels, and so training's program.
  c = config(
    pattern, "multi_hop_mqar", args | dict(label_slots=s.chains * s.hops), seq_len=s.length,
    layers=7 if name == SHIFTS else 4, d_model=s.d_model, steps=s.steps, batch_size=s.batch_size, stop_accuracy=0.995,
  )  # fmt: skip
  return Cell(
    {"task": "chained lookups", "model": name},
    c,
    s.learning_rates,
    lookup_tests("asked", s.hops, s.chains),
  )


def cells(size: str) -> list[Cell]:
  return [cell(size, *model) for model in patterns(SIZES[size]).items()]


def loses_more(one: str, other: str, axis: str, hops: int):
  """That from one lookup to `hops` of them one model loses more than another."""

  def drop(value, model):
    return value(**{"model": model, axis: lookups(1)}) - value(
      **{"model": model, axis: lookups(hops)}
    )

  return lambda value: drop(value, one) > drop(value, other)


def predictions(size: str) -> tuple[Prediction, ...]:
  hops = SIZES[size].hops
  softmax, shifts, mamba2, kda, with_softmax, with_infllm = (
    dict(model=name)
    for name in ("softmax", SHIFTS, "mamba2", "kda", "3 kda : 1 softmax", "3 kda : 1 infllm_v2")
  )
  last = dict(asked=lookups(hops))
  return (
    Prediction(
      "The last lookup: three layers of KDA to one of softmax attention are better than KDA alone by 10 points.",
      better(with_softmax, kda, 10, **last),
    ),
    Prediction(
      "From one lookup to the last, KDA alone loses more than with one layer of softmax attention in four.",
      loses_more("kda", "3 kda : 1 softmax", "asked", hops),
    ),
    Prediction(
      "The last lookup: with sparse attention in place of softmax attention, the hybrid loses less than 10 points.",
      better(with_infllm, with_softmax, -10, **last),
    ),
    Prediction(
      "The last lookup: KDA is better than Mamba-2, which has no delta rule, by 10 points.",
      better(kda, mamba2, 10, **last),
    ),
    Prediction(
      "The last lookup: softmax attention gains 10 points by a shift before every layer.",
      better(shifts, softmax, 10, **last),
    ),
  )  # fmt: skip


EXPERIMENT = Experiment(
  name="multi_hop",
  title="Chained lookups",
  about=(
    "Pairs make chains: x0 says x1, x1 says x2, x2 says x3, in any order. A question is an x0, and asks for all that "
    "follow, one after the other; none is shown, so that who says x3 has looked up three times, each time what the "
    "lookup before has found. Four layers of a mixer alone, or of KDA with a fourth that sees everything or chooses. "
    "0 % is a guess among the ids that can be meant.\n\n"
    "MiniMax tells that multi-hop questions are where its linear models fell behind at scale, and went back to full "
    "attention; there is no small task for it in the papers. Each lookup on the way is trained, and ids tell their "
    "place in a chain: without both, none of these models learnt two lookups in 600 updates.\n\n"
    "What a lookup has found is needed a token later, so convolutions and shifts may matter as much as states. "
    "Attention to two tokens comes before softmax attention, once or before every layer (shifts), and once before KDA "
    "without its convolutions (one shift); the other models have convolutions or token shifts in every layer. Softmax "
    "attention alone has RoPE, and none in hybrids. Parameters are not made equal: there are no MLPs to do it by."
  ),
  source="none",
  cells=cells,
  plot={"x": "asked", "line": "model", "facet": "task"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
