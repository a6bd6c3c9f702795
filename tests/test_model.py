"""The model around the mixers: loss, layers and their order, embeddings, patterns."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.losses import cross_entropy
from attnlab.mixers import Context
from attnlab.model import REMAT, Model
from attnlab.pattern import LayerSpec, parse_pattern
from configs.base import base

D, V = 16, 37
HEADS = dict(num_heads=2, head_dim=8)


def section(pattern, **settings) -> ConfigDict:
  """A small model section."""
  c = base().model
  c.update(dict(pattern=pattern, num_layers=5, d_model=D, vocab_size=V))
  c.mixers = ConfigDict({n: HEADS for n in ("softmax", "swa", "retnet", "linear_attention")})
  c.mlp.update(dict(hidden=24, expert_hidden=8))
  for key, value in settings.items():
    c.update_from_flattened_dict({key: value})
  return c


def build(pattern, **settings) -> Model:
  return Model(section(pattern, **settings), jax.random.key(0))


def make(pattern, **settings) -> Model:
  return jax.jit(lambda: build(pattern, **settings))()


def batch_of(rows=2, length=6):
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, V, (rows, length + 1))
  ids = np.array([[1] * 4 + [2] * (length - 4), [1] * length], np.int32)
  positions = np.array([[0, 1, 2, 3, *range(length - 4)], range(length)], np.int32)
  return dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=ids, positions=positions,
              weights=rng.random((rows, length)).astype(np.float32))  # fmt: skip


def distance(got, want):
  """Relative, in the norm."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


# The loss.


def dense_cross_entropy(x, head, targets):
  """-log softmax(x head^T)[target] and log Z, all logits at once."""
  logits = x @ head.T
  lse = jax.scipy.special.logsumexp(logits, axis=-1)
  return lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], lse


@pytest.mark.parametrize("chunk", [1, 10, V - 1, V, 100, None])
def test_cross_entropy_in_chunks(chunk):
  """Against all logits in float64: values, and the gradients of both outputs. The chunks are float32: 2e-6.

  V is no multiple of the chunk; large logits, one of them the target's, would overflow without the running maximum.
  """
  rng = np.random.default_rng(0)
  x, head = rng.normal(size=(2, 5, D)), rng.normal(size=(V, D))
  targets = rng.integers(0, V, (2, 5))
  targets[0, 0], targets[1, 4] = 0, V - 1
  x[0, 1] *= 100
  targets[0, 1] = np.argmax(head @ x[0, 1])
  cotangents = rng.normal(size=(2, 2, 5))

  def gradients(f, *arrays):
    def loss(x, head):
      out = f(x, head)
      return sum(jnp.vdot(c, y) for c, y in zip(cotangents, out, strict=False)), out

    (dx, dhead), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*arrays)
    return [*out[:2], dx, dhead], out

  single = [np.float32(y) for y in (x, head)]
  got, (*_, correct) = gradients(lambda x, w: cross_entropy(x, w, targets, chunk), *single)
  with jax.enable_x64(True):
    doubles = [np.float64(y) for y in single]
    want, _ = gradients(lambda x, w: dense_cross_entropy(x, w, targets), *doubles)
    best = np.argmax(doubles[0] @ doubles[1].T, axis=-1)
  for a, b in zip(got, want, strict=True):
    assert distance(a, b) < 2e-6
  np.testing.assert_array_equal(correct, best == targets)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_loss_is_a_weighted_mean(z_loss):
  """Of the losses of tokens, and of log(Z)^2 besides, from the model's own logits."""
  model, batch = make("softmax", num_layers=1, z_loss=z_loss), batch_of()

  @jax.jit
  def run(model):
    logits = model.forward(batch["inputs"], batch["positions"], batch["segment_ids"])
    return *model.loss(batch), model.token_nll(batch), logits

  loss, metrics, token_nll, logits = jax.device_get(run(model))
  lse = np.log(np.exp(logits).sum(axis=-1))
  nll = lse - np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
  mean = functools.partial(np.average, weights=batch["weights"])
  np.testing.assert_allclose(metrics["nll"], mean(nll), rtol=1e-5)
  np.testing.assert_allclose(loss, mean(nll) + z_loss * mean(lse**2), rtol=1e-5)
  np.testing.assert_allclose(token_nll, nll, rtol=1e-4, atol=1e-5)


# The layers.


def one_by_one(model: Model):
  """The layers in their order, each by itself."""
  period = [] if model.blocks is None else model.blocks.layers
  count = len(jax.tree.leaves(period[0].mixer_norm)[0]) if period else 0
  of_scan = [jax.tree.map(lambda x, i=i: x[i], block) for i in range(count) for block in period]
  return [*model.lead, *of_scan, *model.tail]


MIXED = "linear_attention + swa(window=2) | softmax"  # a scan of two superblocks, and a last layer


@functools.cache
def unrolled():
  """Loss and gradients of layers in a Python loop, nothing recomputed."""
  model, batch = make(MIXED), batch_of()

  def loss(model):
    x = model.embedding[...][batch["inputs"]] * D**0.5
    for layer in one_by_one(model):
      x, _, _, _ = layer(x, Context(batch["positions"], batch["segment_ids"]), None)
    nll, _ = dense_cross_entropy(model.norm(x), model.embedding[...], batch["targets"])
    return (batch["weights"] * nll).sum() / batch["weights"].sum()

  return jax.jit(jax.value_and_grad(loss))(model)


@pytest.mark.parametrize(
  "remat", [pytest.param(x, marks=[pytest.mark.slow] * (x == "none")) for x in REMAT]
)
def test_scan_and_recomputation_change_nothing(remat):
  """Loss and every gradient are those of the layers one by one. float32 sums in another order: 1e-5."""
  model, batch = make(MIXED, remat=remat), batch_of()
  got = jax.jit(jax.value_and_grad(lambda m: m.loss(batch)[0]))(model)
  want = unrolled()
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  flat = jax.tree_util.tree_leaves_with_path(nnx.state(got[1], nnx.Param))
  for (path, a), b in zip(flat, jax.tree.leaves(nnx.state(want[1], nnx.Param)), strict=True):
    assert np.any(b) and distance(a, b) < 1e-5, path


def test_recomputation_saves_memory():
  """What is not kept is computed again: the less memory, the more FLOPs."""
  batch = batch_of(length=64)
  cost = {}
  for remat in REMAT:
    model = jax.eval_shape(lambda: build("softmax", remat=remat))  # noqa: B023
    compiled = jax.jit(jax.grad(lambda m: m.loss(batch)[0])).lower(model).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    cost[remat] = memory, compiled.cost_analysis()["flops"]
  assert cost["full"][0] < cost["dots"][0] < cost["none"][0]
  assert cost["full"][1] > cost["dots"][1] > cost["none"][1]


@pytest.mark.parametrize(
  "pattern, layers, dense, lead, scan, tail",
  [
    ("softmax", 3, 0, "", "softmax", ""),
    ("2*swa + softmax", 6, 0, "", "swa swa softmax", ""),
    ("2*swa + softmax", 7, 0, "", "swa swa softmax", "swa"),
    ("2*swa + softmax", 2, 0, "", "", "swa swa"),
    ("2*swa + softmax | retnet", 7, 0, "", "swa swa softmax", "retnet"),
    ("2*swa + softmax | retnet", 6, 0, "", "swa swa softmax", "swa swa retnet"),
    # After one leading layer the period goes on where it was.
    ("2*swa + softmax", 7, 1, "swa", "swa softmax swa", ""),
    ("2*swa + softmax | retnet", 6, 2, "swa swa", "softmax swa swa", "retnet"),
    ("softmax | retnet", 1, 0, "", "", "retnet"),
  ],
)
def test_where_layers_stand(pattern, layers, dense, lead, scan, tail):
  """Whatever is split off, the order of the mixers is the pattern's; only leading layers have a dense MLP."""
  settings = {"num_layers": layers, "mlp.experts": 4, "mlp.dense_layers": dense}
  model = jax.eval_shape(lambda: build(pattern, **settings))
  names = lambda blocks: " ".join(b.mixer.name for b in blocks)  # noqa: E731
  assert names(model.lead) == lead and names(model.tail) == tail
  assert names(model.blocks.layers if model.blocks else []) == scan
  spec = parse_pattern(pattern)
  repeated = [spec.period[i % len(spec.period)] for i in range(layers - len(spec.tail))]
  in_order = one_by_one(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model))
  assert [b.mixer.name for b in in_order] == [s.mixer for s in (*repeated, *spec.tail)]
  dense_mlps = [hasattr(b.mlp, "down") and hasattr(b.mlp.gate, "kernel") for b in in_order]
  assert dense_mlps == [i < dense for i in range(layers)]


def test_a_layer_knows_its_number():
  """Lightning's decay depends on it: leading, scanned and last layers count on."""
  pattern = "lightning(num_heads=2, head_dim=8)"
  model = make(f"{pattern} | {pattern}", num_layers=6, **{"mlp.experts": 4, "mlp.dense_layers": 1})
  slopes = [layer.mixer.slope[...][0] for layer in one_by_one(jax.device_get(model))]
  np.testing.assert_allclose(slopes, 2.0**-4 * (1 - np.arange(6) / 5 + 1e-5), rtol=1e-4)


def test_a_layer_has_its_own_settings_over_the_configs():
  """Position encoding, say."""
  pattern = "swa + softmax(rope_fraction=0.0) + softmax(rope_theta=5.0) | softmax(rope_fraction=1)"
  c = section(pattern, num_layers=4)
  c.mixers.softmax = HEADS | dict(rope_fraction=0.5)
  model = jax.eval_shape(lambda: Model(c, jax.random.key(0)))
  configs = [block.mixer.config for block in (*model.blocks.layers, *model.tail)]
  assert [x.rope_fraction for x in configs] == [1.0, 0.0, 0.5, 1.0]
  assert [x.rope_theta for x in configs] == [1e4, 1e4, 5.0, 1e4]
  assert all(x.num_heads == 2 for x in configs)


def test_layers_fewer_than_the_patterns_ends():
  for settings in (dict(num_layers=1), {"num_layers": 3, "mlp.dense_layers": 2}):
    with pytest.raises(UserError, match="config.model.num_layers"):
      jax.eval_shape(lambda settings=settings: build("softmax | 2*swa", **settings))


# The embeddings.


def silent(**settings) -> Model:
  """A model whose layers add nothing."""
  model = make("softmax", num_layers=2, **settings)
  block = model.blocks.layers[0]
  for last in (block.mixer.out_proj, block.mlp.down):
    last.kernel[...] = jnp.zeros_like(last.kernel[...])
  return model


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_products_with_the_embedding_or_a_head(tied):
  """Rows have unit variance where they enter, whether or not they make the logits."""
  model, tokens = silent(tie_embeddings=tied), batch_of()["inputs"]
  table = np.asarray(model.embedding[...], np.float64)
  x = table[tokens] * D**0.5
  assert 0.8 < x.std() < 1.2
  x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + model.norm.eps)
  head = table if tied else np.asarray(model.head[...], np.float64)
  assert (model.head is None) == tied
  np.testing.assert_allclose(
    jax.jit(Model.forward)(model, tokens), x @ head.T, rtol=1e-4, atol=1e-5
  )


def test_a_tied_table_has_both_gradients():
  """Those of an embedding and a head that happen to be equal, added."""
  tied, batch = silent(), batch_of()
  untied = silent(tie_embeddings=False)
  untied.embedding[...] = untied.head[...] = tied.embedding[...]
  gradient = jax.jit(jax.grad(lambda m: m.loss(batch)[0]))
  one, two = gradient(tied), gradient(untied)
  both = two.embedding[...] + two.head[...]
  assert distance(one.embedding[...], both) < 1e-5
  assert np.any(two.embedding[...]) and np.any(two.head[...])


# Patterns.


@pytest.mark.parametrize(
  "text, period, tail",
  [
    ("kda", ["kda"], []),
    ("kda kda mla", ["kda", "kda", "mla"], []),
    ("3*gdn + 1*softmax", ["gdn"] * 3 + ["softmax"], []),
    ("2 * gdn+softmax", ["gdn", "gdn", "softmax"], []),
    ("2*gdn softmax | swa mla", ["gdn", "gdn", "softmax"], ["swa", "mla"]),
    ("a(x=1)b(y=2)", [("a", {"x": 1}), ("b", {"y": 2})], []),
    ("2*a(x=1, y = -0.5)", [("a", {"x": 1, "y": -0.5})] * 2, []),
    ("a(gate=head, flag=False, none=None)", [("a", dict(gate="head", flag=False, none=None))], []),
    ("a(limit=(0.0, 1.0), x=2) + b", [("a", {"limit": (0.0, 1.0), "x": 2}), "b"], []),
    ("a(x='b c')", [("a", {"x": "b c"})], []),
    ("a()", ["a"], []),
  ],
)
def test_patterns(text, period, tail):
  def spec(layer):
    name, settings = (layer, {}) if isinstance(layer, str) else layer
    return LayerSpec(name, tuple(settings.items()))

  pattern = parse_pattern(text)
  assert list(pattern.period) == [spec(layer) for layer in period]
  assert list(pattern.tail) == [spec(layer) for layer in tail]


@pytest.mark.parametrize(
  "text, words",
  [
    ("", "names no layer"),
    ("  ", "names no layer"),
    ("kda |", "names no layer"),
    ("| kda", "names no layer"),
    ("3*", "cannot read '3*'"),
    ("3kda", "cannot read '3kda'"),
    ("-1*kda", "cannot read"),
    ("kda, mla", "cannot read"),
    ("kda(x=1", "cannot read 'kda(x=1'"),
    ("kda)", "cannot read"),
    ("0*kda", "0*kda is no layer"),
    ("kda(4)", "'4' is not of the form setting=value"),
    ("kda(x=)", "'x=' is not of the form setting=value"),
    ("kda(x=1, x=2)", "x is set twice"),
  ],
)
def test_what_is_no_pattern(text, words):
  with pytest.raises(UserError) as error:
    parse_pattern(text)
  assert words in str(error.value) and "\n" not in str(error.value)


# On a mesh.


def on_a_mesh(run, sizes, model, batch):
  """``run`` of a model and a batch's rows as training has them."""
  mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
  with jax.set_mesh(mesh):
    graph, params = nnx.split(model)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    return run(nnx.merge(graph, params), batch)


def loss(model: Model, batch):
  return model.loss(batch)[0]


def test_the_loss_on_a_mesh():
  """Over data and heads, and over data, tokens and heads: loss and every gradient are those of one device.

  Of layers with token shifts, with latents, a sparse one, and with convolutions. float32 sums in another order: 1e-5.
  """
  heads = dict(num_heads=2, head_dim=8)
  latent = dict(num_heads=2, nope_dim=8, rope_dim=4, value_dim=8, kv_lora_rank=12)
  sizes = dict(rwkv7=heads, kda=heads, mla=latent, moba=dict(**heads, block_size=2, top_k=2))
  settings = {f"mixers.{name}": size for name, size in sizes.items()}
  model, batch = make("rwkv7 + mla + moba + kda", num_layers=4, **settings), batch_of(length=8)
  run = jax.jit(jax.value_and_grad(loss))
  want = jax.device_get(run(model, batch))
  traced = functools.partial(jax.eval_shape, run)
  on_a_mesh(traced, dict(data=2, model=2), model, batch)
  got = jax.device_get(on_a_mesh(run, dict(data=2, context=2, model=2), model, batch))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  flat = jax.tree_util.tree_leaves_with_path(nnx.state(got[1], nnx.Param))
  for (path, a), b in zip(flat, jax.tree.leaves(nnx.state(want[1], nnx.Param)), strict=True):
    # Behind a projection that is zero at the start there is no gradient.
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), path


def test_a_row_that_many_tokens_share_gets_the_whole_sum_of_their_gradients():
  """Of 30000 tokens' bfloat16 gradients: 2^-9 each, and no more of their sum (in bfloat16 it would stop at 256)."""
  table = jnp.ones((3, 4))
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, 15000)))
  dy = jnp.asarray(np.random.default_rng(1).uniform(0, 2, (2, 15000, 4)), jnp.bfloat16)
  rows, pull = jax.vjp(lambda table: sharding.look_up(table, ids, jnp.bfloat16), table)
  assert rows.dtype == jnp.bfloat16
  (got,) = pull(dy)
  want = np.zeros((3, 4))
  np.add.at(want, np.asarray(ids), np.asarray(dy, np.float64))
  np.testing.assert_allclose(got, want, rtol=1e-5)
