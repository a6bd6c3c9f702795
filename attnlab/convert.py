"""Starts a run from another one's parameters, with other mixers that have parameters of the same names.

    python -m attnlab.convert --source=runs/mla --config=configs/dsa.py --workdir=runs/dsa-warm \\
      --config.model.dense=True --config.optim.only=indexer      # latent attention; the indexer is new
    python -m attnlab.train --config=configs/dsa.py --workdir=runs/dsa-warm \\
      --config.model.dense=True --config.optim.only=indexer      # and learns from full attention (arXiv:2512.02556)
    python -m attnlab.convert --source=runs/dsa-warm --config=configs/dsa.py --workdir=runs/dsa
    python -m attnlab.train --config=configs/dsa.py --workdir=runs/dsa         # all learn, attention is sparse

Full attention becomes InfLLM-V2 (arXiv:2509.24663) or MoBA in one step: nothing is new there.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from attnlab import cli, data, metrics, optim, sharding
from attnlab.checkpoint import Checkpoints, paths, stored_run
from attnlab.config import check, resolve, to_json
from attnlab.errors import UserError
from attnlab.state import load_model, make_init, run_config


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
  workdir, config = Path(workdir), resolve(config)
  check(config, devices=jax.device_count(), processes=jax.process_count())
  if stored_run(workdir):
    raise UserError(f"{workdir} holds a run already: give another --workdir")
  mesh = sharding.make_mesh(config.mesh)
  step, _, old = load_model(source, run_config(source), mesh)
  with jax.set_mesh(mesh):
    tx = optim.optimizer(config.optim, config.train.steps)
    _, init, _ = make_init(config, tx, mesh)
    state = init()
    params = state["model"]["params"]
    has = dict(zip(paths(old["params"]), jax.tree.leaves(old["params"]), strict=True))
    names, leaves = paths(params), jax.tree.leaves(params)
    for name, x in zip(names, leaves, strict=True):
      if name in has and has[name].shape != x.shape:
        raise UserError(f"{name} is {has[name].shape} in {source}, the config's {x.shape}")
    leaves = [has.get(name, x) for name, x in zip(names, leaves, strict=True)]
    state["model"]["params"] = jax.tree.unflatten(jax.tree.structure(params), leaves)
    batches = data.make_iterator(
      config.data,
      split="train",
      batch_size=config.train.batch_size,
      seed=config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(workdir / "config.json", json.dumps(to_json(config), indent=2) + "\n")
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_checkpoints)
    checkpoints.save(0, state, batches, config)
    checkpoints.close()
  new = [name for name in names if name not in has]
  return {"step": step, "new": new, "left": sorted(set(has) - set(names))}


def main(_) -> None:
  f = flags.FLAGS
  workdir = f.workdir or cli.default_workdir()
  result = convert(f.source, cli.config(), workdir)
  print(f"{workdir}: begins from {f.source}, checkpoint {result['step']}")
  for what, names in (("new", result["new"]), ("left out", result["left"])):
    print(f"{what}: {', '.join(names) or 'nothing'}")


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_string("source", None, "The directory of the run to begin from.", required=True)
  flags.DEFINE_string("workdir", None, "The new run's directory. Default: by the config's name.")
  cli.run(main)
