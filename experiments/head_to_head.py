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
  better,
  config,
  depth,
  equal_mlp,
)
from experiments.equal_bytes import equal_window
from experiments.harness import main
from experiments.multi_hop import lookup_tests, loses_more

# Lengths of context that costs are told of.
CONTEXTS = {"4k": 4096, "128k": 131_072, "1M": 1_048_576}
# Sequences that share one reading of the parameters, as on a server: with one alone, parameters are all that counts.
BATCH = 64
COST = f"bytes a decoded token at 128k, batch {BATCH}"


@dataclasses.dataclass(frozen=True)
class Size:
  """A protocol.

  Attributes:
    length: of a row of every task in training; words of parity have up to three quarters of it. Tests of extrapolation
      are at four times as much.
    vocab_size, pairs: of all tasks but text; recall has so many pairs, chains of lookups as many in all.
    hops: lookups of a chain.
    text: length of a row of text; extrapolation is to eight times as much.
    heads, head_dim: of every mixer.
    block: of sparse attention, which sees three.
    d_model, mlp: of softmax attention's model; the MLPs of the others make up for their parameters.
    layers: of every model; hybrids whose period is longer are left out.
    steps, batch_size: of training. Every model sees the same examples in the same order.
    learning_rates: the grid.
  """

  length: int
  vocab_size: int
  pairs: int
  hops: int
  text: int
  heads: int
  head_dim: int
  block: int
  d_model: int
  mlp: int
  layers: int
  steps: int
  batch_size: int
  learning_rates: tuple[float, ...]


SIZES = {
  "cpu": Size(32, 64, 6, 2, 128, 2, 16, 4, 64, 128, 4, 600, 32, (5e-3, 1e-2)),
  "gpu": Size(512, 1024, 60, 3, 1024, 4, 32, 32, 256, 512, 8, 1500, 64, (1e-3, 2e-3)),
  "paper": Size(4096, 8192, 510, 3, 4096, 8, 64, 64, 512, 1024, 16, 40_000, 64, (2.5e-4, 5e-4, 1e-3)),
}  # fmt: skip


@functools.lru_cache(maxsize=8)
def models(s: Size) -> dict[str, str]:
  """Name in the table -> pattern. Every linear state has head_dim x head_dim values a head."""
  heads, d = f"num_heads={s.heads}, head_dim={s.head_dim}", s.head_dim
  seen = f"{heads}, block_size={s.block}, top_k=3"
  pool = f"pool_size={s.block // 2}, pool_stride={s.block // 4}"
  softmax, nope = f"softmax({heads})", f"softmax({heads}, rope_fraction=0.0)"
  infllm = f"infllm_v2({seen}, {pool}, initial=1, local=1)"
  nsa = f"nsa({seen}, {pool}, initial=1, local=1, window={s.block})"
  # As many tokens as the others' three blocks; a latent as wide as a head's keys and values.
  dsa = (
    f"dsa(num_heads={s.heads}, nope_dim={d}, rope_dim={d // 2}, value_dim={d}, kv_lora_rank={2 * d},"
    f" top_k={3 * s.block}, index_heads=2, index_dim={d}, index_rope_dim={d // 2})"
  )

  def linear(name: str, more: str = "") -> str:
    return f"{name}({heads}, value_dim={d}{more})"

  def alone(layer: str) -> str:
    return after_shift(f"{s.layers}*{layer}")

  delta, kda = linear("gated_deltanet"), linear("kda")
  window = equal_window(
    _model(s, alone(delta)), lambda w: _model(s, alone(f"swa({heads}, window={w})"))
  )
  every: dict[str, str | tuple[int, str, str]] = {
    "softmax": softmax,
    "swa": f"swa({heads}, window={window})",
    "gated_deltanet": delta,
    "kda": kda,
    "mamba2": f"mamba2({heads}, state_dim={d})",
    "deltanet negative": linear("deltanet", ", negative_eigenvalues=True"),
    "infllm_v2": infllm,
    "3 kda : 1 softmax": (3, kda, nope),
    "3 kda : 1 infllm_v2": (3, kda, infllm),
    "3 gated_deltanet : 1 softmax": (3, delta, nope),
    "3 gated_deltanet : 1 nsa": (3, delta, nsa),
    "3 kda : 1 dsa": (3, kda, dsa),
    "deltanet": linear("deltanet"),
    "gla": linear("gla"),
    "retnet": linear("retnet"),
    "rwkv7": f"rwkv7({heads})",
    "mamba3": f"mamba3({heads}, state_dim={d})",
    "nsa": nsa,
    "dsa": dsa,
    "moba": f"moba({seen})",
    "1 gated_deltanet : 1 softmax": (1, delta, nope),
    "7 gated_deltanet : 1 softmax": (7, delta, nope),
    "3 lightning : 1 infllm_v2": (3, linear("lightning"), infllm),
    "swa with sinks": f"swa({heads}, window={window}, sinks=True)",
    "comba": linear("comba"),
    "gated_delta_product": linear("gated_delta_product"),
    "linear_attention": linear("linear_attention"),
    "lightning": linear("lightning"),
    "hgrn2": linear("hgrn2"),
    "gdn2": linear("gdn2"),
    "ttt_linear": f"ttt_linear({heads})",
  }
  out = {}
  for name, layers in every.items():
    if isinstance(layers, str):
      out[name] = alone(layers)
    elif s.layers % (layers[0] + 1) == 0:
      n, first, last = layers
      out[name] = after_shift(f"{n}*{first} + {last}", s.layers // (n + 1))
  return out


def _model(s: Size, pattern: str) -> ConfigDict:
  """The model's section, resolved, for text."""
  c = base()
  c.model.pattern, c.model.d_model = pattern, s.d_model
  c.model.num_layers = depth(pattern, s.layers)
  c.model.mlp.hidden = s.mlp
  return resolve(c).model


@functools.lru_cache(maxsize=256)
def _mlp(s: Size, pattern: str) -> int:
  """The MLP's width that gives a model softmax attention's parameters."""
  return equal_mlp(pattern, models(s)["softmax"], layers=s.layers, d_model=s.d_model, mlp=s.mlp)


@functools.lru_cache(maxsize=256)
def costs(s: Size, pattern: str) -> Mapping[str, Any]:
  """Of a model for text, at several lengths."""
  model = _model(dataclasses.replace(s, mlp=_mlp(s, pattern)), pattern)
  out = {}
  for name, length in CONTEXTS.items():
    got = accounting.costs(model, length, BATCH)
    out[f"cache bytes at {name}"] = got.cache_bytes
    out[f"bytes a decoded token at {name}, batch {BATCH}"] = round(got.decode_bytes)
  return out


TASKS = ("recall", "parity", "needle", "lookups", "text")


def cell(s: Size, task: str, name: str, pattern: str) -> Cell:
  n = s.length
  # All tasks but text have the same ids and places for labels, and so one compiled program a model.
  same = dict(label_slots=n)
  pairs = same | dict(vocab_size=s.vocab_size, random_non_queries=False)
  hay = same | dict(vocab_size=s.vocab_size)
  word = 3 * n // 4
  longer = same | dict(everywhere=False, min_length=n, max_length=4 * n)
  far = {k: dict(seq_len=k * s.text) for k in (1, 8)}
  data, args, tests = {
    "recall": ("mqar", pairs | dict(num_kv_pairs=s.pairs), (Test({"measure": "recall"}, chance=2 / s.vocab_size),)),
    "parity": (
      "parity", same | dict(everywhere=True, min_length=3, max_length=word),
      (Test({"measure": "parity"}, dict(task_args=dict(everywhere=False)), 0.5),
       Test({"measure": "parity, to 4 x longer"}, dict(seq_len=4 * n, task_args=longer), 0.5)),
    ),
    "needle": (
      "needle_filtering", hay,
      (Test({"measure": "needle"}, chance=1 / (s.vocab_size - 2)),
       Test({"measure": "needle, 4 x longer"}, dict(seq_len=4 * n), 1 / (s.vocab_size - 2))),
    ),
    "lookups": (
      "multi_hop_mqar", pairs | dict(num_chains=s.pairs // s.hops, hops=s.hops),
      lookup_tests("measure", s.hops, s.pairs // s.hops),
    ),
    "text": (
      "text", {},
      (Test({"measure": "bits a byte"}, far[1], measure="bits"),
       Test({"measure": "bits a byte, second half of 1 x"}, far[1], measure="late bits"),
       Test({"measure": "bits a byte, second half of 8 x"}, far[8], measure="late bits")),
    ),
  }[task]  # fmt: skip
  c = config(
    pattern, data, args, seq_len=s.text if task == "text" else n, layers=s.layers, d_model=s.d_model,
    mlp=_mlp(s, pattern), steps=s.steps, batch_size=s.batch_size * n // s.text if task == "text" else s.batch_size,
    evaluations=5, stop_accuracy=0.0 if task in ("parity", "text") else 0.995,
  )  # fmt: skip
  if task != "text":
    c.model.vocab_size = s.vocab_size
  return Cell({"task": task, "model": name}, c, s.learning_rates, tests, lambda: costs(s, pattern))


def cells(size: str) -> list[Cell]:
  s = SIZES[size]
  every = models(s).items()
  return [cell(s, task, name, pattern) for name, pattern in every for task in TASKS]


def predictions(size: str) -> tuple[Prediction, ...]:
  s = SIZES[size]

  def parity(value) -> bool:
    """Mamba-3 aside, whose rotation is an eigenvalue too."""
    far = {name: value(measure="parity, to 4 x longer", model=name) for name in models(s)}
    solved, _ = far.pop("deltanet negative"), far.pop("mamba3")
    return solved > 95 and max(far.values()) < 25

  return (
    Prediction(
      "Recall: Gated DeltaNet is better than a window of equal bytes by 10 points.",
      better(dict(model="gated_deltanet"), dict(model="swa"), 10, measure="recall"),
    ),
    Prediction(
      "Parity beyond the training length: DeltaNet with eigenvalues in [-1, 1] alone solves it.", parity
    ),
    Prediction(
      "Recall: three layers of KDA to one of sparse attention are within 10 points of three to one of full "
      "attention.",
      better(dict(model="3 kda : 1 infllm_v2"), dict(model="3 kda : 1 softmax"), -10, measure="recall"),
    ),
    Prediction(
      "From one lookup to two, Gated DeltaNet alone loses more than softmax attention.",
      loses_more("gated_deltanet", "softmax", "measure", s.hops),
    ),
  )  # fmt: skip


EXPERIMENT = Experiment(
  name="head_to_head",
  title="Head to head: mixers and hybrids, one recipe",
  about=(
    "Full, sliding-window, linear and sparse attention and their hybrids, with little else changed: the same "
    "examples in the same order, optimizer, updates, heads and parameters (within 3 %: the MLP's width makes up for "
    "the mixer's). The window has as many bytes as Gated DeltaNet's state; hybrids have no position encoding in "
    "softmax layers, as models that ship have it, and RoPE in sparse ones; those of linear and sparse layers have no "
    "full attention at all. Where no layer has a convolution "
    "or a token shift, attention to two tokens comes before the model, one layer more.\n\n"
    "Each model is trained on each task by itself. Recall asks for the value of a key; lookups for that, and then for "
    "the value of the value, which was not shown. Parity and "
    "needle are also asked at up to four times the length of training, text at eight times: the bits a byte in the "
    "second half of documents that fill such a row. Lower is better there.\n\n"
    "Costs are those of the model for text: a cache is of one sequence, and the bytes a decoded token are what is "
    f"read of the cache, and the parameters, which {BATCH} sequences share. The line joins the models that no other is "
    "both cheaper than and as good as.\n\n"
    "At the CPU's size width and updates were chosen after trials of softmax attention: at width 32 it did not learn "
    "recall."
  ),
  source="none",
  cells=cells,
  plot={"x": COST, "line": "model", "facet": "measure"},
  predictions=predictions,
)

if __name__ == "__main__":
  main(EXPERIMENT)
