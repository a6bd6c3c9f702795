"""Configs: what is wrong with one is named, by key, before anything else happens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest

from attnlab import cli, sharding
from attnlab import config as configs
from attnlab.errors import UserError
from attnlab.mixers import configure, mixers
from attnlab.state import make_init
from configs.base import RECIPES, SIZES, base, recipe, size

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny_config.py")


def write(path: Path, body: str) -> str:
  lines = ["from configs.base import base", "def get_config():", "  c = base()", f"  {body}"]
  path.write_text("\n".join([*lines, "  return c"]))
  return str(path)


def test_base_is_complete_and_works():
  config = configs.resolve(base())
  configs.check(config)
  assert config.model.vocab_size == 320  # the byte tokenizer's
  assert sorted(config.model.mixers) == ["kda", "softmax"]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_overrides_of_known_keys(name):
  config = base()
  config.lock()
  config.update(size(name))
  configs.check(configs.complete(config))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_overrides_of_known_keys(name):
  config = base()
  config.lock()
  config.update(recipe(name))
  configs.check(configs.complete(config))


def test_unknown_size_names_the_near_one():
  with pytest.raises(UserError, match="'smal'.*'small'"):
    size("smal")


def test_every_mixer_setting_is_a_key():
  config = configs.load(TINY, {"model.mixers.gated_deltanet.num_heads": 4})
  assert config.model.mixers.gated_deltanet.num_heads == 4  # None by default, an int by its type
  assert config.model.mixers.kda.head_dim == 16
  assert config.model.mixers.kda.conv_size == 4


def test_resolving_twice_changes_nothing_and_json_keeps_all():
  config = configs.resolve(configs.load(TINY))
  values = configs.to_json(config)
  assert configs.to_json(configs.resolve(config)) == values
  again = configs.resolve(configs.from_json(values))
  configs.check(again)
  assert configs.to_json(again) == values


@pytest.mark.parametrize("name", mixers())
def test_json_keeps_the_settings_of_every_mixer(name):
  """What evaluation and generation build the model from: the same settings, of types that have a hash."""
  config = configs.load(TINY, {"model.pattern": name})
  again = configs.from_json(json.loads(json.dumps(configs.to_json(configs.resolve(config)))))
  one, two = (configure(mixers()[name], dict(c.model.mixers[name])) for c in (config, again))
  assert one == two and hash(one) == hash(two)


@pytest.mark.parametrize(
  "body, names",
  [
    ("c.train.stepz = 5", ["config.train key 'stepz'", "did you mean 'steps'"]),
    ("c.trian = {}", ["trian", "did you mean 'train'"]),
    ("c.model.mixers.kdaa = {}", ["kdaa", "did you mean 'kda'"]),
    ("c.model.mixers.kda = dict(head_dmi=1)", ["model.mixers.kda key 'head_dmi'", "'head_dim'"]),
    ("c.model.mixers.kda = dict(conv_size='x')", ["model.mixers.kda.conv_size", "int"]),
    ("del c.train.steps", ["train.steps", "missing"]),
    ("c = 5", ["returned int"]),
  ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, body, names):
  with pytest.raises(UserError) as error:
    configs.load(write(tmp_path / "mine.py", body))
  for name in names:
    assert name in str(error.value)


@pytest.mark.parametrize(
  "overrides, names",
  [
    ({"train.stpes": 5}, ["config.train key 'stpes'", "did you mean 'steps'"]),
    ({"learning_rate": 1.0}, ["did you mean 'optim.learning_rate'"]),
    ({"model.mixers.kda.num_head": 1}, ["model.mixers.kda key", "num_heads"]),
    ({"train.steps": "many"}, ["train.steps", "many"]),
  ],
)
def test_wrong_overrides_are_named(overrides, names):
  with pytest.raises(UserError) as error:
    configs.load(TINY, overrides)
  for name in names:
    assert name in str(error.value)


def test_a_missing_file_names_its_neighbours():
  with pytest.raises(UserError, match="did you mean 'configs/kda.py'"):
    configs.load("configs/kad.py")


@pytest.mark.parametrize(
  "overrides, devices, names",
  [
    ({"model.pattern": "3*kdaa"}, 1, ["'kdaa'", "'kda'"]),
    ({"model.vocab_size": 100}, 1, ["model.vocab_size", "100", "259"]),
    ({"train.batch_size": 6}, 4, ["train.batch_size = 6", "mesh.data 4"]),
    ({"train.grad_accum": 3}, 1, ["train.batch_size = 4", "train.grad_accum 3"]),
    ({"mesh.model": 3}, 8, ["model=3", "8 devices"]),
    ({"mesh.data": 2}, 8, ["data=2", "8 devices"]),
    ({"mesh.replica": -1}, 8, ["replica", "data", "-1"]),
    ({"mesh.context": 3}, 3, ["data.seq_len = ", "mesh.context = 3"]),
    ({"mesh.data": 0}, 1, ["mesh.data = 0"]),
    ({"train.steps": 0}, 1, ["train.steps"]),
    ({"train.sample_prompts": (1,)}, 1, ["sample_prompts"]),
    ({"model.mlp.hidden": 0, "model.mlp.experts": 4}, 1, ["mlp.hidden = 0", "mlp.experts = 4"]),
    ({"optim.name": "adm"}, 1, ["optim.name", "'adm'"]),
    ({"data.name": "txt"}, 1, ["data.name", "'text'"]),
    ({"data.tokenizer": "/no/such.json"}, 1, ["data.tokenizer", "/no/such.json"]),
  ],
)
def test_what_cannot_work_is_named(overrides, devices, names):
  with pytest.raises(UserError) as error:
    configs.check(configs.resolve(configs.load(TINY, overrides)), devices=devices)
  for name in names:
    assert name in str(error.value)


@pytest.mark.parametrize(
  "pattern, words",
  [
    ("softmax(rope_fraction=zero)", "rope_fraction='zero' must be of type float"),
    ("softmax(rope_fraction=1.5)", "rope_fraction=1.5 must be at least 0 and at most 1"),
    ("softmax(num_heads=2.5)", "num_heads=2.5 must be of type int"),
    ("softmax(num_heads=True)", "num_heads=True must be of type int"),
    ("softmax(head_dim=0)", "head_dim=0 must be at least 1"),
    ("softmax(head_dim=None)", "head_dim=None must be of type int"),
    ("softmax(output_gate=elements)", "output_gate='elements' must be one of none, element, head"),
    ("softmax(heads=2)", "no setting 'heads': did you mean 'num_heads'?"),
    ("kda(conv_size=-1)", "conv_size=-1 must be at least 0"),
    ("kda(negative_eigenvalues=yes)", "negative_eigenvalues='yes' must be True or False"),
    ("kda(lower_bound=5.0)", "lower_bound=5.0 must be below 0"),
    ("gla(gate_normalizer=0)", "gate_normalizer=0 must be above 0"),
    ("retnet(rope_theta=1e999)", "rope_theta=inf must be above 0 and below inf"),
    ("mamba2(dt_limit=0.1)", "dt_limit=0.1 must be of type tuple"),
    ("mamba2(dt_limit=(0.1,))", "dt_limit=(0.1,) must be 2 values"),
    ("mamba2(dt_limit=(-1.0, 2.0))", "dt_limit=(-1.0, 2.0) must be at least 0"),
    ("nsa(block_size=0)", "block_size=0 must be at least 1"),
    ("swa(window=0)", "window=0 must be at least 1"),
    ("bigbird(local=0)", "local=0 must be at least 1"),
    ("softmax | kda(conv_size=-1)", "conv_size=-1"),
    ("0*kda + softmax", "0*kda is no layer"),
    ("kda(conv_size=4, conv_size=2)", "conv_size is set twice"),
  ],
)
def test_a_layer_of_bad_settings_is_named(pattern, words):
  """Before anything is built, whatever is wrong with them."""
  with pytest.raises(UserError, match=re.escape(words)):
    configs.check(configs.resolve(configs.load(TINY, {"model.pattern": pattern})))


@pytest.mark.parametrize(
  "key, value, words",
  [
    ("model.dtype", "floaty", "unknown config.model.dtype 'floaty'"),
    ("model.dtype", "int32", "known: bfloat16, float32"),
    ("model.remat", "some", "known: dots, full, none"),
    ("model.mlp.hidden", -4, "config.model.mlp.hidden = -4 must be at least 0"),
    ("model.mlp.experts", -1, "config.model.mlp.experts = -1"),
    ("model.norm_eps", 0.0, "config.model.norm_eps = 0.0 must be above 0"),
    ("model.z_loss", float("nan"), "config.model.z_loss = nan"),
    ("model.mixers.kda.conv_size", -1, "config.model.mixers.kda.conv_size = -1 must be at least 0"),
    ("optim.b1", 1.0, "config.optim.b1 = 1.0 must be at least 0 and below 1"),
    ("optim.learning_rate", 0.0, "config.optim.learning_rate = 0.0 must be above 0"),
    ("train.stop_accuracy", 2.0, "config.train.stop_accuracy = 2.0"),
  ],
)
def test_numbers_out_of_range_are_named(key, value, words):
  with pytest.raises(UserError, match=re.escape(words)):
    configs.check(configs.resolve(configs.load(TINY, {key: value})))


@pytest.mark.parametrize("setting, value", [("num_heads", 2.5), ("negative_eigenvalues", "yes")])
def test_settings_in_a_file_are_checked_as_those_in_a_pattern(tmp_path, setting, value):
  body = f"c.model.mixers.kda = dict({setting}={value!r})"
  with pytest.raises(UserError, match=f"config.model.mixers.kda.{setting} = {value!r} must be"):
    configs.load(write(tmp_path / "mine.py", body))


def on_a_mesh(pattern: str, model: int):
  """The shapes of a run whose heads are split over so many devices."""
  overrides = {"model.pattern": pattern, "model.num_layers": 2, "mesh.model": model}
  config = configs.resolve(configs.load(TINY, overrides))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:model])
  with jax.set_mesh(mesh):
    return make_init(config, optax.identity(), mesh)


@pytest.mark.parametrize(
  "pattern, words",
  [
    ("softmax", "num_heads = 2 of mixer 'softmax'"),  # 32 channels in heads of 16
    ("softmax(num_heads=4) + softmax(num_heads=6)", "num_heads = 6"),
    ("softmax(num_heads=4) | swa(num_heads=2)", "num_heads = 2 of mixer 'swa'"),
    ("retnet(num_heads=2)", "num_heads = 2 of mixer 'retnet'"),
    ("gdn(num_heads=2, num_value_heads=6)", "num_value_heads = 6 of mixer 'gated_deltanet'"),
    ("mamba2(head_dim=32)", "num_heads = 2 of mixer 'mamba2'"),
    ("mla(num_heads=6)", "num_heads = 6 of mixer 'mla'"),
    ("moba(num_heads=4, num_kv_heads=2, head_dim=8)", "num_kv_heads = 2 of mixer 'moba'"),
  ],
)
def test_heads_that_a_mesh_cannot_split_are_named(pattern, words):
  """Whether they are set, follow from the width, or are one layer's own."""
  with pytest.raises(UserError, match=f"config.mesh.model = 4 does not divide {words}"):
    on_a_mesh(pattern, 4)


@pytest.mark.parametrize(
  "pattern", ["softmax(num_heads=4, num_kv_heads=2)", "gdn(num_heads=2, num_value_heads=4)"]
)
def test_shared_heads_of_keys_may_be_fewer_than_devices(pattern):
  """Each device has those it needs: test_softmax_mixers and test_mixers hold the results to those of one device."""
  on_a_mesh(pattern, 4)


def test_parse_arg():
  known = dict(size=("tiny", "small"), softmax=False, window=0, rate=1.0)
  a = configs.parse_arg("", **known)
  assert (a.size, a.softmax, a.window, a.rate) == ("tiny", False, 0, 1.0)
  a = configs.parse_arg("small,softmax,window=8,rate=1e-3", **known)
  assert (a.size, a.softmax, a.window, a.rate) == ("small", True, 8, 1e-3)
  assert configs.parse_arg("size=small,softmax=false", **known).size == "small"
  for wrong, named in [
    ("sise=tiny", "size=..."),
    ("smal", "did you mean 'small'"),
    ("size=huge", "known: small, tiny"),
    ("window=wide", "int"),
    ("window", "window=..."),
  ]:
    with pytest.raises(UserError, match=re.escape(named)):
      configs.parse_arg(wrong, **known)


@pytest.mark.parametrize(
  "args, named",
  [
    (["--config=CONFIG", "--config.train.stpes=5"], "did you mean 'steps'"),
    (["--config", "CONFIG", "--config.train.stpes", "5"], "did you mean 'steps'"),
    (["--config=CONFIG:stepz=5"], "steps=..."),
    (["--config=CONFIG", "--wrokdir=x"], "workdir"),
    (["--config=configs/nothing.py"], "configs/nothing.py"),
    (["--config=CONFIG", "--config.train.grad_accum=3"], "train.batch_size = 4"),
    ([], "--config is missing"),
  ],
)  # fmt: skip
def test_the_command_line_tells_in_one_line(args, named, tmp_path):
  args = [a.replace("CONFIG", TINY) for a in args]
  done = subprocess.run(
    [sys.executable, "-m", "attnlab.train", *args, f"--workdir={tmp_path / 'run'}"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": ""},
  )
  assert done.returncode == 2, done.stderr
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], done.stderr
  assert not (tmp_path / "run").exists()


def test_help_shows_the_commands():
  done = subprocess.run(
    [sys.executable, "-m", "attnlab.train", "--help"], capture_output=True, text=True, cwd=ROOT
  )
  for text in ("python -m attnlab.train --config=", "--workdir", "--[no]distributed"):
    assert text in done.stdout


def test_workdir_by_default(monkeypatch):
  for spec, name in [("configs/kda.py", "runs/kda"), ("a/b.py:size=small", "runs/b-size=small")]:
    monkeypatch.setattr(cli.config_flags, "get_config_filename", lambda _, spec=spec: spec)
    monkeypatch.setattr(cli.flags, "FLAGS", {"config": None})
    assert cli.default_workdir() == name
