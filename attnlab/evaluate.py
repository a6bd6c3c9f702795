"""Evaluates a run's checkpoint on the validation split.

  python -m attnlab.evaluate --workdir=runs/kda
  python -m attnlab.evaluate --workdir=runs/kda --batches=0 --lengths=1,2,4,8

Prints loss, accuracy and, for text, bits per byte: over --batches batches, 0 for all of the split.
With --lengths, rows are up to so many times as long as in training, and the loss is shown by
position in the document, which says whether the model has any use for a context longer than it was
trained on. What is printed is also written to WORKDIR/evaluate-STEP.json.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from attnlab import cli, data, metrics, sharding
from attnlab.errors import UserError
from attnlab.state import load_model, reading_mesh, run_config

# The first bucket of positions is [0, 64), and each next one is as wide as all before it.
_FIRST_BUCKET = 64


def placer(
  mesh: jax.sharding.Mesh, token_bytes: np.ndarray, microbatches: int | None = None
) -> Callable[[data.Batch], dict[str, jax.Array]]:
  """What puts a process's share of the rows on its devices.

  Args:
    mesh: the run's.
    token_bytes: bytes of text that each id stands for.
    microbatches: give the arrays a leading axis of so many; None: none.

  Returns:
    A function of a batch of numpy arrays. Beside the model's inputs its result has "bytes", what
    the weighted targets stand for, [B, T] like them.
  """
  spec = sharding.batch_sharding(mesh).spec
  lead = () if microbatches is None else (microbatches,)
  where = NamedSharding(mesh, PartitionSpec(*(None for _ in lead), *spec))
  _, shares = sharding.share(mesh)

  def put(local: np.ndarray) -> jax.Array:
    local = local.reshape(*lead, -1, *local.shape[1:])
    shape = list(local.shape)
    shape[len(lead)] *= shares
    return jax.make_array_from_process_local_data(where, local, tuple(shape))

  def place(batch: data.Batch) -> dict[str, jax.Array]:
    rows = {k: v for k, v in batch.items() if k != "index"}
    rows["bytes"] = token_bytes[batch["targets"]] * batch["weights"]
    return {k: put(v) for k, v in rows.items()}

  return place


def make_evaluate(
  config: ConfigDict, mesh: jax.sharding.Mesh
) -> Callable[[nnx.GraphDef, PyTree], dict[str, float]]:
  """What evaluates a model on the first `train.eval_batches` batches of the validation split.

  Args:
    config: a resolved config.
    mesh: the run's.

  Returns:
    A function of the model's structure and arrays: nll in nats, accuracy, bits_per_token and, for
    text, bits_per_byte; for a task, row_accuracy: the share of examples of which every target is
    right; and what the layers report, such as an indexer's recall. It reads the same rows each time.

  Raises:
    UserError: anything wrong with the validation data.
  """
  batches = data.make_iterator(
    config.data,
    split="validation",
    batch_size=config.train.batch_size // config.train.grad_accum,
    seed=config.seed,
    share=sharding.share(mesh),
  )
  start = batches.get_state()
  place = placer(mesh, data.tokenizer(config.data).token_bytes())

  def evaluate(graphdef: nnx.GraphDef, model: PyTree) -> dict[str, float]:
    batches.set_state(start)
    count = config.train.eval_batches or None
    totals = [_totals(graphdef, model, place(b)) for b in itertools.islice(batches, count)]
    sums = {k: sum(float(t[k]) for t in totals) for k in totals[0]}
    weights = max(sums["weights"], 1)
    means = {k: sums[k] / weights for k in ("nll", "accuracy")}
    layers = {k: v / len(totals) for k, v in sums.items() if k.startswith("layers/")}
    means |= {k.removeprefix("layers/"): v for k, v in layers.items()}
    if config.data.name == "task":
      means["row_accuracy"] = sums["right_rows"] / max(sums["rows"], 1)
    return metrics.with_bits(means | {k: sums[k] for k in ("weights", "bytes")})

  return evaluate


@jax.jit(static_argnums=0)
def _totals(graphdef: nnx.GraphDef, model: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
  nll, _, correct, w, aux = nnx.merge(graphdef, model["params"], model["rest"]).scores(batch)
  rows = (w > 0).any(axis=1)
  return {
    "nll": (w * nll).sum(),
    "accuracy": (w * correct).sum(),
    "rows": rows.sum(),
    "right_rows": (rows & ((correct > 0) | (w == 0)).all(axis=1)).sum(),
    **{k: batch[k].sum() for k in ("weights", "bytes")},
    **{f"layers/{k}": v for k, v in aux.items()},
  }


@jax.jit(static_argnums=0)
def _token_nll(
  graphdef: nnx.GraphDef, model: PyTree, batch: dict[str, Array]
) -> Float[Array, "B T"]:
  return nnx.merge(graphdef, model["params"], model["rest"]).token_nll(batch)


def by_position(
  config: ConfigDict,
  graphdef: nnx.GraphDef,
  model: PyTree,
  mesh: jax.sharding.Mesh,
  *,
  length: int,
  tokens: int | None,
) -> list[dict[str, float]]:
  """The loss by position in the document, in rows of a given length.

  Args:
    config: a resolved config.
    graphdef, model: the model.
    mesh: where it lies.
    length: tokens a row. A longer document goes on in the next row as a new one.
    tokens: of the validation split to read, at least; None: all.

  Returns:
    For each bucket of positions that holds a target: from, to (exclusive), targets, nll.
  """
  long = config.copy_and_resolve_references()
  long.data.seq_len = length
  long.data.shuffle_tokens = 0  # Rows of every length then hold the same text.
  rows = mesh.shape["replica"] * mesh.shape["data"]
  batches = data.make_iterator(long.data, split="validation", batch_size=rows, seed=config.seed)
  place = placer(mesh, data.tokenizer(config.data).token_bytes())
  edges = [0, *_edges(length)]
  weights, sums = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
  count = None if tokens is None else math.ceil(tokens / (rows * length))
  for batch in itertools.islice(batches, count):
    nll = np.asarray(_token_nll(graphdef, model, place(batch)), np.float64)
    bucket = np.searchsorted(edges, batch["positions"], side="right") - 1
    np.add.at(weights, bucket, batch["weights"])
    np.add.at(sums, bucket, batch["weights"] * nll)
  return [
    {"from": edges[i], "to": edges[i + 1], "targets": int(weights[i]), "nll": sums[i] / weights[i]}
    for i in range(len(weights))
    if weights[i]
  ]


def _edges(length: int) -> list[int]:
  edges = [min(_FIRST_BUCKET, length)]
  while edges[-1] < length:
    edges.append(min(2 * edges[-1], length))
  return edges


def evaluate(
  workdir: str | Path,
  *,
  step: int | None = None,
  batches: int | None = None,
  lengths: Sequence[float] = (),
) -> dict[str, Any]:
  """Evaluates a run's checkpoint.

  Args:
    workdir: the run's.
    step: of the checkpoint; None: the newest.
    batches: how many of validation, 0: all; None: as in training.
    lengths: row lengths over the training length, for the loss by position.

  Returns:
    {"step", "nll", "accuracy", "bits_per_token", "bits_per_byte", "by_position": {length: ...}}.
  """
  config = run_config(workdir)
  if batches is not None:
    config.train.eval_batches = batches
  others = [round(times * config.data.seq_len) for times in lengths]
  rows = config.train.batch_size // config.train.grad_accum
  mesh = reading_mesh(rows, math.gcd(config.data.seq_len, *others))
  step, graphdef, model = load_model(workdir, config, mesh, step)
  with jax.set_mesh(mesh):
    result: dict[str, Any] = {"step": step} | make_evaluate(config, mesh)(graphdef, model)
    # One number for all lengths, which are compared on the same text; of the longest, eight rows.
    tokens = max([config.train.eval_batches * rows * config.data.seq_len, *(8 * n for n in others)])
    for length in others:
      result.setdefault("by_position", {})[length] = by_position(
        config,
        graphdef,
        model,
        mesh,
        length=length,
        tokens=tokens if config.train.eval_batches else None,
      )
  return result


def _print(result: dict[str, Any], workdir: str) -> None:
  console = Console(highlight=False)
  shown = "  ".join(f"{k} {v:.4f}" for k, v in result.items() if isinstance(v, float))
  console.print(
    f"{workdir}, checkpoint {result['step']}, validation:  {shown}", soft_wrap=True, markup=False
  )
  if "by_position" not in result:
    return
  console.print("Nats a target, by position in the document and by length of the row:")
  table = Table()
  table.add_column("position")
  for length in result["by_position"]:
    table.add_column(str(length), justify="right")
  columns = [{(b["from"], b["to"]): b for b in rows} for rows in result["by_position"].values()]
  for low, high in sorted({key for column in columns for key in column}):
    cells = [f"{c[low, high]['nll']:.4f}" if (low, high) in c else "-" for c in columns]
    table.add_row(f"{low} to {high - 1}", *cells)
  console.print(table)


def main(_) -> None:
  f = flags.FLAGS
  try:
    lengths = [float(x) for x in f.lengths]
  except ValueError as error:
    raise UserError(f"--lengths={','.join(f.lengths)} must be numbers such as 1,2,4,8") from error
  result = evaluate(f.workdir, step=f.step, batches=f.batches, lengths=lengths)
  _print(result, f.workdir)
  path = Path(f.workdir) / f"evaluate-{result['step']}.json"
  metrics.write_atomically(path, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
  flags.DEFINE_integer("step", None, "Of the checkpoint. Default: the newest.", lower_bound=0)
  flags.DEFINE_integer("batches", None, "Of validation; 0: all. Default: as in training.", 0)
  flags.DEFINE_list("lengths", [], "Row lengths for the loss by position, over training's.")
  cli.run(main)
