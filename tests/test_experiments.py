"""The harness of experiments: which runs there are, that they are run once, and what is told of them."""

import csv
import dataclasses
import importlib
import itertools
import json
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import experiments
from attnlab import accounting, data, metrics, optim, sharding
from attnlab.config import check, resolve
from attnlab.errors import UserError
from attnlab.evaluate import make_evaluate
from attnlab.state import make_init
from attnlab.tasks.arithmetic import Parity
from configs.base import base
from experiments import harness, report, worker
from experiments.cells import Cell, Experiment, Prediction, Test
from experiments.harness import Plan, Results, accelerators, choose, devices, run_all, select

RESULTS = Path(experiments.__path__[0]) / "results"


def tiny(task="parity", rates=(1e-2,)):
  c = base()
  c.model.pattern, c.model.num_layers, c.model.d_model = "linear_attention(num_heads=2)", 1, 16
  c.model.mlp.hidden = 0
  c.data.update(dict(name="task", task="parity", seq_len=8))
  c.data.task_args = dict(everywhere=True)
  c.optim.warmup_steps = 1
  c.train.update(dict(steps=4, batch_size=8, eval_batches=1, checkpoint_every=2))
  tests = (
    Test({"length": 8}, {}, 0.5, 97.0),
    Test({"length": 16}, dict(seq_len=16, task_args=dict(min_length=9)), 0.5),
  )
  return Cell({"task": task, "mixer": "linear_attention"}, c, rates, tests)


def experiment(cells, *predictions):
  plot = {"x": "length", "line": "mixer", "facet": "task"}
  about = "What is asked.\n\nHow, <exactly>."
  return Experiment(
    "tiny", "A & B", about, "a paper", lambda size: cells, plot, lambda size: predictions
  )


def result(accuracy, nll=1.0, tests=(0.5, 0.75)):
  facts = dict(steps=4, seconds=1.5, parameters=9, devices="1 x cpu", tokens_per_second=1)
  facts["commit"] = "abc"
  return dict(accuracy=accuracy, nll=nll, tests=list(tests), **facts)


# Which runs.


def test_learning_rates_first_then_seeds_of_the_best():
  results = {}
  plan = Plan([tiny(rates=(1e-3, 1e-2, 1e-1))], 3, results)
  first = plan.needed(0)
  assert [r.config.optim.learning_rate for r in first] == [1e-3, 1e-2, 1e-1]
  assert [r.config.seed for r in first] == [0, 0, 0] and len(plan.left(0)) == 5
  results[first[0].key] = result(0.9, 2.0)
  results[first[1].key] = result(0.9, 1.0)  # as accurate, with a lower loss
  assert plan.rate(0) is None and plan.needed(0) == first[2:]
  results[first[2].key] = {"not_finite": "update 3"}
  assert plan.rate(0) == 1e-2
  later = plan.needed(0)
  assert [(r.config.optim.learning_rate, r.config.seed) for r in later] == [(1e-2, 1), (1e-2, 2)]
  results |= {r.key: result(0.5) for r in later}
  assert plan.needed(0) == plan.left(0) == []


def test_bits_choose_a_rate_where_bits_are_told():
  """Not the accuracy of the next byte."""
  results = {}
  cell = dataclasses.replace(tiny(rates=(1e-3, 1e-2)), tests=(Test({}, {}, measure="late bits"),))
  plan = Plan([cell], 1, results)
  for run, (accuracy, nll) in zip(plan.needed(0), ((0.9, 2.0), (0.8, 1.0)), strict=True):
    results[run.key] = result(accuracy, nll)
  assert plan.rate(0) == 1e-2


def test_a_process_goes_on_with_the_model_that_it_has_compiled():
  """What it has not compiled another should not be compiling, and what is left is left to nobody."""
  cells = [tiny("a", rates=(1e-2, 1e-3)), tiny("b")]
  cells[1].config.model.d_model = 32
  plan = Plan(cells, 1, {})
  first, second, other = (*plan.sweep(0), *plan.sweep(1))
  assert choose([first, second, other], None, []) is first
  assert choose([second, other], None, [first.model]) is other
  assert choose([second, other], first.model, [other.model]) is second
  assert choose([second, other], other.model, []) is other
  assert choose([second], None, [first.model]) is second
  assert choose([], first.model, []) is None


def test_a_key_is_of_all_that_determines_the_result():
  def key(cell, seed=0):
    return Plan([cell], 1, {}).run(0, 1e-2, seed).key

  same = tiny(task="another name")
  assert key(tiny()) == key(same) != key(tiny(), seed=1)
  fewer = dataclasses.replace(tiny(), tests=tiny().tests[:1])
  longer = tiny()
  longer.config.train.steps = 5
  elsewhere = tiny()
  elsewhere.config.mesh.update(dict(data=2, context=2))
  assert key(elsewhere) == key(tiny())
  assert len({key(tiny()), key(fewer), key(longer)}) == 3


def test_a_setting_that_comes_to_be_changes_no_key(monkeypatch):
  run = Plan([tiny()], 1, {}).run(0, 1e-2, 0)
  usual, spec = harness._defaults(), run.spec
  monkeypatch.setattr(harness, "_defaults", lambda: usual | {"model.later": 1})
  for later, same in ((1, True), (2, False)):
    config = spec["config"] | {"model": spec["config"]["model"] | {"later": later}}
    monkeypatch.setattr(harness.Run, "spec", spec | {"config": config})
    assert (Plan([tiny()], 1, {}).run(0, 1e-2, 0).key == run.key) == same


@pytest.mark.parametrize("name", sorted(p.parent.name for p in RESULTS.glob("*/runs.jsonl")))
def test_results_are_of_what_would_be_run(name):
  """With --out at a report that is kept here, what it tells is not run again. (Text is the sources of one Python.)"""
  every = importlib.import_module(f"experiments.{name}").EXPERIMENT.cells("cpu")
  cells = [cell for cell in every if cell.config.data.name == "task"]
  told = harness.read_runs(RESULTS / name / harness.RUNS)
  plan = Plan(cells, 3, {key: line["result"] for key, line in told.items()})
  assert not [run for cell in range(len(cells)) for run in plan.needed(cell)]


def test_a_task_that_means_something_else_is_run_again(monkeypatch):
  before = Plan([tiny()], 1, {}).run(0, 1e-2, 0).key
  example = Parity.example
  monkeypatch.setattr(
    Parity, "example", lambda *a: (e := example(*a))._replace(targets=1 - e.targets)
  )
  harness._records.cache_clear()
  try:
    assert Plan([tiny()], 1, {}).run(0, 1e-2, 0).key != before
  finally:
    harness._records.cache_clear()


def test_only():
  cells = [tiny(task) for task in ("a", "b", "c")]
  assert [c.axes["task"] for c in select(cells, ["task=a|c", "mixer=linear_attention"])] == [
    "a",
    "c",
  ]
  assert select(cells, []) == cells
  with pytest.raises(UserError, match="unknown axis .* 'tsk': did you mean 'task'"):
    select(cells, ["tsk=a"])
  with pytest.raises(UserError, match="unknown value of task .* known: a, b, c"):
    select(cells, ["task=z"])


def test_devices(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert accelerators() == []
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
  assert accelerators() == ["2", "5"] == devices() and devices(["5"]) == ["5"]
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
  monkeypatch.delenv("TPU_VISIBLE_CHIPS", raising=False)
  monkeypatch.setattr(harness, "DEV", tmp_path)
  assert accelerators() == [] and all(d.startswith("core ") for d in devices())
  (tmp_path / "vfio").mkdir()
  for name in ("vfio", "12", "7"):
    (tmp_path / "vfio" / name).touch()
  assert accelerators() == ["0", "1"]
  with pytest.raises(UserError, match="unknown device in --devices"):
    devices(["3"])


FILES = {m.name for m in pkgutil.iter_modules(experiments.__path__) if not m.ispkg}
NAMES = sorted(
  n for n in FILES if hasattr(importlib.import_module(f"experiments.{n}"), "EXPERIMENT")
)


# Many models, made for their sizes alone.
MANY = ("equal_bytes", "head_to_head", "hybrid_ratio", "zoology_mqar")


@pytest.mark.parametrize(
  "name, size",
  [
    pytest.param(n, s, marks=[pytest.mark.slow] if n in MANY and s != "cpu" else [])
    for n in NAMES
    for s in harness.SIZES
  ],
)
def test_cells_can_be_run(name, size):
  e = importlib.import_module(f"experiments.{name}").EXPERIMENT
  assert e.name == name
  plan = Plan(e.cells(size), 3, {})
  for i, cell in enumerate(plan.cells):
    check(plan.run(i, cell.learning_rates[0], 0).config)
    for test in cell.tests:
      axes = {**cell.axes, **test.axes}.keys()
      assert {e.plot["line"], e.plot["facet"]} <= axes
      assert e.plot["x"] in axes or i or cell.facts()[e.plot["x"]] > 0
  axes = [tuple({**c.axes, **t.axes}.items()) for c in plan.cells for t in c.tests]
  assert len(set(axes)) == len(axes)


but_for_many = pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.slow] if n in MANY else []) for n in NAMES]
)


@but_for_many
def test_an_accelerators_size_is_an_hours_work(name):
  """At a hundred updates a second, three seeds of each cell. (The grid of head_to_head takes three times as long.)"""
  cells = importlib.import_module(f"experiments.{name}").EXPERIMENT.cells("gpu")
  updates = sum(c.config.train.steps * (len(c.learning_rates) + 2) for c in cells)
  assert updates <= 360_000 * (3 if name == "head_to_head" else 1)


@but_for_many
def test_predictions_name_figures_that_there_are(name):
  """With all at 90 %, each holds or not, at one size at least."""
  e = importlib.import_module(f"experiments.{name}").EXPERIMENT
  words = {size: words_of(e, size) for size in harness.SIZES}
  for i, prediction in enumerate(e.predictions("cpu")):
    assert any(w[i] != "not known yet" for w in words.values()), prediction.text


def words_of(e, size):
  cells = e.cells(size)
  table = [report.Row({**c.axes, **t.axes}, (90.0,), None, {}) for c in cells for t in c.tests]
  assert all(word == "not known yet" for _, word in report._predictions(e, [], size))
  return [word for _, word in report._predictions(e, table, size)]


# Running.


@pytest.fixture
def alone(monkeypatch, one_device):
  """Workers have one device each, as where there are cores alone."""
  for name, value in one_device.items():
    monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("alone")
def test_runs_once_and_tells(tmp_path, monkeypatch):
  """Two seeds of one cell, one after the other in one process; again, nothing is run."""
  cell = tiny()
  broken = dataclasses.replace(tiny("broken"), tests=(Test({"length": 8}, dict(seq_len=2)),))
  plan = Plan([cell, broken], 2, results := Results(tmp_path / "runs"))
  failed = run_all(plan, results, devices()[:1])
  assert [run.axes["task"] for run in failed] == ["broken"]  # parity has no words of two bits
  assert len(results) == 2 and not plan.needed(0)
  for run in plan.seeds(0):
    assert len(results[run.key]["tests"]) == 2 and results[run.key]["steps"] == 4
    assert results[run.key]["commit"] == worker.commit()

  again = Results(tmp_path / "runs")
  assert again == results
  monkeypatch.setattr(harness, "_Worker", lambda *_: pytest.fail("run again"))
  assert run_all(Plan([cell], 2, again), again, [""]) == []


@pytest.mark.usefixtures("alone")
def test_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
  """Stopped after a checkpoint, a run has the losses of one that was not."""
  cell = tiny()
  cell.config.train.update(dict(steps=200, eval_every=0, checkpoint_every=50, log_every=10))
  plan = Plan([cell], 1, results := Results(tmp_path / "runs"))
  where = tmp_path / "runs" / plan.run(0, 1e-2, 0).key

  def interrupt(seconds):
    time_sleep(seconds / 10)
    if any(p.name.isdigit() for p in (where / "checkpoints").glob("*")):
      raise KeyboardInterrupt

  time_sleep = harness.time.sleep
  with monkeypatch.context() as patched:
    patched.setattr(harness.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
      run_all(plan, results, devices()[:1])
  assert not results and not (where / "result.json").exists()
  assert run_all(plan, results, devices()[:1]) == []
  text = (where / "log.txt").read_text()
  assert "SIGTERM: stopped after update" in text and "from checkpoint" in text

  whole = Results(
    tmp_path / "whole"
  )  # by another process of the same kind: sums of as many threads
  assert run_all(Plan([cell], 1, whole), whole, devices()[:1]) == []
  losses = [
    [(r["step"], r["loss"]) for r in metrics.read(d / "metrics.jsonl") if "loss" in r]
    for d in (where, whole.directory / where.name)
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 20


# Telling.


@pytest.fixture
def told(tmp_path):
  """A report of one cell with two seeds and one that has not been run."""
  cells, results = [tiny("a"), tiny("<b>")], {}
  cells[1].config.train.steps = 5
  plan = Plan(cells, 2, results)
  for run, accuracies in zip(
    [plan.run(0, 1e-2, s) for s in (0, 1)], ((1.0, 0.5), (0.9, 0.6)), strict=True
  ):
    results[run.key] = result(0.9, tests=accuracies)
  predictions = (
    Prediction("a is good", lambda value: value(task="a", length=8) > 50),
    Prediction("a is good at 16", lambda value: value(task="a", length=16) > 50),
    Prediction("b", lambda value: value(task="<b>", length=8) > 50),
  )
  report.write(
    experiment(cells, *predictions), plan, results, tmp_path, command="python -m x", size="cpu"
  )
  return tmp_path


def test_table(told):
  """Chance is 0: 0.5 of 0.5 to 1 is nothing, 0.9 is 80 %. Missing cells are "-"."""
  lines = list(csv.DictReader((told / "table.csv").open()))
  assert [(x["task"], x["length"], x["ours, %"], x["spread"], x["seeds"]) for x in lines] == [
    ("a", "8", "90.0", "14.1", "2"),
    ("a", "16", "10.0", "14.1", "2"),
    ("<b>", "8", "-", "-", "0"),
    ("<b>", "16", "-", "-", "0"),
  ]
  assert [x["published, %"] for x in lines] == ["97", "-", "97", "-"]
  assert int(lines[0]["state bytes"]) > 0 and lines[0]["learning rate"] == "0.01"
  text = (told / "table.md").read_text()
  assert "# A & B" in text and "`python -m x`" in text and "Figures: 2 of 4" in text
  assert "- a is good **held**" in text and "- b **not known yet**" in text
  tables = [line for line in text.splitlines() if line.startswith("|")]
  assert len(tables) == 2 + 2 + 2 + 4  # headings and figures of both
  assert lines[0]["tokens a second"] == "1" and lines[0]["commit"] == "abc"
  assert [c.strip() for c in tables[0].split("|")[1:-1]] == [
    "task",
    "mixer",
    "length 8",
    "length 16",
  ]
  first = [c.strip() for c in tables[2].split("|")[1:-1]]
  assert first == ["a", "linear_attention", "90.0 ± 14.1", "10.0 ± 14.1"]


def test_another_machine_goes_on_from_a_report(told, tmp_path):
  """Runs that it tells of are finished there; those of other cells stay in it; what is no result is an error."""
  known = harness.Results(tmp_path / "elsewhere", told / harness.RUNS)
  cells = [tiny("a"), tiny("b")]
  cells[1].config.train.steps = 5
  plan = Plan(cells, 2, known)
  assert not plan.needed(0) and len(plan.needed(1)) == 1 and plan.runs(0) == plan.seeds(0)
  assert [known[run.key]["tests"] for run in plan.runs(0)] == [[1.0, 0.5], [0.9, 0.6]]
  before = (told / harness.RUNS).read_text()
  assert "task a, mixer linear_attention, learning rate 0.01, seed 1" in before

  other = Plan(cells[1:], 1, known)
  known[other.run(0, 1e-2, 0).key] = result(0.5, tests=(0.5, 0.5))
  report.write(experiment(cells[1:]), other, known, told, command="", size="cpu")
  after = (told / harness.RUNS).read_text()
  assert after.startswith(before) and after.count("\n") == 3
  (told / harness.RUNS).write_text(after + '{"key": 3}\n')
  with pytest.raises(UserError, match="runs.jsonl, line 4, tells no run's result: '{\"key\": 3}'"):
    harness.Results(tmp_path, told / harness.RUNS)


def test_runs_that_are_not_finite_are_told():
  """They count as guesses, of which the table says what they were."""
  results = {}
  plan = Plan([tiny()], 2, results)
  one, two = (plan.run(0, 1e-2, s).key for s in (0, 1))
  results[one] = {"not_finite": "update 3"}
  (first, _) = report.rows(plan, results)
  assert (first.mean, first.facts["not finite"]) == (0.0, 1)
  assert report._summary(experiment([]), [first])[1][2] == "not finite"
  results[two] = result(0.9, tests=(0.9, 0.6))
  (first, _) = report.rows(plan, results)
  assert report._summary(experiment([]), [first])[1][2] == "40.0 ± 56.6"


def test_page_needs_nothing_else(told):
  page = (told / "report.html").read_text()
  assert "<h1>A &amp; B</h1>" in page and "How, &lt;exactly&gt;." in page and "&lt;b&gt;" in page
  for word in ("a is good <b", "held</b>", "did not hold</b>", "not known yet</b>", "<svg"):
    assert word in page
  loads = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')> ]+)", page)
  assert all(link.startswith("#") for link in loads), loads
  assert (told / "plot.png").read_bytes()[:4] == b"\x89PNG"
  assert "<svg" in (told / "plot.svg").read_text()


BROWSER = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def test_a_picture_of_the_same_is_the_same(told):
  before = {name: (told / name).read_bytes() for name in ("plot.svg", "plot.png")}
  e, known = experiment([tiny("a"), tiny("<b>")]), harness.Results(told, told / harness.RUNS)
  e.cells("cpu")[1].config.train.steps = 5
  report.write(e, Plan(e.cells("cpu"), 2, known), known, told, command="python -m x", size="cpu")
  assert before == {name: (told / name).read_bytes() for name in before}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_page_sorts_in_a_browser(told):
  page = told / "report.html"
  click = "<script>document.querySelectorAll('table')[1].querySelectorAll('th button')[1].click()</script></body>"
  page.write_text(page.read_text().replace("</body>", click))
  run = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
  dom = subprocess.run(run, capture_output=True, text=True, timeout=120).stdout
  body = dom[dom.rindex("<tbody>") :]
  lengths = [row.split("<td")[2] for row in body.split("<tr>")[1:]]
  assert [re.search(r">(\d+)<", cell)[1] for cell in lengths] == ["8", "8", "16", "16"]


def test_a_run_is_run_by_one_process(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(worker.cli, "cache_compilations", lambda: None)
  with worker._alone(tmp_path):
    assert worker.main(["", str(tmp_path)]) == 2
  assert "is being run by another process" in capfd.readouterr().err


def test_worker_tells_of_a_loss_that_is_not_finite(tmp_path, monkeypatch):
  from attnlab.checkpoint import NonFiniteError

  def train(config, directory, plot):
    raise NonFiniteError("update 3")

  monkeypatch.setattr(worker, "train", train)
  (tmp_path / "run.json").write_text(json.dumps(Plan([tiny()], 1, {}).sweep(0)[0].spec))
  told = worker.run(tmp_path)
  assert told.pop("wall_seconds") >= 0
  assert told == {"not_finite": "update 3", "commit": worker.commit()}


def test_a_row_is_right_if_all_its_targets_are():
  """Against the logits of whole rows, of a model that has learnt nothing."""
  config = tiny().config
  config.data.task_args = dict(everywhere=True, min_length=3, max_length=3)
  config.train.eval_batches = 4
  config = resolve(config)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    graphdef, init, _ = make_init(config, optim.optimizer(config.optim, 4), mesh)
    arrays = init()["model"]
    got = make_evaluate(config, mesh)(graphdef, arrays)
    model = nnx.merge(graphdef, arrays["params"], arrays["rest"])
    batches = data.make_iterator(config.data, split="validation", batch_size=8, seed=0)
    right = []
    for batch in itertools.islice(batches, 4):
      ids = np.asarray(model.forward(batch["inputs"])).argmax(-1)
      right += list(((ids == batch["targets"]) | (batch["weights"] == 0)).all(1))
  assert 0 < sum(right) < len(right) == 32
  assert got["row_accuracy"] == sum(right) / 32 <= got["accuracy"]


def test_models_of_head_to_head_have_as_many_parameters():
  """Within 3 %, on text, whatever the mixer."""
  from experiments import head_to_head as h

  counts = {
    cell.axes["model"]: accounting.parameters(resolve(cell.config).model)
    for cell in h.cells("cpu")
    if cell.axes["task"] == "text"
  }
  for name, count in counts.items():
    assert abs(count / counts["softmax"] - 1) < 0.03, (name, counts)


def test_windows_of_equal_cost():
  """The next wider window costs more than the linear model; this one does not."""
  from experiments.equal_bytes import equal_window

  def model(pattern):
    c = base()
    c.model.pattern = pattern
    return resolve(c).model

  linear = model("deltanet(num_heads=2, head_dim=32, conv_size=0)")
  windowed = lambda w: model(f"swa(num_heads=2, head_dim=32, window={w})")  # noqa: E731
  # 32 x 32 values a head in a state; 2 x 32 of a token in a window, and its document's number a layer.
  assert equal_window(linear, windowed) == 2 * 32 * 32 // (2 * 2 * 32 + 1)
  w = equal_window(linear, windowed, "FLOPs")
  flops = [accounting.costs(windowed(n), 1 << 20).train_flops for n in (w, w + 1)]
  assert flops[0] <= accounting.costs(linear, 1 << 20).train_flops < flops[1]


def test_text_that_chooses_is_not_text_that_reports():
  """The halves of the validation records have none in common, and are all of them."""
  halves = []
  for half in (1, 2, 0):
    c = data.data_config()
    c.update(dict(seq_len=64, validation_half=half, shuffle_tokens=0))
    batches = data.make_iterator(c, split="validation", batch_size=64, seed=0)
    halves.append({int(i) for b in batches for i in b["index"].flat} - {-1})
  assert not halves[0] & halves[1] and abs(len(halves[0]) - len(halves[1])) <= 1
  assert halves[0] | halves[1] == halves[2]
  from experiments.head_to_head import cells

  text = next(c for c in cells("cpu") if c.axes["task"] == "text").config.data
  assert {"validation_half": text.validation_half} != worker.TEST_DATA["text"]


def test_a_test_may_see_less_than_training(tmp_path):
  """Of a layer that saw everything in training: it is tested with fewer tokens chosen."""
  dsa = "dsa(num_heads=2, kv_lora_rank=8, nope_dim=8, rope_dim=0, value_dim=8, index_heads=2, index_dim=8"
  whole, few = (f"{dsa}, index_rope_dim=0, top_k={k})" for k in (8, 2))
  c = tiny().config
  c.model.pattern = whole
  found = [Test(measure="indexer recall", pattern=p) for p in (None, whole, few)]
  directory = tmp_path / "run"
  directory.mkdir()
  given = {"config": resolve(c).to_dict(), "tests": [t.spec for t in found]}
  (directory / "run.json").write_text(json.dumps(given))
  assert worker.one(directory) == 0
  all_of_it, same, some = json.loads((directory / "result.json").read_text())["tests"]
  assert all_of_it == same == 1 > some > 0


def test_seeds_and_rates_share_programs():
  from attnlab.train import _Like

  def like(**keys):
    c = resolve(tiny().config)
    with c.unlocked():
      c.update_from_flattened_dict(keys)
    return _Like(c, sharding.make_mesh(c.mesh))

  same = {"seed": 3, "optim.learning_rate": 0.5, "data.validation_seed": 7}
  assert like() == like(**same) and hash(like()) == hash(like(**same))
  assert like() != like(**{"train.steps": 5}) and like() != like(**{"model.d_model": 32})


def test_every_parameter_can_be_saved():
  """Mamba-3 without rotation has no projection to angles: orbax refuses arrays of no size."""
  from experiments.mamba3_table import SIZES, mechanisms

  for pattern in mechanisms(SIZES["cpu"], SIZES["cpu"].tasks[0]).values():
    c = tiny().config
    c.model.pattern = pattern
    c = resolve(c)
    mesh = sharding.make_mesh(c.mesh)
    with jax.set_mesh(mesh):
      _, _, abstract = make_init(c, optim.optimizer(c.optim, 4), mesh)
    assert all(x.size for x in jax.tree.leaves(abstract["model"])), pattern


def test_what_decay_granularity_takes_away_is_gone():
  """Without its output gate a mixer has no projection for it; a mixer whose output is the gate's refuses."""
  from experiments.decay_granularity import SIZES, pattern

  def names(pattern):
    c = tiny().config
    c.model.pattern = pattern
    c = resolve(c)
    mesh = sharding.make_mesh(c.mesh)
    with jax.set_mesh(mesh):
      _, _, abstract = make_init(c, optim.optimizer(c.optim, 4), mesh)
    flat = jax.tree_util.tree_leaves_with_path(abstract["model"]["params"])
    return {jax.tree_util.keystr(path) for path, _ in flat}

  s = SIZES["cpu"]
  for mixer in ("gated_deltanet", "kda"):
    gone = names(pattern(s, mixer, "convolution")) - names(pattern(s, mixer, "no output gate"))
    assert gone and all("gate_proj" in name for name in gone)
    assert names(pattern(s, mixer, "convolution")) == names(pattern(s, mixer, "no norm of q and k"))
  with pytest.raises(UserError, match="output_gate"):
    names("mamba2(num_heads=2, head_dim=8, output_gate=False)")
