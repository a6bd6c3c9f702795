"""How many global layers does a linear model need, and must they see everything?

python -m experiments.hybrid_ratio [--size=cpu|gpu|paper] [--only="linear to global=3:1"] [--seeds=3]
"""

import dataclasses

from experiments.cells import Cell, Experiment, Prediction, Test, after_shift, config, equal_mlp
from experiments.harness import main

# Linear layers to global ones; of each period the last layer is global, as in the models that ship.
RATIOS = {"0:1": 0, "1:1": 1, "3:1": 3, "7:1": 7, "pure": None}
GLOBAL = ("softmax", "sparse")


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    length: of a row.
    vocab_size: of the task.
    chains, hops: of multi-hop recall, whose questions are for 1 to so many lookups.
    head_dim: of keys and values; two heads.
    sparse: settings of the sparse layers: of InfLLM-V2, which has softmax attention's parameters.
    d_model, mlp: of the model of global layers alone; the MLPs of the others make up for their parameters. All have
      eight layers.
    steps, batch_size: of training, which ends early at 99.5 % of validation.
    learning_rates: the grid.
  """

  length: int
  vocab_size: int
  chains: int
  hops: int
  head_dim: int
  sparse: str
  d_model: int
  mlp: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]


SIZES = {
  # The sparse layers see 4 to 8 of 32 tokens: the block of the query and one chosen for it.
  "cpu": Size(
    32, 64, 3, 2, 8, "block_size=4, top_k=2, initial=0, local=1, pool_size=2, pool_stride=1",
    64, 64, 800, 32, (5e-3, 1e-2),
  ),
  "gpu": Size(
    512, 1024, 32, 2, 32, "block_size=32, top_k=4, initial=1, local=1, pool_size=16, pool_stride=8",
    256, 512, 10_000, 64, (5e-4, 1e-3, 2e-3),
  ),
  # Not a paper's: block sizes and the share of what is seen are InfLLM-V2's at 32k.
  "paper": Size(
    4096, 8192, 170, 3, 64, "block_size=64, top_k=12, initial=1, local=4, pool_size=32, pool_stride=16",
    512, 1024, 40_000, 64, (2.5e-4, 5e-4, 1e-3),
  ),
}  # fmt: skip


def pattern(s: Size, kind: str, ratio: str) -> str:
  heads = f"num_heads=2, head_dim={s.head_dim}"
  # Without the output gate, which the global layers do not have either.
  linear = f"gated_deltanet({heads}, value_dim={s.head_dim}, output_gate=False)"
  n = RATIOS[ratio]
  if n is None:
    return after_shift(f"8*{linear}")
  heads += ", rope_fraction=0.0"
  end = f"softmax({heads})" if kind == "softmax" else f"infllm_v2({heads}, {s.sparse})"
  return after_shift(f"{n}*{linear} + {end}", 8 // (n + 1)) if n else after_shift(f"8*{end}")


def lookups(n: int) -> str:
  return f"{n} lookup" + "s" * (n > 1)


def cell(size: str, kind: str, ratio: str) -> Cell:
  s = SIZES[size]
  args = dict(
    vocab_size=s.vocab_size, num_chains=s.chains, hops=s.hops, min_hops=1, max_hops=s.hops
  )
  model = dict(layers=8, d_model=s.d_model)
  mlp = equal_mlp(pattern(s, kind, ratio), pattern(s, "softmax", "0:1"), mlp=s.mlp, **model)
  c = config(
    pattern(s, kind, ratio), "multi_hop_mqar", args | dict(label_slots=s.chains), seq_len=s.length,
    mlp=mlp, steps=s.steps, batch_size=s.batch_size, stop_accuracy=0.995, **model,
  )  # fmt: skip
  tests = (
    Test({"asked": lookups(n)}, dict(task_args=dict(min_hops=n, max_hops=n)), 1 / s.vocab_size)
    for n in range(1, s.hops + 1)
  )
  return Cell({"global layers": kind, "linear to global": ratio}, c, s.learning_rates, tuple(tests))


def cells(size: str) -> list[Cell]:
  return [cell(size, kind, ratio) for kind in GLOBAL for ratio in RATIOS]


def at(value, n: int, kind: str, ratio: str) -> float | None:
  return value(**{"asked": lookups(n), "global layers": kind, "linear to global": ratio})


def one_is_enough(value) -> bool | None:
  hybrid, full = (at(value, 1, "softmax", ratio) for ratio in ("3:1", "0:1"))
  return None if hybrid is None or full is None else hybrid >= full - 5


def pure_is_worse(value) -> bool | None:
  pure, hybrid = (at(value, 2, "softmax", ratio) for ratio in ("pure", "3:1"))
  return None if pure is None or hybrid is None else pure < hybrid - 10


def sparse_is_enough(value) -> bool | None:
  sparse, full = (at(value, 1, kind, "3:1") for kind in GLOBAL)
  return None if sparse is None or full is None else sparse >= full - 10


EXPERIMENT = Experiment(
  name="hybrid_ratio",
  title="Hybrids: linear layers to global ones, which see all or choose",
  about=(
    "Eight layers: all global, one in two, one in four, one in eight, none. The linear ones are Gated DeltaNet, with "
    "states too small for all pairs; the global ones are softmax attention, or sparse attention (InfLLM-V2) with the "
    "very same parameters, which looks at a few blocks. A model of linear and sparse layers has no full attention at "
    "all.\n\n"
    "One lookup asks for the value of a key; two, for the value of the value: what large linear models were found to "
    "lose. Questions of both kinds are in the rows of training, and each says which it is; tests are of one kind. "
    "Where no layer has a convolution, attention to two tokens comes before the model, so that none has to learn "
    "which token came before; no other layer has position encoding. The linear layers are without output gates, which "
    "the others do not have; all have as many parameters, by the width of their MLPs."
  ),
  source="none",
  cells=cells,
  plot={"x": "linear to global", "line": "global layers", "facet": "asked"},
  predictions=(
    Prediction(
      "One lookup: three linear layers to one of softmax are within 5 points of softmax in all layers.",
      one_is_enough,
    ),
    Prediction(
      "Two lookups: linear layers alone are worse by 10 points than with one layer of softmax in four.",
      pure_is_worse,
    ),
    Prediction(
      "One lookup: at 3:1, sparse layers come within 10 points of softmax layers.", sparse_is_enough
    ),
  ),
)  # fmt: skip

if __name__ == "__main__":
  main(EXPERIMENT)
