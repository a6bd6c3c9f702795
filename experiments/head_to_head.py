"""All mixers and hybrids under one recipe: what they can do, and what a decoded token costs.

python -m experiments.head_to_head [--size=cpu|gpu|paper] [--only=task=recall] [--seeds=3]
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from attnlab import accounting
from attnlab.config import resolve
from configs.base import base
from experiments.cells import (
  Cell,
  Experiment,
  Prediction,
  Test,
  after_shift,
  config,
)
from experiments.equal_bytes import equal_window
from experiments.harness import main

# Lengths of context that costs are told of.
CONTEXTS = {"4k": 4096, "128k": 131_072, "1M": 1_048_576}
COST = "bytes a decoded token at 128k"


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    length: of a row in training, of every task but parity; extrapolation is to four times as much.
    vocab_size, pairs, chains: of recall and of chained recall, which has half as many chains as pairs.
    parity: longest word in training and in tests.
    heads, head_dim: of every mixer.
    block: of sparse attention, which sees three.
    d_model, mlp: of softmax attention's model; the MLPs of the others make up for their parameters.
    layers: of every model, after SHIFT; a multiple of four.
    steps, batch_size: of training. Every model sees the same examples in the same order.
    learning_rates: the grid.
    models: of the table; None: all.
  """

  length: int
  vocab_size: int
  pairs: int
  parity: tuple[int, int]
  heads: int
  head_dim: int
  block: int
  d_model: int
  mlp: int
  layers: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]
  models: tuple[str, ...] | None = None


SIZES = {
  "cpu": Size(
    64, 128, 12, (24, 96), 2, 16, 8, 64, 128, 4, 400, 32, (3e-3, 1e-2),
    ("softmax", "swa", "mamba2", "deltanet [-1, 1]", "gated_deltanet", "kda", "infllm_v2",
     "3 gated_deltanet : 1 softmax", "3 kda : 1 softmax", "3 kda : 1 infllm_v2"),
  ),
  "gpu": Size(512, 1024, 64, (40, 160), 4, 32, 32, 256, 512, 8, 8000, 64, (5e-4, 1e-3, 2e-3)),
  "paper": Size(4096, 8192, 512, (40, 256), 8, 64, 64, 512, 1024, 12, 40_000, 64, (2.5e-4, 5e-4, 1e-3)),
}  # fmt: skip


@functools.lru_cache(maxsize=8)
def models(s: Size) -> dict[str, str]:
  """Name in the table -> pattern. Every linear state has head_dim x head_dim values a head."""
  heads = f"num_heads={s.heads}, head_dim={s.head_dim}"
  seen = f"{heads}, block_size={s.block}, top_k=3"
  pool = f"pool_size={s.block // 2}, pool_stride={s.block // 4}"
  softmax, nope = f"softmax({heads})", f"softmax({heads}, rope_fraction=0.0)"
  infllm = f"infllm_v2({seen}, {pool}, initial=1, local=1)"

  def linear(name: str, more: str = "") -> str:
    return f"{name}({heads}, value_dim={s.head_dim}{more})"

  def alone(layer: str) -> str:
    return after_shift(f"{s.layers}*{layer}")

  delta = linear("gated_deltanet")
  window = equal_window(
    _model(s, alone(delta)), lambda w: _model(s, alone(f"swa({heads}, window={w})"))
  )
  every = {
    "softmax": softmax,
    "swa": f"swa({heads}, window={window})",
    "linear_attention": linear("linear_attention"),
    "retnet": linear("retnet"),
    "lightning": linear("lightning"),
    "gla": linear("gla"),
    "hgrn2": linear("hgrn2"),
    "mamba2": f"mamba2({heads}, state_dim={s.head_dim})",
    "mamba3": f"mamba3({heads}, state_dim={s.head_dim})",
    "deltanet": linear("deltanet"),
    "deltanet [-1, 1]": linear("deltanet", ", negative_eigenvalues=True"),
    "gated_deltanet": delta,
    "gated_delta_product": linear("gated_delta_product"),
    "kda": linear("kda"),
    "comba": linear("comba"),
    "gdn2": linear("gdn2"),
    "rwkv7": f"rwkv7({heads})",
    "moba": f"moba({seen})",
    "infllm_v2": infllm,
    "nsa": f"nsa({seen}, {pool}, initial=1, local=1, window={s.block})",
    "3 gated_deltanet : 1 softmax": f"3*{delta} + {nope}",
    "3 kda : 1 softmax": f"3*{linear('kda')} + {nope}",
    "3 kda : 1 infllm_v2": f"3*{linear('kda')} + {infllm}",
    "3 lightning : 1 infllm_v2": f"3*{linear('lightning')} + {infllm}",
  }
  patterns = {
    name: alone(layer) if "+" not in layer else after_shift(layer, s.layers // 4)
    for name, layer in every.items()
  }
  return patterns if s.models is None else {name: patterns[name] for name in s.models}


def _model(s: Size, pattern: str) -> ConfigDict:
  """The model's section, resolved, for text."""
  c = base()
  c.model.pattern, c.model.num_layers, c.model.d_model = pattern, s.layers + 1, s.d_model
  c.model.mlp.hidden = s.mlp
  return resolve(c).model


@functools.lru_cache(maxsize=256)
def _parameters(s: Size, pattern: str) -> int:
  return accounting.parameters(_model(s, pattern))


def _mlp(s: Size, pattern: str) -> int:
  """The MLP's width that gives a model softmax attention's parameters."""
  softmax = models(s)["softmax"]
  target = _parameters(s, softmax)
  one = _parameters(dataclasses.replace(s, mlp=s.mlp + 1), softmax) - target
  return s.mlp + round((target - _parameters(s, pattern)) / one)


@functools.lru_cache(maxsize=256)
def costs(s: Size, pattern: str) -> Mapping[str, Any]:
  """Of a model for text, at several lengths, batch 1."""
  model = _model(dataclasses.replace(s, mlp=_mlp(s, pattern)), pattern)
  out = {}
  for name, length in CONTEXTS.items():
    got = accounting.costs(model, length)
    out[f"cache bytes at {name}"] = got.cache_bytes
    out[f"bytes a decoded token at {name}"] = round(got.decode_bytes)
  return out


def cell(s: Size, task: str, name: str, pattern: str) -> Cell:
  n = s.length
  recall = dict(vocab_size=s.vocab_size, random_non_queries=False)
  data, args, tests = {
    "text": (
      "text", {},
      (Test({"measure": "bits a byte"}, measure="bits"),
       Test({"measure": "bits a byte, 4 x longer"}, dict(seq_len=4 * n), measure="bits")),
    ),
    "recall": ("mqar", recall | dict(num_kv_pairs=s.pairs), (Test({"measure": "recall"}, chance=2 / s.vocab_size),)),
    "chained recall": (
      "multi_hop_mqar", recall | dict(num_chains=s.pairs // 2, hops=2),
      (Test({"measure": "chained recall"}, chance=1 / s.vocab_size),),
    ),
    "parity": (
      "parity", dict(everywhere=True, min_length=3, max_length=s.parity[0]),
      (Test({"measure": "parity, longer words"},
            dict(seq_len=s.parity[1],
                 task_args=dict(everywhere=False, min_length=s.parity[0], max_length=s.parity[1])), 0.5),),
    ),
    "needle": (
      "needle_filtering", dict(vocab_size=s.vocab_size),
      (Test({"measure": "needle"}, chance=1 / (s.vocab_size - 2)),
       Test({"measure": "needle, 4 x longer"}, dict(seq_len=4 * n), 1 / (s.vocab_size - 2))),
    ),
  }[task]  # fmt: skip
  length = s.parity[0] if task == "parity" else n
  c = config(
    pattern, data, args, seq_len=length, layers=s.layers + 1, d_model=s.d_model, mlp=_mlp(s, pattern),
    steps=s.steps, batch_size=s.batch_size,
  )  # fmt: skip
  return Cell({"task": task, "model": name}, c, s.learning_rates, tests, lambda: costs(s, pattern))


TASKS = ("recall", "chained recall", "parity", "needle", "text")


def cells(size: str) -> list[Cell]:
  s = SIZES[size]
  every = models(s).items()
  return [cell(s, task, name, pattern) for task in TASKS for name, pattern in every]


def compare(measure: str, one: str, other: str, by: float):
  """That one model is better than another by some points."""

  def holds(value):
    a, b = (value(measure=measure, model=name) for name in (one, other))
    return None if a is None or b is None else a > b + by

  return holds


def parity(value) -> bool | None:
  got = {name: value(measure="parity, longer words", model=name) for name in models(SIZES["cpu"])}
  if None in got.values():
    return None
  solved = got.pop("deltanet [-1, 1]")
  return solved > 95 and all(x < 25 for x in got.values())


def drops_more(value) -> bool | None:
  """That from recall to chained recall, Gated DeltaNet loses more than softmax attention."""
  drop = []
  for name in ("gated_deltanet", "softmax"):
    one, two = (value(measure=m, model=name) for m in ("recall", "chained recall"))
    if one is None or two is None:
      return None
    drop.append(one - two)
  return drop[0] > drop[1]


EXPERIMENT = Experiment(
  name="head_to_head",
  title="Head to head: mixers and hybrids, one recipe",
  about=(
    "Full, sliding-window, linear and sparse attention and their hybrids, with nothing else changed: the same "
    "examples in the same order, optimizer, updates, heads and parameters (within 3 %: the MLP's width makes up for "
    "the mixer's). The window has as many bytes as Gated DeltaNet's state; hybrids have no position encoding in "
    "softmax layers; those of linear and sparse layers have no full attention at all. A convolution comes before "
    "every model.\n\n"
    "Each model is trained on each task by itself. Costs are those of the model for text: a cache is of one "
    "sequence, and the bytes a decoded token are what is read of the cache, and the parameters. bits a byte: of text, "
    "lower is better."
  ),
  source="none",
  cells=cells,
  plot={"x": COST, "line": "model", "facet": "measure"},
  predictions=(
    Prediction(
      "Recall: Gated DeltaNet is better than a window of equal bytes by 10 points.",
      compare("recall", "gated_deltanet", "swa", 10),
    ),
    Prediction(
      "Parity beyond the training length: DeltaNet with eigenvalues in [-1, 1] alone solves it.", parity
    ),
    Prediction(
      "Recall: three layers of KDA to one of sparse attention are within 10 points of three to one of full "
      "attention.",
      compare("recall", "3 kda : 1 infllm_v2", "3 kda : 1 softmax", -10),
    ),
    Prediction(
      "From recall to chained recall, Gated DeltaNet alone loses more than softmax attention.", drops_more
    ),
  ),
)  # fmt: skip

if __name__ == "__main__":
  main(EXPERIMENT)
