"""Training end to end on real text: exact resuming, signals, bad losses, accumulation, many devices.

Whole runs are processes of their own, as users start them, on one device; what is compared to them
in this process has the suite's eight virtual devices.
"""

import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnlab import data, evaluate, generate, metrics, optim, sharding
from attnlab.checkpoint import NonFiniteError
from attnlab.config import load, resolve
from attnlab.errors import UserError
from attnlab.evaluate import placer
from attnlab.signals import Signals, Stopped
from attnlab.state import load_model, make_init, reading_mesh, run_config
from attnlab.train import make_update, train

pytestmark = pytest.mark.xdist_group("train")  # One worker: they share what is compiled.

ROOT = Path(__file__).parent.parent
TINY = "tests/tiny_config.py"
STEPS = 60
# Evaluation and sampling on many devices have tests of their own.
ON_MANY = {
  "mesh.data": 2,
  "mesh.context": 2,
  "mesh.model": 2,
  "train.eval_batches": 0,
  "train.sample_prompts": (),
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  """Compiled programs are shared by all of this module's runs, here and in processes."""
  directory = tmp_path_factory.mktemp("cache")
  settings = {
    "jax_compilation_cache_dir": str(directory / "attnlab"),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  yield directory
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope="module")
def launch(cache, one_device):
  """Starts `python -m attnlab.train` or another program on one device."""

  def start(workdir, *args, module="train", **env):
    command = [sys.executable, "-m", f"attnlab.{module}", f"--workdir={workdir}", *args]
    environment = os.environ | one_device | {"XDG_CACHE_HOME": str(cache)} | env
    return subprocess.Popen(
      command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

  return start


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
  """A run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  run = launch(workdir, f"--config={TINY}:steps={STEPS}")
  out, err = run.communicate()
  assert run.returncode == 0, err
  return workdir, out


def record(workdir):
  """metrics.jsonl without what the clock says."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  timed = ("seconds", "tokens_per_second", "mfu")
  return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def losses(workdir):
  return [r["loss"] for r in record(workdir) if "loss" in r]


def wait_for_lines(run, workdir, lines):
  """Until a running process has written so many lines of its record."""
  path, end = workdir / "metrics.jsonl", time.monotonic() + 120
  while run.poll() is None and time.monotonic() < end:
    if path.exists() and path.read_text().count("\n") >= lines:
      return
    time.sleep(0.001)
  raise AssertionError(f"no {lines} lines in {path}: {run.communicate()}")


def test_a_run_leaves_its_record(whole):
  workdir, out = whole
  lines = record(workdir)
  trained = [r for r in lines if "loss" in r]
  assert [r["step"] for r in trained] == list(range(1, STEPS + 1))
  assert trained[-1]["loss"] < 0.8 * trained[0]["loss"]
  assert trained[3]["tokens"] == 4 * 4 * 64
  assert trained[0]["learning_rate"] == pytest.approx(1.5e-3)
  assert trained[5]["bits_per_byte"] == pytest.approx(trained[5]["nll"] / np.log(2), rel=0.05)
  evals = [r for r in lines if "eval/nll" in r]
  assert [r["step"] for r in evals] == [25, 50, STEPS]
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["eval/bits_per_byte"] == evals[-1]["eval/bits_per_byte"]
  assert summary["steps"] == STEPS and summary["tokens"] == STEPS * 4 * 64
  samples = metrics.read(workdir / "samples.jsonl")
  assert {(s["prompt"], s["temperature"]) for s in samples} == {
    (p, t) for p in ("def ", "import ") for t in (0.0, 0.8)
  }
  for name in ("config.json", "loss.png", "loss.svg", "tensorboard"):
    assert (workdir / name).exists()
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["56", "60"]
  assert re.search(r"step 60/60  loss \d\.\d+  \d\.\d+ bits/byte  \S+ tokens/s", out)
  assert "\x1b" not in out  # plain lines where there is no terminal


def test_killed_and_stopped_and_resumed_is_the_same_run(launch, whole, tmp_path):
  workdir = tmp_path / "run"
  seed = random.randrange(1000)
  print(f"seed {seed}")
  at = random.Random(seed).randrange(22, 35)  # Saving at 21 has waited for 14 to be committed.

  run = launch(workdir, f"--config={TINY}:steps={STEPS}")
  wait_for_lines(run, workdir, at)
  run.send_signal(signal.SIGKILL)
  run.communicate()
  assert run.returncode == -signal.SIGKILL
  (workdir / "metrics.jsonl").open("a").write('{"step": 9')  # A line that was being written.

  run = launch(workdir, f"--config={TINY}:steps={STEPS}")
  wait_for_lines(run, workdir, at + 5)
  run.send_signal(signal.SIGTERM)
  out, err = run.communicate()
  assert run.returncode == 128 + signal.SIGTERM, err
  assert int(re.search(r"from checkpoint (\d+)", out)[1]) in (14, 21, 28)
  stopped = int(re.search(r"SIGTERM: stopped after update (\d+), checkpoint saved", out)[1])
  assert (workdir / "checkpoints" / str(stopped)).is_dir()
  assert record(workdir)[-1]["step"] == stopped < STEPS

  run = launch(workdir, f"--config={TINY}:steps={STEPS}")
  out, err = run.communicate()
  assert run.returncode == 0, err
  assert f"from checkpoint {stopped}" in out
  assert record(workdir) == record(whole[0])  # to the last bit
  assert metrics.read(workdir / "samples.jsonl") == metrics.read(whole[0] / "samples.jsonl")


def test_eight_devices_have_the_losses_of_one(whole, tmp_path):
  config = load(f"{TINY}:steps=8", ON_MANY)
  train(config, tmp_path / "many")
  # Sums over devices come in another order: float32 rounding, grown over eight updates of AdamW,
  # whose first ones divide by gradients as small as they are.
  np.testing.assert_allclose(losses(tmp_path / "many"), losses(whole[0])[:8], rtol=2e-3)
  assert losses(tmp_path / "many")[0] == pytest.approx(losses(whole[0])[0], rel=1e-5)


def test_a_run_goes_on_across_meshes_and_past_a_damaged_checkpoint(whole, tmp_path, caplog):
  shutil.copytree(whole[0], tmp_path / "run")
  (last,) = (tmp_path / "run" / "checkpoints" / "60").glob("model/manifest.ocdbt")
  last.write_bytes(b"")
  summary = train(load(f"{TINY}:steps={STEPS}", ON_MANY), tmp_path / "run")
  assert "checkpoints/60 is damaged" in caplog.text
  again, first = losses(tmp_path / "run"), losses(whole[0])
  assert again[:56] == first[:56]
  np.testing.assert_allclose(again[56:], first[56:], rtol=2e-3)
  assert summary["steps"] == STEPS
  # What was damaged has been replaced: the work is not done a third time.
  caplog.clear()
  before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
  train(load(f"{TINY}:steps={STEPS}", ON_MANY), tmp_path / "run")
  assert "damaged" not in caplog.text
  assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_not_run_again(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "run")
  summary = train(load(f"{TINY}:steps={STEPS}", ON_MANY), tmp_path / "run")
  assert summary["loss"] == json.loads((whole[0] / "summary.json").read_text())["loss"]
  assert record(tmp_path / "run") == record(whole[0])


def test_a_run_ends_when_it_is_accurate_enough(tmp_path):
  """A task with one possible answer is learned at once; the run that has ended so is not gone on with."""
  task = {"data.name": "task", "data.task": "palindrome", "data.seq_len": 8}
  config = load(TINY + ":pattern=linear_attention", task | {"model.num_layers": 1})
  config.data.task_args = dict(vocab_size=2)
  keys = dict(steps=50, batch_size=8, eval_every=5, eval_batches=1, stop_accuracy=0.99)
  config.train.update(keys)
  first = train(config, tmp_path)
  assert first["steps"] in (5, 10, 15) and first["eval/accuracy"] == 1
  before = record(tmp_path)
  again = train(config, tmp_path)
  assert again["steps"] == first["steps"] and record(tmp_path) == before


def test_a_run_is_not_cut_short(whole):
  with pytest.raises(UserError, match=r"60 updates old, past config.train.steps = 8"):
    train(load(f"{TINY}:steps=8", ON_MANY), whole[0])


def test_a_run_of_another_model_or_data_is_refused(whole):
  before = {p: p.stat().st_mtime_ns for p in whole[0].rglob("*")}
  for key, value in [("model.d_model", 48), ("data.seq_len", 32), ("train.batch_size", 8)]:
    with pytest.raises(UserError, match=rf"config\.{key} = \d+, not {value}"):
      train(load(f"{TINY}:steps=70", {key: value, **ON_MANY}), whole[0])
  assert {p: p.stat().st_mtime_ns for p in whole[0].rglob("*")} == before


def test_one_signal_is_noted_and_a_second_acts():
  # a shell that runs the tests in its background has them ignore SIGINT
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  with Signals() as signals:
    assert not signals.stop(1)
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.stop(2) and signals.stopped == signal.SIGINT
    assert Stopped(signals.stopped).code == 130
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)
  assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


# --- what is not finite -------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(launch, tmp_path):
  """A learning rate that no number survives, from update 3 on."""
  args = [f"--config={TINY}:steps={STEPS}", "--config.optim.learning_rate=1e38"]
  args += ["--config.optim.warmup_steps=0", "--config.train.checkpoint_every=1"]
  run = launch(tmp_path / "run", *args)
  _, err = run.communicate()
  assert run.returncode == 3, err
  line = err.strip().splitlines()[-1]
  found = re.match(r"error: not finite: update (\d+): ", line)
  assert found, line
  assert re.search(r"records: index \[\d+, \d+, \d+, \d+\] \(\d+ is .*\.py\)", line), line
  kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
  assert all(step < int(found[1]) for step in kept)
  if kept:
    assert f"checkpoints/{kept[-1]}, is kept" in line


def test_a_bad_parameter_is_named(monkeypatch, tmp_path):
  """One kernel of infinities: the loss is not finite at the first update, the kernel is to blame."""
  from attnlab import train as module

  def make(*args):
    graphdef, init, abstract = make_init(*args)

    def poisoned(seed):
      state = init(seed)
      kernel = state["model"]["params"]["blocks"]["layers"][0]["mixer"]["k_proj"]["kernel"]
      kernel.set_value(kernel.get_value() + jnp.inf)
      return state

    return graphdef, poisoned, abstract

  monkeypatch.setattr(module, "make_init", make)
  monkeypatch.setattr(module, "_programs", module._programs.__wrapped__)  # Not an earlier test's.
  with pytest.raises(NonFiniteError) as error:
    train(load(f"{TINY}:steps=8", ON_MANY), tmp_path / "run")
  assert "update 1: loss nan" in str(error.value)
  assert "Parameter params.blocks.layers.0.mixer.k_proj.kernel was not finite" in str(error.value)
  assert "There is no checkpoint yet" in str(error.value)


# --- one update -----------------------------------------------------------------------------------


def one_update(microbatches, tx, change=lambda state: state, rows=8):
  """The state before and after an update on real text, and what the update reports."""
  config = resolve(load(TINY, {"train.batch_size": rows, "train.grad_accum": microbatches}))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  batch = next(data.make_iterator(config.data, split="train", batch_size=rows, seed=0))
  # Rows of unequal weight: the mean over microbatches is not the mean of their means.
  batch["weights"] *= np.arange(rows * 64).reshape(rows, 64) % 7 < np.arange(rows)[:, None]
  with jax.set_mesh(mesh):
    graphdef, init, abstract = make_init(config, tx, mesh)
    state = change(init())
    before = jax.device_get(state)
    place = placer(mesh, data.tokenizer(config.data).token_bytes(), microbatches)
    after, report = make_update(graphdef, tx, abstract)(state, place(batch))
  return before, jax.device_get(after), jax.device_get(report)


def test_accumulated_gradients_are_the_whole_batchs():
  """Plain SGD: the parameters move by the gradient."""
  _, one, whole = one_update(1, optax.sgd(1.0))
  _, two, split = one_update(2, optax.sgd(1.0))
  for key in ("loss", "nll", "accuracy", "grad_norm", "weights", "bytes"):
    np.testing.assert_allclose(whole[key], split[key], rtol=1e-5)
  # The same sum in another order, in float32.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)


EXPERTS = {
  "model.mlp.experts": 4,
  "model.mlp.expert_hidden": 16,
  "model.mlp.dense_layers": 1,
  "model.num_layers": 3,
  "model.mlp.bias_rate": 0.01,
}


def biases(state):
  return [x[...] for x in jax.tree.leaves(state["model"]["rest"])]


def test_updates_move_the_bias_that_experts_are_chosen_by():
  """By its rate and no other amount, in two microbatches as in one; until experts have about as many tokens each."""
  config = resolve(load(f"{TINY}:pattern=softmax", EXPERTS))
  mesh, tx = sharding.make_mesh(config.mesh, jax.devices()[:1]), optax.sgd(0.0)
  batch = next(data.make_iterator(config.data, split="train", batch_size=4, seed=0))
  token_bytes = data.tokenizer(config.data).token_bytes()
  after, most = {}, []
  with jax.set_mesh(mesh):
    graphdef, init, abstract = make_init(config, tx, mesh)
    update = make_update(graphdef, tx, abstract)
    for microbatches in (1, 2):
      state, _ = update(init(), placer(mesh, token_bytes, microbatches)(batch))
      after[microbatches] = biases(jax.device_get(state))
    still = make_update(graphdef, tx, abstract, constants_step=False)
    kept, _ = still(init(), placer(mesh, token_bytes, 1)(batch))
    for _ in range(40):
      state, report = update(state, placer(mesh, token_bytes, 1)(batch))
      most.append(float(report["expert_load_max"]))
  (bias,) = after[1]
  assert bias.shape == (2, 4)  # of two layers; the first has no experts
  assert set(np.round(np.abs(bias / 0.01), 4).ravel()) <= {0, 1}
  assert (bias.max(axis=1) > 0).all() and (bias.min(axis=1) < 0).all()
  np.testing.assert_array_equal(after[2][0], bias)
  assert not biases(jax.device_get(kept))[0].any()
  assert min(most) < 1 + (most[0] - 1) / 3


def test_a_tasks_logits_are_computed_where_labels_are():
  """The same loss and gradients as from all positions, on eight devices; float32 sums in another order."""
  c = load(
    TINY + ":pattern=linear_attention", ON_MANY | {"data.name": "task", "model.num_layers": 1}
  )
  c.data.task_args = dict(vocab_size=64, num_kv_pairs=5)
  c = resolve(c)
  mesh, tx = sharding.make_mesh(c.mesh), optax.sgd(1.0)
  batch = next(data.make_iterator(c.data, split="train", batch_size=8, seed=0))
  assert batch["labels"].shape == (8, 5)
  out = []
  with jax.set_mesh(mesh):
    graphdef, init, abstract = make_init(c, tx, mesh)
    update = make_update(graphdef, tx, abstract)
    place = placer(mesh, data.tokenizer(c.data).token_bytes(), 1)
    for rows in (batch, {k: v for k, v in batch.items() if k != "labels"}):
      out.append(jax.device_get(update(init(), place(rows))))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *out)


def test_an_update_keeps_its_state_split_and_in_place():
  config = resolve(load(f"{TINY}:steps=8", ON_MANY))
  mesh = sharding.make_mesh(config.mesh)
  tx = optim.optimizer(config.optim, 8)
  with jax.set_mesh(mesh):
    graphdef, _, abstract = make_init(config, tx, mesh)
    batch = next(data.make_iterator(config.data, split="train", batch_size=4, seed=0))
    batch = placer(mesh, data.tokenizer(config.data).token_bytes(), 1)(batch)
    compiled = make_update(graphdef, tx, abstract).lower(abstract, batch).compile()
  arrays = jax.tree.leaves(abstract)
  a_device = sum(4 * int(np.prod(x.sharding.shard_shape(x.shape))) for x in arrays)
  whole = sum(4 * x.size for x in arrays)
  assert a_device < 1.1 * whole / 8  # The rest are norms, which stay whole.
  assert compiled.memory_analysis().alias_size_in_bytes == a_device


def test_an_update_that_is_not_finite_changes_nothing():
  def poison(state):
    table = state["model"]["params"]["embedding"]
    table.set_value(table.get_value() + jnp.nan)
    return state

  before, after, report = one_update(1, optax.sgd(1.0), poison)
  assert not np.isfinite(report["loss"])
  jax.tree.map(np.testing.assert_array_equal, before, after)


# --- evaluation and generation --------------------------------------------------------------------


def test_devices_that_rows_leave_over_share_their_tokens():
  shapes = [dict(reading_mesh(*args).shape) for args in ((), (4,), (4, 64), (1, 48), (1, 10))]
  got = [(shape["data"], shape["context"]) for shape in shapes]
  assert got == [(8, 1), (4, 1), (4, 2), (1, 1), (1, 1)]


def test_evaluate_finds_what_training_found(whole):
  last = [r for r in record(whole[0]) if "eval/nll" in r][-1]
  result = evaluate.evaluate(whole[0], lengths=[1, 2])
  assert result["step"] == STEPS
  # On eight devices and not one: sums in another order.
  for key in ("nll", "accuracy", "bits_per_byte"):
    assert result[key] == pytest.approx(last[f"eval/{key}"], rel=1e-4)
  one, two = (result["by_position"][n] for n in (64, 128))
  assert [(b["from"], b["to"]) for b in one] == [(0, 64)]
  assert [(b["from"], b["to"]) for b in two] == [(0, 64), (64, 128)]
  assert all(0 < b["nll"] < 6 and b["targets"] > 0 for b in one + two)
  assert evaluate.evaluate(whole[0], step=56, batches=1)["step"] == 56
  with pytest.raises(UserError, match="no checkpoint 5"):
    evaluate.evaluate(whole[0], step=5)
  with pytest.raises(UserError, match="holds no run"):
    evaluate.evaluate(whole[0] / "checkpoints")


@pytest.mark.parametrize("batches, targets", [(0, 4001), (1, 2048)], ids=["all", "one batch"])
def test_lengths_are_compared_on_the_same_text(whole, tmp_path, monkeypatch, batches, targets):
  """Every token of the split where --batches=0 asks for all, and otherwise as many as the longest rows need."""
  (tmp_path / "held.txt").write_text("text " * 800)
  config = run_config(whole[0])
  config.data.validation = str(tmp_path / "held.txt")
  monkeypatch.setattr(evaluate, "run_config", lambda workdir: config)
  result = evaluate.evaluate(whole[0], batches=batches, lengths=[1, 4])
  read = {n: sum(b["targets"] for b in rows) for n, rows in result["by_position"].items()}
  assert read == {64: targets, 256: targets}


def test_generation_is_the_training_forward_pass(whole):
  """Greedy decoding, through the caches and beside a longer prompt, against one forward a token."""
  config, mesh = run_config(whole[0]), reading_mesh()
  _, graphdef, model = load_model(whole[0], config, mesh)
  with jax.set_mesh(mesh):
    tokenizer = data.tokenizer(config.data)
    prompts = ["def main(argv):\n  return ", "imp"]
    texts = generate.generate(graphdef, model, tokenizer, prompts, max_tokens=12)
    again = generate.generate(
      graphdef, model, tokenizer, prompts, max_tokens=12, temperature=[0.0, 1.0], seed=3
    )
    assert again[0] == texts[0]
    merged = nnx.merge(graphdef, model["params"], model["rest"])
    forward = jax.jit(merged.forward)
    for prompt, text in zip(prompts, texts, strict=True):
      ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
      row = np.zeros((1, 64), np.int32)  # Causal: what stands after the prompt changes nothing.
      for _ in range(12):
        row[0, : len(ids)] = ids
        ids.append(int(forward(jnp.asarray(row))[0, len(ids) - 1].argmax()))
      assert tokenizer.decode(ids[1:]) == prompt + text


def test_a_task_has_no_beginning_and_no_end():
  """A prompt is read as training reads rows, and 0 is an id like others."""
  config = load(TINY, {"data.name": "task", "model.num_layers": 1, "model.pattern": "softmax"})
  config = resolve(config)
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  with jax.set_mesh(mesh):
    graphdef, init, _ = make_init(config, optax.sgd(1.0), mesh)
    model = init()["model"]
    one = dict(tokenizer=data.tokenizer(config.data), prompts=["3 14 15"], max_tokens=2)
    go = functools.partial(generate.generate, graphdef, **one)
    text = go(model)[0].split()
    logits = nnx.merge(graphdef, model["params"], model["rest"]).forward(jnp.array([[3, 14, 15]]))
    assert len(text) == 2 and text[0] == str(int(logits[0, -1].argmax()))
    nothing = jax.tree.map(jnp.zeros_like, model)  # Ids are all as likely: 0 is the first.
    assert go(nothing) == ["0 0"]
    with pytest.raises(UserError, match="--prompt='3 14 15'"):
      go(model, prompts=["3", ""])


def test_sampling_keeps_to_what_it_may():
  logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]] * 2000))
  draw = lambda *args: generate.sample(jax.random.key(0), logits, *args)  # noqa: E731
  one = jnp.ones(2000)
  frequency = np.bincount(draw(one), minlength=4) / 2000
  np.testing.assert_allclose(frequency, [0.4, 0.3, 0.2, 0.1], atol=0.04)  # 4 sigma
  assert set(np.asarray(draw(0 * one))) == {0}
  assert set(np.asarray(draw(one, 2))) == {0, 1}
  assert set(np.asarray(draw(one, 0, 0.6))) == {0, 1}  # 0.4 does not reach 0.6, 0.7 does
  assert set(np.asarray(draw(one, 0, 0.1))) == {0}
  # A low temperature sharpens: 0.4^2 / (0.4^2 + 0.3^2 + 0.2^2 + 0.1^2) = 0.53
  assert np.mean(np.asarray(draw(one / 2)) == 0) == pytest.approx(0.533, abs=0.04)


def test_generate_from_the_command_line(whole, launch):
  run = launch(whole[0], "--prompt=def ", "--prompt=x", "--max_tokens=4", module="generate")
  out, err = run.communicate()
  assert run.returncode == 0, err
  assert out.startswith("--- 'def '\ndef ") and "--- 'x'\nx" in out
  assert re.search(r"checkpoint 60: prefill \S+ tokens/s, decode \S+ tokens/s in 2 row", err)


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launch_two(launch):
  """Starts a run as two processes."""

  def start(workdir, steps, *args):
    with socket.socket() as s:
      s.bind(("localhost", 0))
      port = s.getsockname()[1]
    return [
      launch(
        workdir,
        f"--config={TINY}:steps={steps}",
        "--distributed",
        *args,
        JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID=str(i),
      )
      for i in range(2)
    ]

  return start


@pytest.mark.slow
def test_two_processes_train_save_stop_and_resume_together(launch_two, tmp_path):
  runs = launch_two(tmp_path / "run", 400)
  wait_for_lines(runs[0], tmp_path / "run", 12)
  runs[1].send_signal(signal.SIGTERM)  # Only one of them: they agree on where to stop.
  outs = [run.communicate() for run in runs]
  assert [run.returncode for run in runs] == [143, 143], outs
  stopped = int(re.search(r"stopped after update (\d+)", outs[0][0])[1])
  assert "step" not in outs[1][0]  # The first process speaks for all.

  runs = launch_two(tmp_path / "run", stopped + 5)
  outs = [run.communicate() for run in runs]
  assert [run.returncode for run in runs] == [0, 0], outs
  assert f"from checkpoint {stopped}" in outs[0][0]
  steps = [r["step"] for r in record(tmp_path / "run") if "loss" in r]
  assert steps == list(range(1, stopped + 6))


@pytest.mark.slow
def test_two_processes_that_share_rows_train_as_one(launch, launch_two, whole, tmp_path):
  """They have halves of the heads, and the same rows: those of one process, which may go on with the run."""
  heads = ("--config.mesh.data=1", "--config.mesh.model=2")
  runs = launch_two(tmp_path / "run", 8, *heads)
  outs = [run.communicate() for run in runs]
  assert [run.returncode for run in runs] == [0, 0], outs
  # Sums in another order, grown over eight updates of AdamW.
  np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole[0])[:8], rtol=2e-3)
  assert losses(tmp_path / "run")[0] == pytest.approx(losses(whole[0])[0], rel=1e-5)

  runs = launch_two(tmp_path / "run", 12)
  outs = [run.communicate() for run in runs]
  assert [run.returncode for run in runs] == [2, 2], outs
  assert all("of 1 process(es) with rows of their own, not of 2: " in err for _, err in outs), outs

  run = launch(tmp_path / "run", f"--config={TINY}:steps=12")
  out, err = run.communicate()
  assert run.returncode == 0 and "from checkpoint 8" in out, err
  np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole[0])[:12], rtol=2e-3)
