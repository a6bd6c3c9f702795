"""What is particular to the sparse mixers; what every mixer must do is in test_mixers.py."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import Context, Layer, configure, mixer, mixers
from pallas_kernels import dispatch
from pallas_kernels.softmax_attention import cudnn, splash

D, H, HKV, K, T = 32, 4, 2, 8, 27
SIZES = dict(num_heads=H, num_kv_heads=HKV, head_dim=K, rope_theta=100.0)
V4 = dict(rope_dim=4, q_lora_rank=8, window=4, out_rank=6, out_groups=2)
# With these a query late in the sequence chooses one or two blocks of six or seven, besides forced ones.
CASES = {
  "moba": dict(block_size=4, top_k=3),
  "infllm2": dict(block_size=4, top_k=4, pool_size=4, pool_stride=2, initial=1, local=1),
  "nsa": dict(block_size=4, top_k=4, pool_size=4, pool_stride=2, initial=1, local=2, window=5),
  "nsa_fla": dict(block_size=4, top_k=4, initial=1, local=1, window=5),
  "longformer": dict(window=4, dilation=2, initial=2),
  "bigbird": dict(block_size=4, initial=1, local=1, random=2),
  "window_linear": dict(window=5, num_kv_heads=None),
  "hca": dict(V4, compress=4),
  "csa": dict(V4, compress=3, top_k=2, index_heads=3, index_dim=8, index_rope_dim=4),
  "minimax_m3": dict(block_size=4, top_k=3, index_dim=6, qk_norm=False),
  "dsa": dict(
    top_k=5, kv_lora_rank=12, nope_dim=8, rope_dim=4, value_dim=6,
    index_heads=3, index_dim=8, index_rope_dim=4, q_lora_rank=8,
  ),
}  # fmt: skip
OTHERWISE = dict(block_size=4, top_k=3, window=5)
# Settings under which nothing is left out.
EVERYTHING = dict(top_k=64, window=64, dilation=1, random=64)
SPARSE = sorted(name for name, cls in mixers().items() if cls.family == "sparse")
SEGMENTS = np.array([[1] * 11 + [2] * 16, [1] * 27])


def make(name, **settings):
  """A layer whose every parameter has been moved away from its initial value."""
  cls = mixer(name)
  fields = set(cls.Config.__dataclass_fields__)
  sizes = {k: v for k, v in SIZES.items() if k in fields}
  case = CASES.get(name) or {k: v for k, v in OTHERWISE.items() if k in fields}
  layer = cls(configure(cls, sizes | case | settings), Layer(D), jax.random.key(0))
  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  rng = np.random.default_rng(5)
  params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(p.dtype), params)
  return nnx.merge(graph, params, rest)


def tokens(batch=1, seed=1):
  return np.random.default_rng(seed).normal(size=(batch, T, D)).astype(np.float32)


def context(start, length, batch, ids=None, dense=False):
  positions = jnp.broadcast_to(start + jnp.arange(length), (batch, length))
  return Context(positions, ids, dense=dense)


def whole(layer, x, **options):
  run = lambda layer, x: layer(x, context(0, T, x.shape[0], **options)).y  # noqa: E731
  return np.asarray(jax.jit(run)(layer, x))


@functools.cache
def alone(name):
  """A layer, tokens, and its output for them."""
  layer, x = make(name), tokens()
  return layer, x, whole(layer, x)


# One worker takes all of a mixer's: they share what is compiled.
NAMES = [
  pytest.param(n, marks=pytest.mark.xdist_group(f"sparse-{n}"))
  for n in sorted({*SPARSE, "window_linear"})
]


@pytest.mark.parametrize("name", NAMES)
def test_long_enough_to_choose(name):
  """The whole layer against its reference, where blocks are left out; float32 against float64, on sums of some dozens
  of terms. Gradients, and the further settings, are test_mixers'."""
  layer, x, got = alone(name)
  want, _ = jax.device_get(layer).reference(x[0].astype(np.float64))
  np.testing.assert_allclose(got[0], want, rtol=2e-5, atol=2e-5)


POOLED = dict(pool=3, top_k=6, rope_dim=0, index_rope_dim=0)


@pytest.mark.parametrize(
  "name, settings", [("minimax_m3", {}), ("dsa", {}), ("dsa", POOLED), ("csa", {})]
)
@pytest.mark.parametrize("dense", [False, True])
def test_indexer_loss(name, settings, dense):
  """Its value against the reference's; its gradient reaches the indexer and nothing else."""
  layer, x = make(name, **settings), tokens()
  want_y, want = jax.device_get(layer).reference(x[0].astype(np.float64), dense=dense)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)

  def loss(params, x):
    out = nnx.merge(graph, params, rest)(x, context(0, T, 1, dense=dense))
    return out.aux["indexer_loss"], (out.y, out.aux)

  (dparams, dx), (got, aux) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
  np.testing.assert_allclose(got[0], want_y, rtol=2e-5, atol=2e-5)
  assert aux.keys() == want.keys()
  for key in want:
    np.testing.assert_allclose(aux[key], want[key], rtol=1e-4)
  assert not np.any(dx)
  for path, g in jax.tree_util.tree_leaves_with_path(dparams):
    own = jax.tree_util.keystr(path).startswith(tuple(f"['{n}" for n in layer.own_loss))
    assert np.any(g) == own, path


def read(layer, x, pieces, ids=None, max_len=T + 3):
  """Outputs of x in pieces, from an empty cache."""
  step = jax.jit(lambda layer, x, ctx, cache: layer(x, ctx, cache))
  cache, at, out = layer.init_cache(x.shape[0], max_len), 0, []
  for n in pieces:
    here = None if ids is None else ids[:, at : at + n]
    ctx = context(at, n, x.shape[0], here)
    if ids is not None:
      first = np.argmax(ids, axis=1)[:, None]
      ctx = Context(jnp.maximum(ctx.positions - first, 0), here)
    got = step(layer, x[:, at : at + n], ctx, cache)
    cache, at = got.cache, at + n
    out.append(np.asarray(got.y))
  return np.concatenate(out, axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_across_steps(name):
  """Pieces that end anywhere in blocks and pools, shorter and longer than they are, and single tokens."""
  layer, x, want = alone(name)
  got = read(layer, x, [7, 1, 1, 7, 1, 1, 7, 1, 1])
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  "name, dense, devices",
  [("dsa", True, 8), pytest.param("nsa", False, 1, marks=pytest.mark.slow)],
)
def test_chunks_of_queries(monkeypatch, name, dense, devices):
  """A few queries at a time, in a loop of layers, on devices that share batch and heads: losses and every gradient are
  those of all queries at once (float32 sums in another order)."""
  layer, x = make(name), tokens(4)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)

  def loss(params, x):
    def body(x, _):
      out = nnx.merge(graph, params, rest)(x, Context(positions, dense=dense))
      return x + out.y, out.aux

    positions = sharding.put(context(0, T, 4).positions, "batch", None)
    x, aux = jax.lax.scan(body, x, None, length=2)
    return jnp.sum(x**2) + sum(aux[k].sum() for k in aux if k.endswith("_loss"))

  want = jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x))
  monkeypatch.setattr(dispatch, "_CPU", 1 << 13)
  mesh = sharding.make_mesh(dict(data=-1, model=min(2, devices)), jax.devices()[:devices])
  with jax.set_mesh(mesh):
    params = jax.device_put(params, sharding.shardings(params, mesh))
    x = jax.device_put(x, sharding.batch_sharding(mesh))
    got = jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(g - w) <= 1e-4 * np.linalg.norm(w)


def test_pools_across_steps():
  """DSA's pooled keys, without positions: a tail that is no pool yet is seen, and becomes one, wherever pieces end."""
  layer, x = make("dsa", **POOLED), tokens()
  want, _ = jax.device_get(layer).reference(x[0].astype(np.float64))
  got = read(layer, x, [7, 1, 1, 7, 1, 1, 7, 1, 1])
  np.testing.assert_allclose(got[0], want, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_padding_moves_blocks(name):
  """A prompt with padding on the left has the blocks that it has without."""
  layer, x, want = alone(name)
  padded = np.concatenate([tokens(seed=2)[:, :3], x[:, :-3]], axis=1)
  ids = (np.arange(T) >= 3).astype(np.int32)[None]
  got = read(layer, padded, [9, 9, 9], ids)[:, 3:]
  np.testing.assert_allclose(got, want[:, :-3], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", sorted(set(SPARSE) - {"hca"}))  # which chooses nothing
def test_everything_is_full_attention(name):
  """Where every block is chosen: outputs, and the gradients of x and of every parameter (float32 sums: 1e-5)."""
  fields = mixer(name).Config.__dataclass_fields__
  settings = {k: v for k, v in EVERYTHING.items() if k in fields}
  layer, x = make(name, **settings), tokens(2)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  cotangent = tokens(2, seed=3)

  def run(dense):
    def loss(params, x):
      ctx = context(0, T, 2, SEGMENTS, dense)
      y = nnx.merge(graph, params, rest)(x, ctx).y
      return jnp.sum(y * cotangent), y

    return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x))

  for got, want in zip(run(False), run(True), strict=True):
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ["moba", "infllm2"])
def test_dense_is_softmax_attention(name):
  """Of the same parameters."""
  layer, x, sparse = alone(name)
  full = make_softmax()
  params = {k: v for k, v in vars(layer).items() if k.endswith("_proj") and v is not None}
  for key, value in params.items():
    setattr(full, key, value)
  want = whole(full, x)
  np.testing.assert_array_equal(whole(layer, x, dense=True), want)
  assert np.abs(sparse - want).max() > 1e-3


def make_softmax():
  cls = mixer("softmax")
  return cls(configure(cls, SIZES), Layer(D), jax.random.key(0))


@pytest.mark.parametrize(
  "name, settings",
  [
    ("nsa", dict(pool_stride=3)),
    ("nsa", dict(pool_size=3)),
    ("nsa", dict(sinks=True)),
    ("nsa_fla", dict(sinks=True)),
    ("infllm2", dict(block_size=5)),
    ("infllm2", dict(top_k=1)),
  ],
)
def test_sizes_that_do_not_fit(name, settings):
  with pytest.raises(UserError, match=next(iter(settings))):
    make(name, **settings)


def test_a_choice_handed_on():
  """A layer that takes another's choice attends to what it would have chosen with the other's indexer and input."""
  own, gives, takes = (make("dsa", share=s) for s in ("none", "give", "take"))
  graph, _, rest = nnx.split(takes, nnx.Param, ...)
  params = nnx.state(own, nnx.Param)
  del params["indexer"]
  takes, x = nnx.merge(graph, params, rest), jnp.asarray(tokens())
  gives = nnx.merge(nnx.graphdef(gives), *nnx.split(own, nnx.Param, ...)[1:])
  given = jax.jit(lambda layer, x: layer(x, context(0, T, 1)).shared)(gives, x)
  ctx = context(0, T, 1)
  run = lambda layer, x, shared: layer(x, Context(ctx.positions, shared=shared)).y  # noqa: E731
  want = alone("dsa")[2]
  np.testing.assert_allclose(jax.jit(run)(takes, x, given), want, rtol=1e-6, atol=1e-6)
  nothing = jax.tree.map(jnp.zeros_like, given)
  assert not np.any(jax.jit(run)(takes, x, nothing))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dense", [False, True])
def test_memory_is_linear_in_length(name, dense):
  """Of a training step with the mixer's own losses, packed: at twice the length at most 2.1 times the bytes."""
  layer = make(name)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)

  def loss(params, x, ids):
    out = nnx.merge(graph, params, rest)(x, Context(jnp.zeros_like(ids), ids, dense=dense))
    return jnp.sum(out.y) + sum(out.aux.values())

  def temporary(length):
    x = jax.ShapeDtypeStruct((1, length, D), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  sizes = [temporary(length) for length in (8192, 16384, 32768)]
  for short, long in zip(sizes, sizes[1:], strict=False):
    assert long <= 2.1 * short


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("name", ["window_linear", "simplicial"])
def test_what_is_merged_is_computed_once(monkeypatch, name, platform):
  """A window whose lse is used is XLA's alone, which has lse from the same pass, and not a library's as well."""
  layer = make(name)
  monkeypatch.setattr(dispatch, "platform", lambda: platform)
  card = types.SimpleNamespace(compute_capability="9.0")
  monkeypatch.setattr(jax, "local_devices", lambda: [card])
  for library in (splash, cudnn):
    monkeypatch.setattr(library, "forward", lambda *args: pytest.fail("a library's kernel"))
  x = jax.ShapeDtypeStruct((1, T, D), jnp.bfloat16)
  jax.eval_shape(lambda x: layer(x, context(0, T, 1)).y, x)
