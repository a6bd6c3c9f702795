"""A run that begins from another one's parameters."""

import jax
import numpy as np
import pytest

from attnlab.checkpoint import paths
from attnlab.config import load
from attnlab.convert import convert
from attnlab.errors import UserError
from attnlab.state import load_model, reading_mesh, run_config
from attnlab.train import train

MLA = dict(num_heads=2, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=8)
INDEXER = dict(top_k=8, index_heads=2, index_dim=8, index_rope_dim=4)


def config(mixer, settings, **optim):
  c = load(f"tests/tiny_config.py:pattern={mixer}")
  c.model.mixers[mixer] = settings
  c.model.num_layers, c.train.steps, c.train.eval_every, c.data.seq_len = 1, 2, 0, 32
  c.train.update(dict(eval_batches=1, batch_size=8, sample_prompts=()))
  c.optim.update(optim)
  return c


def parameters(workdir):
  _, _, model = load_model(workdir, run_config(workdir), reading_mesh())
  params = jax.device_get(model["params"])
  return dict(zip(paths(params), jax.tree.leaves(params), strict=True))


pytestmark = pytest.mark.xdist_group("convert")  # One worker: they share what is trained.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A run with latent attention, and what it says at the end."""
  workdir = tmp_path_factory.mktemp("runs") / "mla"
  return workdir, train(config("mla", MLA), workdir)


def test_latent_attention_becomes_sparse(source, tmp_path):
  """Its parameters begin where they were; with everything seen the loss is the same; the indexer alone is trained."""
  workdir, before = source
  c = config("dsa", MLA | INDEXER, only="indexer")
  c.model.dense = True
  result = convert(workdir, c, tmp_path / "dsa")
  assert result["step"] == 2 and not result["left"]
  assert result["new"] and all("indexer" in name for name in result["new"])
  old, begin = parameters(workdir), parameters(tmp_path / "dsa")
  for name, value in old.items():
    np.testing.assert_array_equal(begin[name], value)
  after = train(c, tmp_path / "dsa")
  assert after["steps"] == 2
  end = parameters(tmp_path / "dsa")
  for name, value in begin.items():
    assert np.array_equal(end[name], value) == ("indexer" not in name), name
  np.testing.assert_allclose(after["eval/nll"], before["eval/nll"], rtol=1e-5)


def test_what_does_not_fit(source, tmp_path):
  workdir, _ = source
  wide = config("dsa", MLA | INDEXER | dict(kv_lora_rank=16))
  with pytest.raises(UserError, match="k_up"):
    convert(workdir, wide, tmp_path / "dsa")
  with pytest.raises(UserError, match="already"):
    convert(workdir, config("mla", MLA), workdir)
