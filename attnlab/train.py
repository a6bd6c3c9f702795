"""Trains a language model from a config.

  python -m attnlab.train --config=configs/quickstart.py
  python -m attnlab.train --config=configs/kda.py:size=small --workdir=runs/kda
  python -m attnlab.train --config=configs/kda.py --config.train.steps=2000 \\
      --config.optim.name=muon --config.data.train='/data/books/*.txt'

A directory that holds a run goes on where its last whole checkpoint stands, exactly: the losses are
those of a run that was never stopped (on GPUs, which add in any order unless XLA_FLAGS has
--xla_gpu_deterministic_ops=true, nearly). SIGTERM and Ctrl-C save a checkpoint and exit; a second
one does not wait for that. Into the working directory go:

  config.json               what the run was built from, every key
  checkpoints/STEP          arrays, optimiser, place in the data
  metrics.jsonl             the record, one line a logged update or evaluation
  samples.jsonl             generated text
  tensorboard/              the same for tensorboard --logdir
  summary.json              the figures at the end
  loss.png, loss.svg        the curve, if matplotlib is installed

Exit codes: 0 done; 2 bad input, told in one line; 3 a loss that is not finite; 143 and 130 stopped
by SIGTERM and SIGINT, saved. Compiled programs are kept in ~/.cache/attnlab between runs
(JAX_COMPILATION_CACHE_DIR: elsewhere).

Several hosts: run the same command on each, with --distributed and a directory that all can see.
TPU pods, SLURM and Open MPI name the hosts by themselves; elsewhere set JAX_COORDINATOR_ADDRESS
(host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID, and --distributed goes without
saying.
"""

import collections
import dataclasses
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from jaxtyping import PyTree
from ml_collections import ConfigDict

from attnlab import accounting, cli, data, generate, metrics, optim, sharding
from attnlab.checkpoint import (
  Checkpoints,
  NonFiniteError,
  check_same_run,
  first_non_finite,
  paths,
  stored_run,
)
from attnlab.config import check, resolve, to_json
from attnlab.errors import UserError
from attnlab.evaluate import make_evaluate, placer
from attnlab.nn import Stepped
from attnlab.signals import Signals, Stopped
from attnlab.state import State, make_init, parameter_count

# Updates sent to the devices ahead of the one whose loss has been looked at: enough that they
# never wait for the host, few enough that a bad loss stops the run at once.
_AHEAD = 2


def train(config: ConfigDict, workdir: str | Path, *, plot: bool = True) -> dict[str, Any]:
  """Trains as a config says, from the last checkpoint in `workdir` if there is one.

  Args:
    config: as `attnlab.config.load` returns it.
    workdir: made if it is not there.
    plot: whether to draw the curve at the end.

  Returns:
    What summary.json holds: final losses, speed, sizes.

  Raises:
    UserError: anything wrong with the config, the data or the run that is there; before long work.
    NonFiniteError: a loss or gradient that is not finite. The last checkpoint is from before it.
    Stopped: SIGTERM or SIGINT came; a checkpoint is saved.
  """
  workdir = Path(workdir)
  config = resolve(config)
  check(config, devices=jax.device_count())
  if stored := stored_run(workdir):
    check_same_run(stored, config, workdir)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), Signals() as signals:
    return _train(config, workdir, mesh, signals, plot)


def _train(
  config: ConfigDict, workdir: Path, mesh: jax.sharding.Mesh, signals: Signals, plot: bool
) -> dict[str, Any]:
  c = config.train
  batches = data.make_iterator(
    config.data,
    split="train",
    batch_size=c.batch_size,
    seed=config.seed,
    share=sharding.share(mesh),
  )
  token_bytes = data.tokenizer(config.data).token_bytes()
  place = placer(mesh, token_bytes, c.grad_accum)
  evaluate = make_evaluate(config, mesh) if c.eval_batches else None
  rate, peak = optim.schedule(config.optim, c.steps), np.float32(config.optim.learning_rate)

  # Where the run stands: the newest whole checkpoint, or the beginning.
  graphdef, init, abstract, update = _programs(_Like(config, mesh))
  checkpoints = Checkpoints(workdir / "checkpoints", c.keep_checkpoints)
  restored = checkpoints.restore(abstract, batches)
  step, state = restored or (0, init(config.seed))
  if step > c.steps:
    raise UserError(f"{workdir} is {step} updates old, past config.train.steps = {c.steps}")
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(workdir / "config.json", json.dumps(to_json(config), indent=2) + "\n")
  recorder = metrics.Recorder(
    workdir,
    step=step,
    steps=c.steps,
    tokens=c.batch_size * config.data.seq_len,
    flops=accounting.train_flops_per_token(config),
  )
  recorder.say(_headline(config, workdir, state, mesh, step))

  pending: collections.deque[tuple[int, PyTree, np.ndarray]] = collections.deque()

  def look(ahead: int) -> None:
    """Looks at the results of all updates but the `ahead` latest; a bad one ends the run."""
    while len(pending) > ahead:
      done, results, index = pending.popleft()
      norms = results.pop("norms")
      values = {k: v.item() for k, v in jax.device_get(results).items()}
      if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
        where = _blame(state["model"], np.asarray(norms))
        raise NonFiniteError(
          f"update {done}: loss {values['loss']}, gradient norm {values['grad_norm']}. {where}."
          f" The batch's records: {_records(config, index)}. {_kept(checkpoints)}"
        )
      if _due(done, c.log_every) or done == c.steps:
        values["learning_rate"] = float(rate(done - 1))
        recorder.train(done, metrics.with_bits(values))
      else:
        recorder.time(done)

  def save() -> None:
    look(0)
    if step in checkpoints.steps():
      return
    try:
      checkpoints.save(step, state, batches, config)
    except NonFiniteError as error:
      raise NonFiniteError(
        f"update {step}: {error}. The batch's records: {_records(config, index)}."
        f" {_kept(checkpoints)}"
      ) from None

  last = step == c.steps or _reached(c.stop_accuracy, workdir, step)
  try:
    while not last and not signals.stop(step):
      batch = next(batches)
      index = batch["index"]
      state, results = update(state, place(batch), peak)
      step += 1
      pending.append((step, results, index))
      look(_AHEAD)

      last = step == c.steps
      if evaluate and (last or _due(step, c.eval_every)):
        look(0)
        with recorder.pause():
          values = evaluate(graphdef, state["model"])
          recorder.evaluation(step, values)
        last |= values["accuracy"] >= c.stop_accuracy > 0
      if token_bytes.any() and c.sample_every and (last or _due(step, c.sample_every)):
        look(0)
        with recorder.pause():
          recorder.samples(step, generate.samples(config, graphdef, state["model"], step))
      if last or _due(step, c.checkpoint_every):
        with recorder.pause():
          save()
    look(0)
    if signals.stopped and not last:
      save()
      checkpoints.wait()
      recorder.say(f"{signals.stopped.name}: stopped after update {step}, checkpoint saved")
      raise Stopped(signals.stopped)
  finally:
    checkpoints.close()
    recorder.close()
  return _summarise(config, workdir, state, step, plot)


# --- the pieces -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Like:
  """A config as far as it determines programs: another seed, rate or data gives the same ones."""

  config: ConfigDict
  mesh: jax.sharding.Mesh

  @functools.cached_property
  def _key(self) -> tuple[str, jax.sharding.Mesh]:
    values = to_json(self.config)
    values["optim"].pop("learning_rate")
    parts = [values["model"], values["optim"], values["train"]["steps"]]
    return json.dumps(parts, sort_keys=True), self.mesh

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Like) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)


@functools.lru_cache(maxsize=2)
def _programs(like: _Like) -> tuple[nnx.GraphDef, Callable[..., State], State, Callable]:
  """What `make_init` gives, and the update; runs one after the other in one process share them."""
  c = like.config
  graphdef, init, abstract = make_init(c, optim.optimizer(c.optim, c.train.steps), like.mesh)
  tx = functools.partial(optim.optimizer, c.optim, c.train.steps)
  # Where a part alone is trained, all else stays.
  update = make_update(graphdef, tx, abstract, constants_step=not c.optim.only)
  return graphdef, init, abstract, update


def make_update(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation | Callable[[jax.Array], optax.GradientTransformation],
  abstract: State,
  constants_step: bool = True,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """The compiled (state, batch [A, B, T]) -> (state, results), A being microbatches.

  `tx` may be a function of the learning rate, which is then the update's third argument: one program serves all rates.

  `constants_step`: whether constants that updates move (`attnlab.nn.Stepped`) are moved.

  Results: the loss and all that the model reports, each the mean over the update's weighted
  targets; `grad_norm` before clipping; `norms`, one for each parameter's gradient. An update whose
  loss or gradient is not finite leaves the state as it was.
  """
  places = jax.tree.map(lambda x: x.sharding, abstract)

  def apply(grads, optimizer, params, *rate):
    return (tx(*rate) if callable(tx) else tx).update(grads, optimizer, params)

  def loss(trained, rest, batch, total):
    value, report = nnx.merge(graphdef, *trained, rest).loss(batch)
    # A microbatch counts by its targets, so that the sum is the mean over all of the update's.
    share = batch["weights"].sum() / total
    report = {k: v * share for k, v in report.items() if k != "weight"}
    return value * share, {"loss": value * share, **report}

  def gradients(trained, rest, batch):
    total = jnp.maximum(batch["weights"].sum(), 1)
    gradient = jax.grad(loss, has_aux=True)
    if batch["inputs"].shape[0] == 1:
      return gradient(trained, rest, jax.tree.map(lambda x: x[0], batch), total)

    def add(sums, microbatch):
      grads, report = gradient(trained, rest, microbatch, total)
      return jax.tree.map(jnp.add, sums, grads), report

    grads, reports = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), batch)
    return grads, jax.tree.map(lambda x: x.sum(0), reports)

  def update(state, batch, *rate):
    params, rest = state["model"]["params"], state["model"]["rest"]
    stepped, others = nnx.split_state(rest, Stepped, ...)
    (grads, directions), report = gradients((params, stepped), others, batch)
    norms = jnp.sqrt(jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]))
    norm = jnp.linalg.norm(norms)
    # optax is written for one device: the compiler, not we, decides how it runs on many.
    applied = jax.sharding.auto_axes(
      apply, out_sharding=(places["model"]["params"], places["optimizer"])
    )
    updates, optimizer = applied(grads, state["optimizer"], params, *rate)
    if constants_step:
      rest = nnx.merge_state(_step(stepped, directions), others)
    new = {
      "model": {"params": optax.apply_updates(params, updates), "rest": rest},
      "optimizer": optimizer,
    }
    finite = jnp.isfinite(report["loss"]) & jnp.isfinite(norm)
    state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    tokens = {k: batch[k].sum() for k in ("weights", "bytes")}
    return state, {**report, **tokens, "grad_norm": norm, "norms": norms}

  return jax.jit(update, donate_argnums=0)


def _step(stepped: nnx.State, directions: nnx.State) -> nnx.State:
  """Constants after an update, by the gradients that they have."""

  def one(constant: nnx.Variable, direction: nnx.Variable) -> nnx.Variable:
    rate = constant.get_metadata()["rate"]
    return jax.tree.map(lambda x, d: x - rate * jnp.sign(d), constant, direction)

  return jax.tree.map(one, stepped, directions, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _reached(accuracy: float, workdir: Path, step: int) -> bool:
  """Whether the run ended at `step` because its validation had this accuracy."""
  if accuracy <= 0:
    return False
  records = [r for r in metrics.read(workdir / "metrics.jsonl") if r["step"] == step]
  return any(r.get("eval/accuracy", -1) >= accuracy for r in records)


def _blame(model: PyTree, norms: np.ndarray) -> str:
  """Names the first parameter, or else the first gradient, that is not finite."""
  if path := first_non_finite(model):
    return f"Parameter {path} was not finite before it"
  bad = np.flatnonzero(~np.isfinite(norms))
  if not bad.size:
    return "All parameters and gradients are finite"
  return f"First bad gradient: {paths(model['params'])[bad[0]]} (all parameters are finite)"


def _records(config: ConfigDict, index: np.ndarray) -> str:
  first = int(index.flat[0])
  name = data.record_name(config.data, "train", first, config.seed)
  return f"index {index.tolist()} ({first} is {name})"


def _kept(checkpoints: Checkpoints) -> str:
  steps = checkpoints.steps()
  if not steps:
    return "There is no checkpoint yet"
  return f"The last good checkpoint, {checkpoints.directory / str(steps[-1])}, is kept"


def _headline(
  config: ConfigDict, workdir: Path, state: State, mesh: jax.sharding.Mesh, step: int
) -> str:
  size = parameter_count(state["model"])
  axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
  kind = jax.devices()[0].device_kind
  return (
    f"{workdir}: {config.model.pattern}, {metrics.human(size)} parameters,"
    f" {jax.device_count()} x {kind}{f' ({axes})' if axes else ''}"
    + (f", from checkpoint {step}" if step else "")
  )


def _summarise(
  config: ConfigDict, workdir: Path, state: State, step: int, plot: bool
) -> dict[str, Any]:
  """Draws the plot, writes summary.json and returns what is in it."""
  records = metrics.read(workdir / "metrics.jsonl")
  lines = [r for r in records if "loss" in r]
  evals = [r for r in records if "eval/nll" in r]
  speeds = [r["tokens_per_second"] for r in lines if "tokens_per_second" in r]
  tail = lines[-max(len(lines) // 20, 1) :]
  summary = {
    "pattern": config.model.pattern,
    "parameters": parameter_count(state["model"]),
    "steps": step,
    "tokens": step * config.train.batch_size * config.data.seq_len,
    "seconds": max((r["seconds"] for r in records), default=0.0),
    "tokens_per_second": statistics.median(speeds) if speeds else None,
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "loss": statistics.fmean(r["loss"] for r in tail) if tail else None,
    **{k: v for k, v in (evals[-1] if evals else {}).items() if k.startswith("eval/")},
  }
  if jax.process_index() == 0:
    metrics.write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    size = metrics.human(summary["parameters"])
    if plot:
      metrics.plot(workdir, f"{workdir.name}: {config.model.pattern}, {size} parameters")
  return summary


# --- the command line -----------------------------------------------------------------------------


def main(_) -> int | None:
  if flags.FLAGS.distributed:
    cli.join_processes()
  try:
    train(cli.config(), flags.FLAGS.workdir or cli.default_workdir())
  except NonFiniteError as error:
    print(f"error: not finite: {error}", file=sys.stderr)
    return 3
  return None


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_string("workdir", None, "Where the run lives. Default: runs/CONFIG-ARG.")
  flags.DEFINE_bool("distributed", cli.in_cluster(), "Join the run's other processes on start.")
  cli.run(main)
