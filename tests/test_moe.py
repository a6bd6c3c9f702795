"""The mixture of experts against a loop over all experts, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.moe import MoE
from attnlab.nn import Stepped

B, T, D, F = 4, 6, 8, 5


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def make(dtype=np.float64, bias=None, **options):
  """A layer whose arrays are of a dtype, and tokens for it."""
  moe = MoE(jax.random.key(0), D, F, **(dict(experts=6, top_k=2, shared=1) | options))
  moe = jax.tree.map(lambda x: jnp.asarray(x, dtype), moe)
  if bias is not None:
    moe.bias[...] = jnp.asarray(bias, dtype)
  return moe, jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), dtype)


def swiglu(x, gate, up, down):
  return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def dense(moe, x):
  """Every expert on every token, times what the token's scores give it; the balance loss by its formula; the load."""
  E, k = moe.experts, moe.top_k
  logits = x @ moe.router.kernel[...]
  scores = jax.nn.softmax(logits) if moe.router_kind == "softmax" else 1 / (1 + jnp.exp(-logits))
  biased = jax.lax.stop_gradient(scores) + moe.bias[...]
  if moe.groups > 1:
    each = biased.reshape(*x.shape[:2], moe.groups, -1)
    worth = jnp.sort(each, axis=-1)[..., -2:].sum(axis=-1)
    rank = jnp.argsort(jnp.argsort(-worth, axis=-1), axis=-1)
    biased = jnp.where(rank[..., None] < moe.top_groups, each, -jnp.inf).reshape(biased.shape)
  ranks = jnp.argsort(-biased, axis=-1)
  chosen = (ranks[..., :k, None] == jnp.arange(E)).any(axis=-2)
  weights = moe.scale * scores * chosen / (scores * chosen).sum(axis=-1, keepdims=True)
  y = jnp.zeros(x.shape)
  for e in range(E):
    one = swiglu(x, moe.gate[...][e], moe.up[...][e], moe.down[...][e])
    y = y + weights[..., e, None] * one
  if moe.shared is not None:
    s = moe.shared
    shared = swiglu(x, s.gate.kernel[...], s.up.kernel[...], s.down.kernel[...])
    if moe.shared_gate is not None:
      shared = shared / (1 + jnp.exp(-x @ moe.shared_gate.kernel[...]))
    y = y + shared
  load = chosen.astype(x.dtype).mean(axis=(0, 1)) / k
  mass = (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=(0, 1))
  return y, moe.balance * E * (load * mass).sum(), load


def of(apply, moe, x):
  """The layer's outputs, and the gradients of tokens and every parameter, by name."""
  graph, params, rest = nnx.split(moe, nnx.Param, ...)
  weight = np.random.default_rng(1).normal(size=x.shape)

  def loss(params, x):
    y, balance = apply(nnx.merge(graph, params, rest), x)
    # The balance loss counts as it does in training, made large enough to be seen.
    return jnp.sum(y * weight) + 100 * balance, (y, balance)

  grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
  leaves = jax.tree_util.tree_leaves_with_path((out, grads))
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def layer(moe, x):
  y, aux = moe(x)
  return y, aux["balance_loss"]


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(router="sigmoid", scale=2.5, shared=2),
    dict(experts=5, top_k=1, shared=0, bias=[0, 3, 0, 0, -3.0]),
    dict(experts=3, top_k=3),
    dict(experts=8, top_k=3, groups=4, top_groups=2, router="sigmoid", bias=[0, 0.5] * 4),
    dict(shared=2, shared_gate=True),
  ],
  ids=["softmax", "sigmoid", "one biased", "all", "groups", "gated"],
)
def test_matches_the_loop(float64, options):
  """Outputs, balance loss, and the gradients of tokens, router, experts and shared expert."""
  moe, x = make(**options)
  got, want = of(layer, moe, x), of(lambda moe, x: dense(moe, x)[:2], moe, x)
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-9, atol=1e-11, err_msg=name)
    if moe.top_k > 1 or "router" not in name:  # one expert's weight is one, whatever its score
      assert np.abs(want[name]).max() > 0, name


def test_load(float64):
  moe, x = make()
  _, aux = moe(x)
  load = dense(moe, x)[2]
  np.testing.assert_allclose(aux["expert_load_max"], 6 * load.max(), rtol=1e-12)


def test_padding_is_not_balanced(float64):
  """Balance loss, load, and the gradients of bias and router are those of the other tokens alone."""
  moe, x = make(shared=0)
  counted = jnp.arange(T) < jnp.array([6, 3, 0, 5])[:, None]
  some = x.reshape(-1, D)[np.flatnonzero(counted)][None]
  graph, params, rest = nnx.split(moe, (nnx.Param, Stepped), ...)

  def run(x, counted):
    def loss(params):
      aux = nnx.merge(graph, params, rest)(x, counted)[1]
      return aux["balance_loss"], aux

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  got, want = run(x, counted), run(some, None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)
  assert abs(run(x, None)[1]["balance_loss"] - want[1]["balance_loss"]) > 1e-5


def test_the_gradient_of_the_bias_is_the_load_over_its_share(float64):
  """What `attnlab.train` moves it by the sign of (arXiv:2408.15664, algorithm 1); the loss is what it was."""
  moe, x = make(bias=[0, 0.1, 0, 0.2, 0, 0])
  graph, bias, rest = nnx.split(moe, Stepped, ...)

  def loss(bias):
    y, aux = nnx.merge(graph, bias, rest)(x)
    return aux["balance_loss"] + 0 * y.sum()

  value, gradient = jax.value_and_grad(loss)(bias)
  _, balance, load = dense(moe, x)
  np.testing.assert_allclose(value, balance, rtol=1e-12)
  np.testing.assert_allclose(jax.tree.leaves(gradient)[0], load - 1 / 6, atol=1e-15)


def test_no_token_is_dropped():
  """Not even where all take the same expert: its load is all of them, and the loss that asks for balance is maximal."""
  moe, x = make(np.float32, bias=[0, 0, 9, 0, 0, 0], top_k=1, shared=0)
  y, aux = jax.jit(lambda moe, x: moe(x))(moe, x)
  want = swiglu(x, *(w[...][2] for w in (moe.gate, moe.up, moe.down)))
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
  assert aux["expert_load_max"] == 6


@pytest.mark.parametrize("sizes", [dict(data=2, model=4), dict(data=4, model=2)])
def test_sharded(sizes):
  """Tokens over some devices and experts over others; 6 experts do not split over 4: each device then has them all."""
  moe, x = make(np.float32)
  want = of(layer, moe, x)
  mesh = sharding.make_mesh(sizes)
  with jax.set_mesh(mesh):
    moe = jax.device_put(moe, sharding.shardings(moe, mesh))
    got = of(layer, moe, sharding.put(x, "batch", None, None))
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_bfloat16():
  """Tokens in bfloat16, routed by float32 scores of them: the same experts, and 8 bits in each of a few roundings."""
  moe, x = make(np.float32)
  low = x.astype(jnp.bfloat16)
  y, _ = moe(low)
  want, _ = moe(low.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  assert np.linalg.norm(y.astype(jnp.float32) - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize(
  "options, words",
  [
    (dict(experts=2, top_k=3), "top_k=3 must be between 1 and the number of experts, 2"),
    (dict(experts=2, top_k=0), "top_k=0"),
    (dict(router="sofmax"), "did you mean 'softmax'"),
    (dict(groups=4), "cannot be chosen from top_groups=1 of groups=4"),
    (dict(experts=8, top_k=3, groups=4), "top_k=3 of 8 experts"),
    (dict(shared=0, shared_gate=True), "of which there are none"),
  ],
)
def test_bad_settings(options, words):
  with pytest.raises(UserError, match=words):
    make(**options)
