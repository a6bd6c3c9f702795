"""The sparse mixers against their papers' equations, written out token by token in numpy, in float64.

What every mixer must do is in test_mixers.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.errors import UserError
from attnlab.mixers import Context, Layer, configure, mixer, mixers

D, H, HKV, K, T = 32, 4, 2, 8, 27
SIZES = dict(num_heads=H, num_kv_heads=HKV, head_dim=K, rope_theta=100.0)
# With these a query late in the sequence chooses one or two blocks of six or seven, besides forced ones.
CASES = {
  "moba": dict(block_size=4, top_k=3),
  "infllm2": dict(block_size=4, top_k=4, pool_size=4, pool_stride=2, initial=1, local=1),
  "nsa": dict(block_size=4, top_k=4, pool_size=4, pool_stride=2, initial=1, local=2, window=5),
  "nsa_fla": dict(block_size=4, top_k=4, initial=1, local=1, window=5),
}
# Settings under which nothing is left out.
EVERYTHING = dict(top_k=64)
SPARSE = sorted(name for name, cls in mixers().items() if cls.family == "sparse")
SEGMENTS = np.array([[1] * 11 + [2] * 16, [1] * 27])

# Compiled code is used once: most of XLA's time on a CPU is LLVM's optimisations.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)


def make(name, **settings):
  """A layer whose every parameter has been moved away from its initial value."""
  cls = mixer(name)
  fields = set(cls.Config.__dataclass_fields__)
  sizes = {k: v for k, v in SIZES.items() if k in fields}
  layer = cls(configure(cls, sizes | CASES[name] | settings), Layer(D), jax.random.key(0))
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
  return np.asarray(jit(run)(layer, x))


# What the oracles share: projections, RoPE and one query's softmax, in float64.


def project(layer, name, x, heads):
  y = x @ np.asarray(getattr(layer, name).kernel[...], np.float64)
  return y.reshape(len(x), heads, -1)


def rotate(x, position, theta=SIZES["rope_theta"]):
  """RoPE of [heads, K] at a position; halves are paired."""
  half = x.shape[-1] // 2
  angle = position * theta ** (-np.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  return np.concatenate(
    [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
  )


def rotated(x):
  return np.stack([rotate(y, t) for t, y in enumerate(x)])


def softmax(logits):
  p = np.exp(np.asarray(logits) - np.max(logits))
  return p / p.sum()


def attention(q, keys, values):
  """Of one query; nothing gives zero."""
  if not len(keys):
    return np.zeros(np.shape(values)[-1] if len(values) else K)
  return softmax([q @ k / np.sqrt(len(q)) for k in keys]) @ np.asarray(values)


def best(scores, k):
  """The k blocks of the largest scores {block: score}; of equal ones the lower."""
  return sorted(sorted(scores, key=lambda j: (-scores[j], j))[:k])


def tokens_of(blocks, size, t):
  """The tokens of some blocks, up to t."""
  return [s for j in blocks for s in range(j * size, (j + 1) * size) if s <= t]


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def qkv(layer, x):
  q, k, v = (project(layer, f"{n}_proj", x, h) for n, h in (("q", H), ("k", HKV), ("v", HKV)))
  return rotated(q), rotated(k), v


def moba(layer, x):
  """arXiv:2502.13189, equations 2, 3, 5 and 6: by each head, its own block always."""
  c, (q, k, v) = layer.config, qkv(layer, x)
  o = np.zeros((T, H, K))
  for t, h in np.ndindex(T, H):
    g, now = h // (H // HKV), t // c.block_size
    means = {j: k[j * c.block_size : (j + 1) * c.block_size, g].mean(axis=0) for j in range(now)}
    chosen = best({j: q[t, h] @ mean for j, mean in means.items()}, c.top_k - 1) + [now]
    seen = tokens_of(chosen, c.block_size, t)
    o[t, h] = attention(q[t, h], k[seen, g], v[seen, g])
  return o


def infllm2(layer, x):
  """arXiv:2509.24663, section 3.2: the largest of a block's pools' summed weights; first and last blocks always."""
  c, (q, k, v) = layer.config, qkv(layer, x)
  o = np.zeros((T, H, K))
  for t, g in np.ndindex(T, HKV):
    now, group = t // c.block_size, range(g * (H // HKV), (g + 1) * (H // HKV))
    pools = [i for i in range(T) if i * c.pool_stride + c.pool_size <= t + 1]
    span = lambda i: (i * c.pool_stride, i * c.pool_stride + c.pool_size)  # noqa: E731
    means = [k[slice(*span(i)), g].mean(axis=0) for i in pools]
    weight = np.zeros(len(pools))
    for h in group:
      if pools:
        weight += softmax([q[t, h] @ m / np.sqrt(K) for m in means])
    scores = {}
    for j in range(now + 1):
      first, end = j * c.block_size, (j + 1) * c.block_size
      reach = [
        w for i, w in zip(pools, weight, strict=True) if span(i)[0] < end and span(i)[1] > first
      ]
      scores[j] = max(reach, default=0.0)
    forced = {j for j in range(now + 1) if j < c.initial or j > now - c.local}
    free = {j: s for j, s in scores.items() if j not in forced}
    chosen = sorted(forced | set(best(free, c.top_k - c.initial - c.local)))
    seen = tokens_of(chosen, c.block_size, t)
    for h in group:
      o[t, h] = attention(q[t, h], k[seen, g], v[seen, g])
  return o


def three_branches(layer, x, q_pool, pools, q, selected, near, size, stride):
  """arXiv:2502.11089, equations 5 to 12. ``pools``: i -> the summary's key and value, of all key heads."""
  c = layer.config
  gates = sigmoid(project(layer, "branch_proj", x, H))
  o = np.zeros((T, H, K))
  for t, g in np.ndindex(T, HKV):
    now, group = t // c.block_size, range(g * (H // HKV), (g + 1) * (H // HKV))
    seen = [i for i in range(T) if i * stride + size <= t + 1]
    keys, values = ([pools(i)[n][g] for i in seen] for n in (0, 1))
    p = np.zeros(T * 2)  # of pool i
    for h in group:
      if seen:
        p[seen] += softmax([q_pool[t, h] @ k / np.sqrt(K) for k in keys])
    scores = {}
    for j in range(now + 1):  # equation 9, whose blocks and pools are counted from 1
      terms = [
        (c.block_size // stride) * (j + 1) - m - n - 1
        for m in range(c.block_size // stride)
        for n in range(size // stride)
      ]
      scores[j] = sum(p[i] for i in terms if i >= 0)
    forced = {j for j in range(now + 1) if j < c.initial or j > now - c.local}
    free = {j: s for j, s in scores.items() if j not in forced}
    chosen = sorted(forced | set(best(free, c.top_k - c.initial - c.local)))
    blocks = tokens_of(chosen, c.block_size, t)
    last = range(max(0, t - c.window + 1), t + 1)
    for h in group:
      branches = (
        attention(q_pool[t, h], keys, values),
        attention(q[t, h], selected[0][blocks, g], selected[1][blocks, g]),
        attention(q[t, h], near[0][last, g], near[1][last, g]),
      )
      o[t, h] = gates[t, h] @ np.stack(branches)
  return o


def nsa(layer, x):
  """Keys and values of each branch, pools through an MLP of their tokens and places."""
  c, (q, k, v) = layer.config, qkv(layer, x)
  k_near, v_near, k_pool, v_pool = (
    project(layer, f"{n}_proj", x, HKV) for n in ("k_near", "v_near", "k_pool", "v_pool")
  )

  def summary(mlp, y, i):
    places, up, down = (
      np.asarray(getattr(mlp, n)[...], np.float64) for n in ("places", "up", "down")
    )
    out = []
    for g in range(HKV):
      z = (y[i * c.pool_stride : i * c.pool_stride + c.pool_size, g] + places).ravel() @ up
      out.append((z * sigmoid(z)) @ down)
    return out

  @functools.cache
  def pools(i):
    return summary(layer.k_mlp, k_pool, i), summary(layer.v_mlp, v_pool, i)

  plain = project(layer, "q_proj", x, H)
  near = rotated(k_near), v_near
  return three_branches(layer, x, plain, pools, q, (k, v), near, c.pool_size, c.pool_stride)


def nsa_fla(layer, x):
  """One set of keys and values; a pool is the mean of a block."""
  (q, k, v), size = qkv(layer, x), layer.config.block_size

  @functools.cache
  def pools(i):
    block = slice(i * size, (i + 1) * size)
    return k[block].mean(axis=0), v[block].mean(axis=0)

  return three_branches(layer, x, q, pools, q, (k, v), (k, v), size, size)


ORACLES = {f.__name__: f for f in (moba, infllm2, nsa, nsa_fla)}


@pytest.mark.parametrize("name", SPARSE)
def test_oracle(name):
  """The whole layer; float32 against float64, on sums of some dozens of terms."""
  layer, x = make(name), tokens()
  want = ORACLES[name](layer, x[0].astype(np.float64)).reshape(T, -1)
  want = want @ np.asarray(layer.out_proj.kernel[...], np.float64)
  np.testing.assert_allclose(whole(layer, x)[0], want, rtol=2e-5, atol=2e-5)


def read(layer, x, pieces, ids=None, max_len=T + 3):
  """Outputs of x in pieces, from an empty cache."""
  step = jit(lambda layer, x, ctx, cache: layer(x, ctx, cache))
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


@pytest.mark.parametrize("name", SPARSE)
def test_blocks_across_steps(name):
  """Pieces that end anywhere in blocks and pools, shorter and longer than they are, and single tokens."""
  layer, x = make(name), tokens()
  got = read(layer, x, [7, 1, 1, 7, 1, 1, 7, 1, 1])
  np.testing.assert_allclose(got, whole(layer, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SPARSE)
def test_padding_moves_blocks(name):
  """A prompt with padding on the left has the blocks that it has without."""
  layer, x = make(name), tokens()
  padded = np.concatenate([tokens(seed=2)[:, :3], x[:, :-3]], axis=1)
  ids = (np.arange(T) >= 3).astype(np.int32)[None]
  got = read(layer, padded, [9, 9, 9], ids)[:, 3:]
  np.testing.assert_allclose(got, whole(layer, x)[:, :-3], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SPARSE)
def test_everything_is_full_attention(name):
  """Where every block is chosen: outputs, and the gradients of x and of every parameter (float32 sums: 1e-5)."""
  layer, x = make(name, **EVERYTHING), tokens(2)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  cotangent = tokens(2, seed=3)

  def run(dense):
    def loss(params, x):
      ctx = context(0, T, 2, SEGMENTS, dense)
      y = nnx.merge(graph, params, rest)(x, ctx).y
      return jnp.sum(y * cotangent), y

    return jax.tree.leaves(jit(jax.grad(loss, (0, 1), has_aux=True))(params, x))

  for got, want in zip(run(False), run(True), strict=True):
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ["moba", "infllm2"])
def test_dense_is_softmax_attention(name):
  """Of the same parameters."""
  layer, full, x = make(name), make_softmax(), tokens()
  params = {k: v for k, v in vars(layer).items() if k.endswith("_proj") and v is not None}
  for key, value in params.items():
    setattr(full, key, value)
  np.testing.assert_array_equal(whole(layer, x, dense=True), whole(full, x))
  assert np.abs(whole(layer, x) - whole(full, x)).max() > 1e-3


def make_softmax():
  cls = mixer("softmax")
  return cls(configure(cls, SIZES), Layer(D), jax.random.key(0))


@pytest.mark.parametrize(
  "name, settings",
  [
    ("nsa", dict(pool_stride=3)),
    ("nsa", dict(pool_size=3)),
    ("infllm2", dict(block_size=5)),
    ("infllm2", dict(top_k=1)),
  ],
)
def test_sizes_that_do_not_fit(name, settings):
  with pytest.raises(UserError, match=next(iter(settings))):
    make(name, **settings)
