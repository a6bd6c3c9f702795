"""Checkpoints: what is saved comes back, what is damaged is named and passed over, nothing is harmed."""

import contextlib
import hashlib
import logging
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from attnlab import data, optim, sharding
from attnlab.checkpoint import Checkpoints, NonFiniteError, check_same_run, paths
from attnlab.config import to_json
from attnlab.errors import UserError
from attnlab.nn import param
from configs.base import base


class Two(nnx.Module):
  def __init__(self, width: int = 40):
    normal = jax.nn.initializers.normal(1.0)
    self.kernel = param(jax.random.key(0), normal, (64, width), ("embed", "mlp"))
    self.scales = nnx.List([param(jax.random.key(1), normal, (3,), (None,)) for _ in range(2)])


def state_of(model: nnx.Module, plus: float = 0.0):
  params = jax.tree.map(lambda x: x + plus, nnx.state(model, nnx.Param))
  return {"model": {"params": params}, "optimizer": optax.adamw(1e-3).init(params)}


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def iterator():
  return iter(grain.MapDataset.range(100).seed(0).shuffle().to_iter_dataset())


@contextlib.contextmanager
def checkpoints(directory, keep=9):
  made = Checkpoints(directory, keep)
  yield made
  made.close()


def save(directory, steps=(1, 2, 3), keep=9):
  """Checkpoints whose parameters have their step added, the iterator that far on."""
  data, state = iterator(), {}
  with checkpoints(directory, keep) as c:
    for step in steps:
      state[step] = state_of(Two(), step)
      next(data)
      c.save(step, state[step], data, base())
  return state, data


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
    jax.tree.map(lambda x, y: bool((x == y).all()), a, b)
  )


def digest(directory: Path) -> dict[str, str]:
  files = (p for p in directory.rglob("*") if p.is_file())
  return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def data_files(directory: Path, step: int, name: str = "model") -> list[Path]:
  """What tensorstore wrote for one part of a checkpoint, the largest file first."""
  files = [p for p in (directory / str(step) / name).rglob("*") if "d" in p.parent.parts[-1:]]
  return sorted(files, key=lambda p: -p.stat().st_size)


def test_round_trip_with_the_iterator(tmp_path):
  state, data = save(tmp_path)
  restored = iterator()
  with checkpoints(tmp_path) as c:
    assert c.steps() == [1, 2, 3]
    step, got = c.restore(abstract(state[3]), restored)
  assert step == 3 and same(got, state[3])
  assert [int(next(restored)) for _ in range(5)] == [int(next(data)) for _ in range(5)]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimisers_state_comes_back(tmp_path, name):
  config = base().optim
  config.name = name
  params = nnx.state(Two(), nnx.Param)
  tx = optim.optimizer(config, 10)
  _, optimizer = tx.update(params, tx.init(params), params)
  state = {"model": {"params": params, "rest": nnx.State({})}, "optimizer": optimizer}
  with checkpoints(tmp_path) as c:
    c.save(1, state, iterator(), base())
    c.wait()
    _, got = c.restore(abstract(state))
  assert same(got, state)


def test_nothing_there_is_none(tmp_path):
  with checkpoints(tmp_path) as c:
    assert c.restore(abstract(state_of(Two()))) is None


def test_one_part_and_one_step(tmp_path):
  state, _ = save(tmp_path)
  with checkpoints(tmp_path) as c:
    step, got = c.restore({"model": abstract(state[2])["model"]}, step=2)
    assert step == 2 and list(got) == ["model"] and same(got["model"], state[2]["model"])
    with pytest.raises(UserError, match=r"no checkpoint 7.*\[1, 2, 3\]"):
      c.restore(abstract(state[1]), step=7)


def test_only_the_newest_are_kept(tmp_path):
  save(tmp_path, keep=2)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_what_changes_after_save_is_not_saved(tmp_path):
  """The next update overwrites the very buffers that are still being written."""
  state = state_of(Two())
  want = jax.device_get(state)
  update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  with checkpoints(tmp_path) as c:
    c.save(1, state, iterator(), base())
    for _ in range(20):
      state = update(state)
    c.wait()
    _, got = c.restore(abstract(state))
  assert same(jax.device_get(got), want)


def test_onto_another_mesh(tmp_path):
  state, _ = save(tmp_path, (1,))
  mesh = sharding.make_mesh(dict(data=4, model=2))
  places = sharding.shardings(state[1], mesh)
  wanted = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state[1], places
  )
  with jax.set_mesh(mesh), checkpoints(tmp_path) as c:
    _, got = c.restore(wanted)
  kernel = got["model"]["params"]["kernel"].get_value()
  assert kernel.sharding == NamedSharding(mesh, PartitionSpec("data", "model"))
  assert same(jax.device_get(got), jax.device_get(state[1]))


def flip(path: Path):
  """One byte of the middle, where the arrays' own bits are."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0xFF
  path.write_bytes(bytes(data))


DAMAGE = {
  "a flipped byte": lambda d: flip(data_files(d, 3)[0]),
  "a short file": lambda d: data_files(d, 3)[0].write_bytes(data_files(d, 3)[0].read_bytes()[:99]),
  "an empty file": lambda d: data_files(d, 3)[0].write_bytes(b""),
  "a lost file": lambda d: data_files(d, 3)[0].unlink(),
  "a flipped byte in the optimiser": lambda d: flip(data_files(d, 3, "optimizer")[0]),
  "a lost optimiser": lambda d: shutil.rmtree(d / "3" / "optimizer"),
  "a lost iterator": lambda d: shutil.rmtree(d / "3" / "data"),
  "a broken iterator": lambda d: next((d / "3" / "data").iterdir()).write_text("{"),
  "lost metadata": lambda d: (d / "3" / "_CHECKPOINT_METADATA").unlink(),
  "an empty directory": lambda d: (shutil.rmtree(d / "3"), (d / "3").mkdir()),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  directory = tmp_path_factory.mktemp("whole")
  return directory, *save(directory)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, whole, damage, caplog):
  original, state, _ = whole
  directory = tmp_path / "checkpoints"
  shutil.copytree(original, directory)
  DAMAGE[damage](directory)
  before = digest(directory)
  data = iterator()
  with caplog.at_level(logging.WARNING), checkpoints(directory, keep=2) as c:
    step, got = c.restore(abstract(state[2]), data)
    assert step == 2 and same(got, state[2])
    assert f"{directory / '3'} is damaged" in caplog.text
    assert c.steps() == [1, 2] and digest(directory) == before
    # The run goes on and replaces it; until then keeping the newest two does not count it.
    c.save(4, state[2], data, base())
    c.wait()
    assert c.steps() == [2, 4] and (directory / "3").exists()
  expected = iterator()
  next(expected), next(expected)
  assert int(next(data)) == int(next(expected))


def test_a_damaged_one_is_replaced_at_its_step(tmp_path):
  state, data = save(tmp_path)
  flip(data_files(tmp_path, 3)[0])
  with checkpoints(tmp_path) as c:
    c.restore(abstract(state[2]), data)
    c.save(3, state[3], data, base())
  with checkpoints(tmp_path) as c:
    step, got = c.restore(abstract(state[3]))
  assert step == 3 and same(got, state[3])


def test_one_asked_for_that_is_damaged_is_an_error(tmp_path):
  state, _ = save(tmp_path)
  flip(data_files(tmp_path, 2)[0])
  with checkpoints(tmp_path) as c:
    with pytest.raises(UserError, match="2 is damaged"):
      c.restore(abstract(state[2]), step=2)
    assert c.restore(abstract(state[1]), step=1)[0] == 1


def test_all_damaged_is_an_error_that_touches_nothing(tmp_path):
  state, _ = save(tmp_path, (1, 2))
  for step in (1, 2):
    flip(data_files(tmp_path, step)[0])
  before = digest(tmp_path)
  with checkpoints(tmp_path) as c, pytest.raises(UserError, match="all are damaged"):
    c.restore(abstract(state[1]))
  assert digest(tmp_path) == before


def test_a_half_written_one_is_named(tmp_path, caplog):
  state, _ = save(tmp_path, (1, 2))
  (tmp_path / "3.orbax-checkpoint-tmp" / "model").mkdir(parents=True)
  with caplog.at_level(logging.WARNING), checkpoints(tmp_path) as c:
    assert "3.orbax-checkpoint-tmp was left half-written" in caplog.text
    assert c.restore(abstract(state[2]))[0] == 2


def test_what_is_not_finite_is_not_saved(tmp_path):
  state = state_of(Two())
  bad = state["model"]["params"]["scales"][1]
  bad.set_value(bad.get_value().at[2].set(jnp.nan))
  with checkpoints(tmp_path) as c:
    with pytest.raises(NonFiniteError, match=r"params\.scales\.1 of the model"):
      c.save(1, state, iterator(), base())
    assert c.steps() == []
  assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused_and_nothing_harmed(tmp_path):
  save(tmp_path)
  before = digest(tmp_path)
  with checkpoints(tmp_path) as c, pytest.raises(UserError) as error:
    c.restore(abstract(state_of(Two(width=48))))
  for text in ("another model", "params.kernel", "(64, 40)", "(64, 48)"):
    assert text in str(error.value)
  assert digest(tmp_path) == before


def test_another_optimizer_is_refused_and_is_not_damage(tmp_path):
  """Its state has other arrays, or the same in another order."""
  state, _ = save(tmp_path)
  before, params = digest(tmp_path), state[3]["model"]["params"]
  config = base().optim
  config.update(dict(name="adamw", only="kernel"))
  for tx in (optax.sgd(1.0, momentum=0.9), optim.optimizer(config, 10)):
    other = abstract(state[3]) | {"optimizer": jax.eval_shape(tx.init, params)}
    with checkpoints(tmp_path) as c, pytest.raises(UserError, match="3 is of another optimizer: "):
      c.restore(other)
  assert digest(tmp_path) == before


def refuse():
  raise UserError("other data")


@pytest.mark.parametrize(
  "fail, kind, message",
  [
    (refuse, UserError, "^other data$"),
    (lambda: bytearray(1 << 62), MemoryError, None),
    (lambda: jnp.zeros(1 << 50), jax.errors.JaxRuntimeError, "RESOURCE_EXHAUSTED"),
  ],
  ids=["the iterator's refusal", "memory", "a device's memory"],
)
def test_what_is_no_error_of_files_is_not_damage(tmp_path, fail, kind, message):
  class Failing:
    async def save(self, directory): ...

    async def load(self, directory):
      fail()

  state, _ = save(tmp_path)
  with checkpoints(tmp_path) as c, pytest.raises(kind, match=message):
    c.restore(abstract(state[3]), Failing())


@pytest.mark.parametrize("share, wrong", [((1, 2), (0, 1)), ((0, 1), (1, 2)), ((0, 2), (3, 4))])
def test_places_of_another_number_of_shares_are_refused(tmp_path, share, wrong):
  """Whoever has the share may read it, whatever its number among processes; its loss is damage."""
  config = data.data_config()
  config.update(dict(name="task", seq_len=32, task_args=dict(vocab_size=64, num_kv_pairs=4)))

  def batches(share):
    return data.make_iterator(config, split="train", batch_size=4, seed=0, share=share)

  state, saved, again = state_of(Two()), batches(share), batches(share)
  next(saved)
  with checkpoints(tmp_path) as c:
    c.save(1, state, saved, base())
    c.wait()
    message = (
      rf"{tmp_path}/1/data keeps the places of {share[1]} process\(es\).* not of {wrong[1]}:"
    )
    with pytest.raises(UserError, match=message):
      c.restore(abstract(state), batches(wrong))
    c.restore(abstract(state), again)
    np.testing.assert_array_equal(next(again)["index"], next(saved)["index"])
    (tmp_path / "1" / "data" / f"process_{share[0]}-of-{share[1]}.json").unlink()
    with pytest.raises(UserError, match="all are damaged"):
      c.restore(abstract(state), again)


@pytest.mark.parametrize(
  "key, value, fits",
  [
    ("model.d_model", 64, False),
    ("model.vocab_size", 512, False),
    ("model.remat", "full", True),
    ("data.seq_len", 128, False),
    ("data.train", "/moved/there", True),
    ("seed", 1, False),
    ("optim.name", "lion", False),
    ("optim.only", "indexer", False),
    ("optim.learning_rate", 1.0, True),
    ("train.steps", 7, True),
    ("train.batch_size", 16, False),
    ("train.grad_accum", 2, True),
    ("mesh.model", 2, True),
  ],
)
def test_which_changes_a_run_survives(key, value, fits, tmp_path):
  new = base()
  new.update_from_flattened_dict({key: value})
  if fits:
    return check_same_run(to_json(base()), new, tmp_path)
  with pytest.raises(UserError, match=rf"config\.{key} = .*not {value!r}"):
    check_same_run(to_json(base()), new, tmp_path)
  return None


def test_paths_read_like_attributes():
  assert paths(state_of(Two())["model"]) == ["params.kernel", "params.scales.0", "params.scales.1"]


def test_checksums_are_of_the_bits():
  from attnlab.checkpoint import _inspect

  x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
  tree = {"a": jnp.asarray(x), "b": jnp.arange(3), "c": jnp.asarray(x, jnp.bfloat16)}
  sums, finite = _inspect(tree)
  bits = [x.view(np.uint32), np.arange(3), np.asarray(tree["c"]).view(np.uint16)]
  assert sums.tolist() == [int(b.astype(np.uint64).sum()) % 2**32 for b in bits]
  assert finite.all()
