"""A run that begins from another one's parameters: full attention becomes sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import optim
from attnlab.checkpoint import paths
from attnlab.config import load, resolve
from attnlab.convert import begin, convert, convert_and_train, like, of_warmup
from attnlab.errors import UserError
from attnlab.model import Model, layer_specs, mixer_config
from attnlab.state import load_model, reading_mesh, run_config
from attnlab.train import train

MLA = dict(num_heads=2, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=8)
BLOCKS = dict(block_size=4, top_k=2, pool_size=4, pool_stride=2, initial=0, local=1)
INDEXER = dict(top_k=8, index_heads=2, index_dim=8, index_rope_dim=4)


def config(mixer, settings, **optim):
  c = load(f"tests/tiny_config.py:pattern={mixer}")
  c.model.mixers[mixer] = settings
  c.model.num_layers, c.train.steps, c.train.eval_every, c.data.seq_len = 1, 2, 0, 32
  c.train.update(dict(eval_batches=1, batch_size=8, sample_prompts=()))
  c.optim.update(optim)
  return c


def parameters(workdir, step=None):
  _, _, model = load_model(workdir, run_config(workdir), reading_mesh(), step)
  params = jax.device_get(model["params"])
  return dict(zip(paths(params), jax.tree.leaves(params), strict=True))


def changed(before, after):
  """Names of parameters that both have and that differ."""
  return {k for k in before.keys() & after.keys() if not np.array_equal(before[k], after[k])}


pytestmark = pytest.mark.xdist_group("convert")  # One worker: they share what is trained.


SOFTMAX = dict(head_dim=8, num_heads=4, rope_theta=100.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A run with softmax attention, and what it says at the end."""
  workdir = tmp_path_factory.mktemp("runs") / "softmax"
  return workdir, train(config("softmax", SOFTMAX), workdir)


@pytest.mark.slow
def test_latent_attention_becomes_sparse(tmp_path):
  """Its parameters begin where they were; with everything seen the loss is the same; the indexer alone warms up; then
  all learn, and attention is sparse. Done again, it is not done again."""
  workdir = tmp_path / "mla"
  before = train(config("mla", MLA), workdir)
  c = config("dsa", MLA | INDEXER)
  rows = convert_and_train(workdir, c, tmp_path / "dsa", warmup_steps=2)
  old, warm = parameters(workdir), tmp_path / "dsa/warmup"
  begin, middle = parameters(warm, 0), parameters(warm, 2)
  indexer = {name for name in begin if "indexer" in name}
  assert begin.keys() - old.keys() == indexer and indexer
  assert not changed(old, begin)
  assert changed(begin, middle) == indexer
  assert not changed(middle, parameters(tmp_path / "dsa", 0))
  assert changed(middle, parameters(tmp_path / "dsa", 2)) == set(begin)
  assert [(r["model"], r["attention"]) for r in rows] == [
    ("source", "dense"),
    ("converted", "dense"),
    ("converted", "sparse"),
    ("after the warm-up", "sparse"),
    ("after training", "sparse"),
  ]
  nll = [r["nll"] for r in rows]
  np.testing.assert_allclose(nll[0], before["eval/nll"], rtol=1e-6)
  np.testing.assert_allclose(nll[1], nll[0], rtol=1e-5)
  assert all(abs(x - nll[1]) > 1e-6 for x in nll[2:])
  assert all(0 < r["indexer_recall"] <= 1 and "indexer_loss" in r for r in rows[1:])
  assert convert_and_train(workdir, c, tmp_path / "dsa", warmup_steps=2) == rows


@pytest.mark.parametrize("usual", [20, 1000], ids=["base", "pretrain"])
def test_the_warm_up_reaches_its_rate(usual):
  """Whose updates are fewer than those in which a long run reaches its own."""
  c = of_warmup(config("dsa", MLA | INDEXER, warmup_steps=usual), 100, 1e-3)
  rates = [float(optim.schedule(c.optim, c.train.steps)(i)) for i in range(c.train.steps)]
  np.testing.assert_allclose(max(rates), 1e-3)
  assert rates.index(max(rates)) < 25


def test_softmax_attention_becomes_infllm2(source, tmp_path):
  """Sizes, and what the mixers share, are the source's; nothing is new, and nothing warms up."""
  workdir, before = source
  c = config("infllm2", dict(head_dim=16, num_kv_heads=1, **BLOCKS))
  c.model.mlp.hidden = 32
  c, taken = like(workdir, c)
  assert taken == {
    "model.mlp.hidden": 64,
    "model.mixers.infllm2.head_dim": 8,
    "model.mixers.infllm2.num_heads": 4,
    "model.mixers.infllm2.num_kv_heads": None,
    "model.mixers.infllm2.rope_theta": 100.0,
  }
  rows = convert_and_train(workdir, c, tmp_path / "infllm2")
  assert [r["model"] for r in rows] == ["source", *["converted"] * 2, "after training"]
  old, begin = parameters(workdir), parameters(tmp_path / "infllm2", 0)
  assert old.keys() == begin.keys() and not changed(old, begin)
  assert changed(begin, parameters(tmp_path / "infllm2", 2)) == set(old)
  np.testing.assert_allclose(rows[0]["nll"], before["eval/nll"], rtol=1e-6)
  np.testing.assert_allclose(rows[1]["nll"], rows[0]["nll"], rtol=1e-6)
  assert abs(rows[2]["nll"] - rows[1]["nll"]) > 1e-6


def test_a_mixer_that_stays_keeps_its_settings(source):
  """And ids mean what they meant."""
  workdir, _ = source
  c = config("softmax", dict(head_dim=16))
  c.data.tokenizer = "other/tokenizer.json"
  _, taken = like(workdir, c)
  assert taken == {
    "data.tokenizer": "bytes",
    "model.mixers.softmax.head_dim": 8,
    "model.mixers.softmax.num_heads": 4,
    "model.mixers.softmax.rope_theta": 100.0,
  }


@pytest.fixture
def like_untrained(monkeypatch):
  """`like`, of a run with softmax attention that need not be there."""

  def take(pattern, layers, c):
    source = config("softmax", SOFTMAX)
    source.model.pattern, source.model.num_layers = pattern, layers
    source = resolve(source)
    monkeypatch.setattr("attnlab.convert.run_config", lambda workdir: source)
    return source, *like("source", c)

  return take


def settings_of(c):
  return [mixer_config(c.model, spec) for spec in layer_specs(c.model)]


@pytest.mark.parametrize("pattern", ["softmax", "softmax(rope_theta=5)", "softmax | softmax"])
def test_what_all_layers_have_of_their_own_is_taken(like_untrained, pattern):
  c = config("softmax", dict(num_heads=2))
  c.model.pattern = pattern
  source, c, taken = like_untrained("softmax(rope_theta=77.0)", 2, c)
  assert taken["model.mixers.softmax.rope_theta"] == 77.0
  assert settings_of(c) == settings_of(source)


@pytest.mark.parametrize(
  "old, layers, new",
  [
    ("softmax + softmax(rope_fraction=0.0)", 4, "softmax"),
    ("softmax + softmax(rope_fraction=0.0)", 4, "infllm2"),
    ("softmax(rope_scaling=('yarn', 4.0, 64, 32.0, 1.0)) + softmax", 5, "infllm2 + softmax"),
    ("softmax + softmax(rope_theta=7.0) | softmax(sinks=True)", 3, "infllm2(rope_theta=9)"),
    ("2*softmax(rope_theta=7.0) + 2*softmax | softmax(rope_theta=7.0)", 4, "infllm2"),
  ],
)
def test_what_single_layers_have_of_their_own_is_taken(like_untrained, old, layers, new):
  """A model without positions in some layers stays one, and parameters lie where they lay."""
  c = config("infllm2", BLOCKS)
  c.model.pattern = new
  source, c, _ = like_untrained(old, layers, c)
  for was, now in zip(settings_of(source), settings_of(c), strict=True):
    assert vars(now) == vars(now) | vars(was)
  models = [
    jax.eval_shape(lambda m=m: Model(m.model, jax.random.key(0))) for m in (source, resolve(c))
  ]
  old, new = (nnx.state(m, nnx.Param) for m in models)
  assert paths(old) == paths(new)
  assert jax.tree.map(jnp.shape, old) == jax.tree.map(jnp.shape, new)


def test_layers_that_cannot_have_theirs_are_refused(like_untrained):
  c = config("infllm2", BLOCKS)
  c.model.pattern = "2*infllm2 + kda"
  with pytest.raises(UserError, match=r"config.model.pattern = '2\*infllm2 \+ kda'.*repeat"):
    like_untrained("softmax + softmax(rope_fraction=0.0)", 4, c)


def test_constants_are_taken_too(tmp_path):
  """By which experts are chosen, say: they are not trained, and not what they are at first."""
  c = config("softmax", SOFTMAX)
  c.model.mlp.update(dict(experts=4, top_k=2, expert_hidden=8, router="sigmoid"))
  ones = lambda rest: jax.tree.map(jnp.ones_like, rest)  # noqa: E731
  begin(c, tmp_path / "source", lambda model, mesh: model | {"rest": ones(model["rest"])})
  c.model.pattern, c.model.mixers = "infllm2", {"infllm2": SOFTMAX | BLOCKS}
  convert(tmp_path / "source", c, tmp_path / "sparse")
  _, _, model = load_model(tmp_path / "sparse", run_config(tmp_path / "sparse"), reading_mesh())
  assert [np.unique(x).tolist() for x in jax.tree.leaves(model["rest"])] == [[1.0]]


def test_what_does_not_fit(source, tmp_path):
  workdir, _ = source
  wide = config("infllm2", BLOCKS | SOFTMAX | dict(head_dim=16))
  with pytest.raises(UserError, match="k_proj"):
    convert(workdir, wide, tmp_path / "infllm2")
  with pytest.raises(UserError, match="already"):
    convert(workdir, config("softmax", SOFTMAX), workdir)
