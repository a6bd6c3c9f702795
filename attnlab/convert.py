"""Starts a run from another one's parameters: a trained full-attention model becomes a sparse one.

    python -m attnlab.convert --train --source=runs/mla --config=configs/dsa.py --workdir=runs/dsa
    python -m attnlab.convert --train --source=runs/softmax --config=configs/infllm2.py --workdir=runs/infllm2

The first is DSA's recipe (arXiv:2512.02556): the indexer, which is new, learns from full attention while all else is
frozen (--warmup_steps, --warmup_rate; the run in WORKDIR/warmup), then all learn, and attention is sparse. InfLLM-V2
(arXiv:2509.24663) and MoBA have nothing new, and train at once. What it cost is told at the end and written to
WORKDIR/conversion.json: the loss of the source, right after the conversion with everything seen and without, and after
training; and the indexer's recall. The same command again goes on where it was stopped.

Sizes and tokenizer are the source's, and so are all settings of its mixers that the new ones share: with others its
parameters would mean something else. Without --train only checkpoint 0 is written, for `attnlab.train`.
"""

import collections
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jaxtyping import PyTree
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from attnlab import cli, data, metrics, optim, sharding
from attnlab.checkpoint import Checkpoints, paths, stored_run
from attnlab.config import check, complete, flatten, resolve, to_json
from attnlab.errors import UserError
from attnlab.evaluate import make_evaluate
from attnlab.mixers import mixer
from attnlab.model import layer_specs, mixer_config
from attnlab.pattern import LayerSpec, parse_pattern, write_layer, write_layers
from attnlab.state import State, load_model, make_init, reading_mesh, run_config
from attnlab.train import train

# What a model's parameters depend on besides its mixers.
_SIZES = ("d_model", "num_layers", "vocab_size", "mlp", "tie_embeddings", "norm_eps")
# What their ids mean.
_TOKENIZER = ("tokenizer", "eos_id", "vocab_size")


def like(source: str | Path, config: ConfigDict) -> tuple[ConfigDict, dict[str, Any]]:
  """A config with the sizes and the tokenizer of another run, and the settings of its mixers that the config's share.

  A mixer shares them whose settings extend the other's, as InfLLM-V2's do softmax attention's, and DSA's latent
  attention's. What a single layer of the source has differently is in the config's pattern.

  Returns:
    The config, complete, and by key the values that were others.

  Raises:
    UserError: layers of the source that differ, where the config's pattern does not repeat as the source's does.
  """
  run, config = run_config(source), complete(config)
  old, before = run.model, dict(flatten(config))
  with config.unlocked():
    for key in _TOKENIZER:
      config.data[key] = run.data[key]
    for key in _SIZES:
      config.model[key] = old[key]
    _take_settings(old, config.model)
  config = complete(config)
  after = flatten(config)
  return config, {k: v for k, v in after if before[k] != v and k != "model.vocab_size"}


def _take_settings(old: ConfigDict, new: ConfigDict) -> None:
  """Gives the mixers of a ``model`` section what the layers of an old one have: what most layers of a mixer have in its
  section, what others have in the pattern."""
  settings = lambda model, spec: dataclasses.asdict(mixer_config(model, spec))  # noqa: E731
  layers = layer_specs(new)
  wanted = [settings(new, spec) for spec in layers]
  for was, spec, values in zip(layer_specs(old), layers, wanted, strict=True):
    if issubclass(mixer(spec.mixer).Config, mixer(was.mixer).Config):
      values |= settings(old, was)
  found: dict[str, dict[str, list[Any]]] = collections.defaultdict(dict)
  for spec, values in zip(layers, wanted, strict=True):
    right, section = settings(new, spec), found[mixer(spec.mixer).name]
    for key, value in values.items():
      if key not in dict(spec.settings) or right[key] != value:
        section.setdefault(key, []).append(value)
  for name, section in found.items():
    most = {key: statistics.mode(values) for key, values in section.items()}
    new.mixers[name] = ConfigDict(dict(new.mixers[name]) | most)

  def fits() -> bool:
    return all(settings(new, s) == w for s, w in zip(layer_specs(new), wanted, strict=True))

  if fits():
    return

  def text(spec: LayerSpec, values: dict[str, Any]) -> str:
    section = settings(new, LayerSpec(spec.mixer))
    own = tuple((key, value) for key, value in values.items() if section[key] != value)
    return write_layer(LayerSpec(spec.mixer, own))

  # Its layers are scanned as the old ones are: parameters lie alike.
  texts, pattern = list(map(text, layers, wanted)), parse_pattern(old.pattern)
  end = len(texts) - len(pattern.tail)
  period = (texts[:end] + texts[-1:] * len(pattern.period))[: len(pattern.period)]
  given, new.pattern = new.pattern, write_layers(period, texts[end:])
  if [s.mixer for s in layer_specs(new)] != [s.mixer for s in layers] or not fits():
    raise UserError(
      f"config.model.pattern = {given!r} has other layers where the source's {old.pattern!r} repeats,"
      " and these have settings of their own: let it repeat as the source's does"
    )


def convert(source: str | Path, config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
  """Writes checkpoint 0 of a new run: what the source's newest checkpoint has, and the rest as it begins.

  Args:
    source: the directory of the run to begin from.
    config: of the new run.
    workdir: its directory, which holds no run yet.

  Returns:
    {"step": of the source, "new": paths of parameters that it has not, "left": paths that only it has}.

  Raises:
    UserError: nothing to begin from, a run that is there already, or parameters of another shape.
  """
  done: dict[str, Any] = {}

  def parameters(model: State, mesh: jax.sharding.Mesh) -> State:
    step, _, old = load_model(source, run_config(source), mesh)
    has = _by_path(old["params"]) | _by_path(old["rest"])

    def taken(tree: PyTree) -> PyTree:
      """What the source has of it, and what it has not as it is."""
      for name, x in _by_path(tree).items():
        if name in has and has[name].shape != x.shape:
          raise UserError(f"{name} is {has[name].shape} in {source}, the config's {x.shape}")
      leaves = [has.get(name, x) for name, x in _by_path(tree).items()]
      return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    names, others = (_by_path(m["params"]).keys() for m in (model, old))
    done.update(step=step, new=sorted(names - others), left=sorted(others - names))
    return {name: taken(tree) for name, tree in model.items()}

  begin(config, workdir, parameters)
  return done


def _by_path(tree: PyTree) -> dict[str, jax.Array]:
  return dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def begin(
  config: ConfigDict,
  workdir: str | Path,
  parameters: Callable[[State, jax.sharding.Mesh], State],
) -> None:
  """Writes checkpoint 0 of a new run.

  Args:
    config: of the run.
    workdir: its directory, which holds no run yet.
    parameters: of {"params", "rest"} as they begin, on a mesh, to what they shall be.

  Raises:
    UserError: a run that is there already, a config that cannot work, and what ``parameters`` raises.
  """
  workdir, config = Path(workdir), resolve(config)
  check(config, devices=jax.device_count())
  if stored_run(workdir):
    raise UserError(f"{workdir} holds a run already: give another --workdir")
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    tx = optim.optimizer(config.optim, config.train.steps)
    _, init, _ = make_init(config, tx, mesh)
    state = init()
    state["model"] = parameters(state.pop("model"), mesh)
    batches = data.make_iterator(
      config.data,
      split="train",
      batch_size=config.train.batch_size,
      seed=config.seed,
      share=sharding.share(mesh),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(workdir / "config.json", json.dumps(to_json(config), indent=2) + "\n")
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_checkpoints)
    checkpoints.save(0, state, batches, config)
    checkpoints.close()


def convert_and_train(
  source: str | Path,
  config: ConfigDict,
  workdir: str | Path,
  *,
  warmup_steps: int = 100,
  warmup_rate: float = 1e-3,
) -> list[dict[str, Any]]:
  """``convert``, the warm-up of what is new, if it has a loss of its own, and training.

  Args:
    source, config, workdir: as of ``convert``; the run may be there, and goes on.
    warmup_steps: updates in which only parts with losses of their own learn, from full attention; 0: none.
    warmup_rate: their learning rate.

  Returns:
    What was measured on the validation split, in turn: {"model", "attention": "dense" or "sparse", and what
    ``attnlab.evaluate`` tells}.
  """
  workdir = Path(workdir)
  record = workdir / "conversion.json"
  rows: list[dict[str, Any]] = json.loads(record.read_text()) if record.exists() else []

  def measure(model: str, run: str | Path, config: ConfigDict, *attention: str) -> None:
    """Adds rows of a run's newest checkpoint, unless they are there."""
    for kind in attention:
      if any((r["model"], r["attention"]) == (model, kind) for r in rows):
        continue
      c = resolve(config)
      c.model.dense = kind == "dense"
      mesh = reading_mesh(c.train.batch_size // c.train.grad_accum, c.data.seq_len)
      _, graphdef, parameters = load_model(run, c, mesh)
      with jax.set_mesh(mesh):
        rows.append(
          {"model": model, "attention": kind} | make_evaluate(c, mesh)(graphdef, parameters)
        )
      workdir.mkdir(parents=True, exist_ok=True)
      metrics.write_atomically(record, json.dumps(rows, indent=2) + "\n")

  of_source = complete(config)
  of_source.model = run_config(source).model
  measure("source", source, of_source, "dense")
  begin = source
  if own_loss(config) and warmup_steps:
    begin, first = workdir / "warmup", of_warmup(config, warmup_steps, warmup_rate)
    if not stored_run(begin):
      convert(source, first, begin)
    measure("converted", begin, config, "dense", "sparse")
    train(first, begin)
    measure("after the warm-up", begin, config, "sparse")
  if not stored_run(workdir):
    convert(begin, config, workdir)
  if begin == source:
    measure("converted", workdir, config, "dense", "sparse")
  train(config, workdir)
  measure("after training", workdir, config, "sparse")
  return rows


def of_warmup(config: ConfigDict, steps: int, rate: float) -> ConfigDict:
  """The config of the warm-up: parts with losses of their own learn from full attention, at a rate that is reached in a
  quarter of the updates, or in as many as the config says if these are fewer."""
  config = complete(config)
  config.model.dense, config.optim.only = True, own_loss(config)
  config.optim.learning_rate, config.train.steps = rate, steps
  config.optim.warmup_steps = min(config.optim.warmup_steps, steps // 4)
  return config


def own_loss(config: ConfigDict) -> str:
  """The parts of a config's mixers that learn from losses of their own, as ``config.optim.only`` names them."""
  kinds = (mixer(name) for name in parse_pattern(config.model.pattern).mixers)
  return ",".join(sorted({part for kind in kinds for part in kind.own_loss}))


def _print(rows: list[dict[str, Any]]) -> None:
  table = Table()
  for name in ("model", "attention", "nats a target", "bits a byte", "indexer's recall"):
    table.add_column(name, justify="left" if name in ("model", "attention") else "right")
  for row in rows:
    keys = ("nll", "bits_per_byte", "indexer_recall")
    cells = (f"{row[k]:.4f}" if k in row else "-" for k in keys)
    table.add_row(row["model"], row["attention"], *cells)
  Console(highlight=False).print(table)


def main(_) -> None:
  f = flags.FLAGS
  workdir = f.workdir or cli.default_workdir()
  config, taken = like(f.source, cli.config())
  for key, value in taken.items():
    print(f"config.{key} = {value!r}, as in {f.source}")
  if f.train:
    _print(
      convert_and_train(
        f.source, config, workdir, warmup_steps=f.warmup_steps, warmup_rate=f.warmup_rate
      )
    )
    return
  result = convert(f.source, config, workdir)
  print(f"{workdir}: begins from {f.source}, checkpoint {result['step']}")
  for what, names in (("new", result["new"]), ("left out", result["left"])):
    print(f"{what}: {', '.join(names) or 'nothing'}")


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_string("source", None, "The directory of the run to begin from.", required=True)
  flags.DEFINE_string("workdir", None, "The new run's directory. Default: by the config's name.")
  flags.DEFINE_bool("train", False, "Train too: the warm-up of what is new, then all.")
  flags.DEFINE_integer("warmup_steps", 100, "Updates of the warm-up; 0: none.", lower_bound=0)
  flags.DEFINE_float("warmup_rate", 1e-3, "Learning rate of the warm-up.", lower_bound=0)
  cli.run(main)
