"""Optimisers against their papers' formulas in numpy, masks by metadata, schedules at their corners."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from attnlab import optim, sharding
from attnlab.errors import UserError
from attnlab.nn import param
from configs.base import base


class Parts(nnx.Module):
  """One parameter of each kind: stacked kernels, an expert's, an embedding, a convolution, a gate."""

  def __init__(self):
    normal, keys = jax.nn.initializers.normal(1.0), jax.random.split(jax.random.key(0), 5)
    self.kernel = jax.vmap(lambda k: param(k, normal, (6, 4), ("embed", "mlp")))(
      jax.random.split(keys[0], 3)
    )
    self.experts = param(keys[1], normal, (2, 4, 6), ("experts", "embed", None))
    self.embedding = param(keys[2], normal, (8, 4), ("vocab", "embed"), weight_decay=False)
    self.conv = param(keys[3], normal, (4, 6), (None, "heads"), weight_decay=False)
    self.A_log = param(keys[4], normal, (6,), ("heads",))


@pytest.fixture
def parts():
  params = nnx.state(Parts(), nnx.Param)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  grads = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  return params, jax.tree.unflatten(tree, grads)


def settings(**changes):
  config = base().optim
  config.update(dict(schedule="constant", warmup_steps=0, clip_norm=0.0) | changes)
  return config


def one_update(config, params, grads, steps=10):
  tx = optim.optimizer(config, steps)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  return nnx.to_pure_dict(updates)


def test_masks(parts):
  decay = nnx.to_pure_dict(optim.decay_mask(parts[0]))
  assert decay == dict(kernel=True, experts=True, embedding=False, conv=False, A_log=False)
  muon = nnx.to_pure_dict(optim.matrix_dimensions(parts[0]))
  matrix = MuonDimensionNumbers(-2, -1)
  assert muon == dict(kernel=matrix, experts=matrix, embedding=None, conv=None, A_log=None)


def test_adamw_is_the_formula_and_decays_by_the_mask(parts):
  params, grads = parts
  config = settings(name="adamw", learning_rate=0.1, weight_decay=0.5)
  updates = one_update(config, params, grads)
  for name, update in updates.items():
    g, p = np.asarray(grads[name][...]), np.asarray(params[name][...])
    # After one step both corrected moments are the gradient's own.
    want = g / (np.abs(g) + config.eps) + (0.5 * p if name in ("kernel", "experts") else 0)
    np.testing.assert_allclose(update, -0.1 * want, rtol=1e-5, atol=1e-6)


def test_lion_is_the_formula(parts):
  params, grads = parts
  updates = one_update(settings(name="lion", learning_rate=0.1, weight_decay=0.5), params, grads)
  g, p = np.asarray(grads["kernel"][...]), np.asarray(params["kernel"][...])
  np.testing.assert_allclose(updates["kernel"], -0.1 * (np.sign(g) + 0.5 * p), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(updates["A_log"], -0.1 * np.sign(grads["A_log"][...]), rtol=1e-5)


@pytest.mark.parametrize("name", ["kernel", "experts"])
def test_muon_orthogonalises_each_matrix_by_itself(parts, name):
  params, grads = parts
  updates = one_update(settings(name="muon", learning_rate=0.1, weight_decay=0.0), params, grads)
  for g, update in zip(np.asarray(grads[name][...]), np.asarray(updates[name]), strict=True):
    U, _, Vt = np.linalg.svd(g, full_matrices=False)
    # Five Newton-Schulz steps with Jordan's coefficients leave singular values of 0.7 to 1.2 (and
    # small ones below); the singular vectors are exact. The size is AdamW's: 0.2 sqrt(max(in, out)).
    values = np.diag(U.T @ (update / (-0.1 * 0.2 * np.sqrt(6))) @ Vt.T)
    assert np.all(values > 0.5) and np.all(values < 1.25)
    rest = update / (-0.1 * 0.2 * np.sqrt(6)) - (U * values) @ Vt
    np.testing.assert_allclose(rest, 0, atol=1e-4)


def test_muon_leaves_the_rest_to_adamw(parts):
  params, grads = parts
  muon = one_update(settings(name="muon", weight_decay=0.5), params, grads)
  adamw = one_update(settings(name="adamw", weight_decay=0.5), params, grads)
  for name in ("embedding", "conv", "A_log"):
    np.testing.assert_allclose(muon[name], adamw[name], rtol=1e-6)


def test_clipping_is_by_the_global_norm(parts):
  params, grads = parts
  tx = optim.optimizer(settings(name="lion", clip_norm=0.5), 10)
  _, state = tx.update(grads, tx.init(params), params)
  moments = optax.tree.get(state, "mu")  # (1 - b2) times the clipped gradient
  norm = float(optax.tree.norm(moments)) / (1 - settings().b2)
  np.testing.assert_allclose(norm, 0.5, rtol=1e-5)


def test_schedules():
  rate = lambda **kw: optim.schedule(settings(learning_rate=1.0, **kw), 100)  # noqa: E731
  warm = dict(warmup_steps=10)
  constant = rate(schedule="constant", **warm)
  np.testing.assert_allclose(
    [constant(i) for i in (0, 4, 9, 10, 99)], [0.1, 0.5, 1, 1, 1], rtol=1e-6
  )
  cosine = rate(schedule="cosine", final_fraction=0.2, **warm)
  np.testing.assert_allclose([cosine(i) for i in (0, 9, 10, 55)], [0.1, 1, 1, 0.6], rtol=1e-6)
  np.testing.assert_allclose(cosine(100), 0.2, rtol=1e-5)
  wsd = rate(schedule="wsd", final_fraction=0.0, decay_fraction=0.2, **warm)
  np.testing.assert_allclose([wsd(i) for i in (4, 10, 80, 90, 100)], [0.5, 1, 1, 0.5, 0], rtol=1e-6)
  assert rate(schedule="cosine", warmup_steps=0)(0) == 1
  assert rate(schedule="cosine", warmup_steps=1)(0) == 1
  for name in optim.SCHEDULES:  # A run that ends while it warms up.
    short = rate(schedule=name, warmup_steps=200)
    np.testing.assert_allclose([short(i) for i in (0, 99)], [0.005, 0.5], rtol=1e-6)


@pytest.mark.parametrize(
  "change",
  [
    dict(name="adam"),
    dict(schedule="linear"),
    dict(learning_rate=0.0),
    dict(warmup_steps=-1),
    dict(b2=1.0),
    dict(final_fraction=1.5),
  ],
)
def test_what_cannot_work_is_named(change):
  with pytest.raises(UserError, match=next(iter(change))):
    optim.check(settings(**change))


def test_muon_under_an_explicit_mesh_is_muon():
  mesh = sharding.make_mesh(dict(data=4, model=2))
  tx = optim.optimizer(settings(name="muon"), 10)
  params = {"w": nnx.Param(jax.random.normal(jax.random.key(0), (3, 8, 4)), axes=("embed", "mlp"),
                           weight_decay=True)}  # fmt: skip
  grads = jax.tree.map(jnp.sin, params)
  want, _ = tx.update(grads, tx.init(params), params)
  with jax.set_mesh(mesh):
    places = sharding.shardings((params, jax.eval_shape(tx.init, params)), mesh)
    split = jax.device_put((grads, tx.init(params), params), (places[0], places[1], places[0]))
    got, _ = jax.jit(jax.sharding.auto_axes(tx.update, out_sharding=places))(*split)
  assert got["w"].get_value().sharding.spec == jax.P(None, "data", "model")
  # Sums in another order, through five iterations of a cubic: float32 rounding and no more.
  np.testing.assert_allclose(want["w"][...], got["w"][...], rtol=1e-4, atol=1e-7)
