"""The sparse mixers against their papers' equations, written out token by token in numpy, in float64.

What every mixer must do is in test_mixers.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import jit

from attnlab.errors import UserError
from attnlab.mixers import Context, Layer, configure, mixer, mixers

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
# Settings under which nothing is left out.
EVERYTHING = dict(top_k=64, window=64, dilation=1, random=64)
SPARSE = sorted(name for name, cls in mixers().items() if cls.family == "sparse")
SEGMENTS = np.array([[1] * 11 + [2] * 16, [1] * 27])


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


@functools.cache
def alone(name):
  """A layer, tokens, and its output for them."""
  layer, x = make(name), tokens()
  return layer, x, whole(layer, x)


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


def longformer(layer, x):
  """arXiv:2004.05150, section 3.1, made causal."""
  c, (q, k, v) = layer.config, qkv(layer, x)
  o = np.zeros((T, H, K))
  for t, h in np.ndindex(T, H):
    near = {t - i * c.dilation for i in range(c.window)}
    seen = sorted(s for s in near | set(range(c.initial)) if 0 <= s <= t)
    g = h // (H // HKV)
    o[t, h] = attention(q[t, h], k[seen, g], v[seen, g])
  return o


def bigbird(layer, x):
  """arXiv:2007.14062, section 2, made causal; the random blocks by the hash written out."""
  c, (q, k, v) = layer.config, qkv(layer, x)

  def noise(a, b):
    y = (a * 0x9E3779B1 + b + int(layer.layer[...]) * 0x85EBCA77) % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
      y = (y ^ (y >> shift)) * factor % 2**32
    return y >> 8

  o = np.zeros((T, H, K))
  for t, h in np.ndindex(T, H):
    now = t // c.block_size
    forced = {j for j in range(now + 1) if j < c.initial or j > now - c.local}
    free = {j: noise(now, j) for j in range(now + 1) if j not in forced}
    seen = tokens_of(sorted(forced | set(best(free, c.random))), c.block_size, t)
    g = h // (H // HKV)
    o[t, h] = attention(q[t, h], k[seen, g], v[seen, g])
  return o


def window_linear(layer, x):
  """arXiv:2410.10254: the window's weights and the features' products over one sum."""
  q, k, v = (project(layer, f"{n}_proj", x, H) for n in "qkv")
  q, k = rotated(q), rotated(k)
  gamma = np.exp(np.asarray(layer.log_gamma[...], np.float64))
  features = [np.asarray(f[...], np.float64) for f in (layer.q_features, layer.k_features)]

  def phi(y, w):
    return softmax(np.concatenate([y @ w, -(y @ w)]))

  o = np.zeros((T, H, K))
  for t, h in np.ndindex(T, H):
    weight = np.zeros(t + 1)
    for s in range(t + 1):
      if t - s < layer.config.window:
        weight[s] = gamma[h] * np.exp(q[t, h] @ k[s, h] / np.sqrt(K))
      else:
        weight[s] = phi(q[t, h], features[0][h]) @ phi(k[s, h], features[1][h])
    o[t, h] = weight @ v[: t + 1, h] / weight.sum()
  return o


def rms(x, norm):
  y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + norm.eps)
  return y * np.asarray(norm.scale[...], np.float64)


def divergence(p, scores):
  """KL(p || softmax(scores))."""
  return np.sum(p * (np.log(p) - np.log(softmax(scores))))


def overlap(chosen, top):
  """How many of the best were chosen, of one."""
  return len(set(chosen) & set(top)) / len(top) if top else 1.0


def measured(dense):
  """The queries whose recall is measured: all, or 16 that are evenly spaced."""
  return range(T) if dense else [(i + 1) * T // 16 - 1 for i in range(16)]


def minimax_m3(layer, x, dense=False):
  """A block's score is the largest product of the group's index query with its keys; its own block always.

  Returns also the indexer's loss: on the tokens it chose, or on all; and how many of the blocks with the largest weight
  in full attention its choice has.
  """
  c, (q, k, v) = layer.config, qkv(layer, x)
  index_q, index_k = (
    rotated(rms(project(layer, f"index_{n}_proj", x, h), getattr(layer, f"index_{n}_norm")))
    for n, h in (("q", HKV), ("k", 1))
  )
  o, loss, found = np.zeros((T, H, K)), 0.0, []
  for t, g in np.ndindex(T, HKV):
    now = t // c.block_size
    score = index_k[:, 0] @ index_q[t, g] / np.sqrt(c.index_dim)
    largest = {j: score[tokens_of([j], c.block_size, t)].max() for j in range(now)}
    chosen = range(now + 1) if dense else best(largest, c.top_k - 1) + [now]
    seen = tokens_of(chosen, c.block_size, t)
    group = range(g * (H // HKV), (g + 1) * (H // HKV))
    for h in group:
      o[t, h] = attention(q[t, h], k[seen, g], v[seen, g])
    p = np.mean([softmax(k[seen, g] @ q[t, h] / np.sqrt(K)) for h in group], axis=0)
    loss += divergence(p, score[seen]) / (T * HKV)
    p = np.mean([softmax(k[: t + 1, g] @ q[t, h] / np.sqrt(K)) for h in group], axis=0)
    weight = {j: p[tokens_of([j], c.block_size, t)].sum() for j in range(now)}
    if t in measured(dense):
      found.append(overlap(best(largest, c.top_k - 1), best(weight, c.top_k - 1)))
  return o, {"indexer_loss": loss, "indexer_recall": np.mean(found)}


def linear(layer, x):
  return x @ np.asarray(layer.kernel[...], np.float64)


def dsa(layer, x, dense=False):
  """arXiv:2512.02556, equations 1 to 4, with the keys and values of each head written out; pools as in GLM-5-Next."""
  c, i = layer.config, layer.indexer
  content = rms(linear(layer.kv_down, x), layer.kv_norm)
  q_input = rms(linear(layer.q_down, x), layer.q_norm)
  q = linear(layer.q_up, q_input).reshape(T, H, -1)
  k = linear(layer.k_up, content).reshape(T, H, -1)
  v = linear(layer.v_up, content).reshape(T, H, -1)
  if c.rope_dim:
    turn = lambda y, t: rotate(y, t, c.rope_theta)  # noqa: E731
    q_rope = np.stack([turn(q[t, :, c.nope_dim :], t) for t in range(T)])
    q = np.concatenate([q[..., : c.nope_dim], q_rope], axis=-1)
    k_rope = np.stack([turn(y, t) for t, y in enumerate(linear(layer.k_rope, x))])
    k = np.concatenate([k, np.repeat(k_rope[:, None], H, axis=1)], axis=-1)

  def with_rope(y, t):
    n = c.index_rope_dim
    return np.concatenate([rotate(y[..., :n], t, c.rope_theta), y[..., n:]], axis=-1) if n else y

  index_q = linear(i.q_proj, q_input).reshape(T, c.index_heads, c.index_dim)
  index_q = np.stack([with_rope(y, t) for t, y in enumerate(index_q)])
  w = linear(i.w_proj, x) * (c.index_heads * c.index_dim) ** -0.5
  y = linear(i.k_proj, x)
  y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + i.k_norm.eps)
  y = y * np.asarray(i.k_norm.scale[...], np.float64) + np.asarray(i.k_norm.bias[...], np.float64)
  index_k = np.stack([with_rope(z, t) for t, z in enumerate(y)])
  P, keys = c.pool, []
  for j in range(T // P):
    pool = slice(j * P, (j + 1) * P)
    if P == 1:
      keys.append(index_k[j])
    else:
      u = linear(i.gate_proj, x)[pool] + np.asarray(i.places[...], np.float64)
      gate = np.exp(u) / np.exp(u).sum(axis=0)
      keys.append((gate * index_k[pool]).sum(axis=0))
  o, loss, found = np.zeros((T, H, c.value_dim)), 0.0, []
  for t in range(T):
    full = (t + 1) // P
    score = {j: w[t] @ np.maximum(index_q[t] @ keys[j], 0) for j in range(full)}
    chosen = best(score, c.top_k // P)
    rest = [s for s in range(full * P, t + 1)]
    seen = list(range(t + 1)) if dense else tokens_of(chosen, P, t) + rest
    p = np.zeros((H, t + 1))
    for h in range(H):
      p[h, seen] = softmax(k[seen, h] @ q[t, h] * layer.scale)
      o[t, h] = p[h, seen] @ v[seen, h]
    full_p = np.mean([softmax(k[: t + 1, h] @ q[t, h] * layer.scale) for h in range(H)], axis=0)
    pools = {j: p.mean(axis=0)[j * P : (j + 1) * P].sum() for j in range(full)}
    taught = list(range(full)) if dense else chosen
    if taught:
      target = np.array([pools[j] for j in taught])
      loss += divergence(target / target.sum(), [score[j] for j in taught]) / T
    heaviest = best({j: full_p[j * P : (j + 1) * P].sum() for j in range(full)}, c.top_k // P)
    if t in measured(dense):
      found.append(overlap(chosen, heaviest))
  return o, {"indexer_loss": loss, "indexer_recall": np.mean(found)}


def rope_last(x, position, n, theta):
  return np.concatenate([x[..., :-n], rotate(x[..., -n:], position, theta)], axis=-1)


def entry(layer, make, x, w):
  """Entry w of mechanisms.md's formulas: by channel a softmax over the window's slots, and those before."""
  m, d, theta = make.m, make.channels, layer.config.rope_theta
  places = np.asarray(make.places[...], np.float64)
  c, slots = linear(make.kv_proj, x), range(w * m, (w + 1) * m)
  z = linear(make.gate_proj, x) + places[np.arange(T) % m]
  last = slice(d, None) if make.overlap else slice(None)
  values, gates = [c[j, last] for j in slots], [z[j, last] for j in slots]
  if make.overlap and w:
    values += [c[j - m, :d] for j in slots]
    gates += [z[j - m, :d] for j in slots]
  gates = np.exp(gates)
  y = rms(np.sum(gates / gates.sum(axis=0) * values, axis=0), make.norm)
  return rope_last(y, w * m, make.rope_dim, theta)


def deepseek_v4(layer, x, dense=False):
  """The window and the entries, all or the best by the indexer, in one softmax with a sink."""
  c, theta = layer.config, layer.config.rope_theta
  latent = rms(linear(layer.q_down, x), layer.q_norm)
  q = linear(layer.q_up, latent).reshape(T, H, K)
  q = q / np.sqrt(np.mean(q * q, axis=-1, keepdims=True) + layer.head_norm.eps)
  k = rms(linear(layer.kv_proj, x), layer.kv_norm)
  q = np.stack([rope_last(y, t, c.rope_dim, theta) for t, y in enumerate(q)])
  k = np.stack([rope_last(y, t, c.rope_dim, theta) for t, y in enumerate(k)])
  entries = [entry(layer, layer.compressor, x, w) for w in range(T // c.compress)]
  sinks, indexed = np.asarray(layer.sink[...], np.float64), hasattr(layer, "index_q")
  if indexed:
    n = c.index_rope_dim
    index_k = [entry(layer, layer.index_compressor, x, w) for w in range(T // c.compress)]
    index_q = linear(layer.index_q, latent).reshape(T, c.index_heads, -1)
    index_q = np.stack([rope_last(y, t, n, theta) for t, y in enumerate(index_q)])
    weight = linear(layer.index_w, x) * c.index_heads**-0.5
  o, loss, found = np.zeros((T, H, K)), 0.0, []

  def weights_of(keys, t):
    return np.array([softmax([*(keys @ q[t, h] / np.sqrt(K)), sinks[h]])[:-1] for h in range(H)])

  for t in range(T):
    closed = every = list(range((t + 1) // c.compress))
    if indexed:
      dots = {w: np.maximum(index_q[t] @ index_k[w], 0) * c.index_dim**-0.5 for w in closed}
      scores = {w: weight[t] @ dot for w, dot in dots.items()}
      closed = closed if dense else best(scores, c.top_k)
    near = [k[s] for s in range(max(0, t - c.window + 1), t + 1)]
    keys = np.array(near + [entries[w] for w in closed])
    p = weights_of(keys, t)
    o[t] = [rope_last(y, -t, c.rope_dim, theta) for y in p @ keys]
    if indexed and closed:
      target = p.mean(axis=0)[len(keys) - len(closed) :]
      loss += divergence(target / target.sum(), [scores[w] for w in closed]) / T
    if indexed and t in measured(dense):
      full = weights_of(np.array(near + [entries[w] for w in every]), t).mean(axis=0)
      heaviest = best({w: full[len(near) + w] for w in every}, c.top_k)
      found.append(overlap(best(scores, c.top_k), heaviest))
  weights = np.asarray(layer.group_proj[...], np.float64)
  o = np.einsum("tgi,gir->tgr", o.reshape(T, c.out_groups, -1), weights)
  return (o, {"indexer_loss": loss, "indexer_recall": np.mean(found)}) if indexed else o


MIXERS = (moba, infllm2, nsa, nsa_fla, longformer, bigbird, window_linear, minimax_m3, dsa)
ORACLES = {f.__name__: f for f in MIXERS} | dict(hca=deepseek_v4, csa=deepseek_v4)


# One worker takes all of a mixer's: they share what is compiled.
NAMES = [pytest.param(n, marks=pytest.mark.xdist_group(f"sparse-{n}")) for n in ORACLES]


def test_every_sparse_mixer_has_an_oracle():
  assert set(SPARSE) <= set(ORACLES)


@pytest.mark.parametrize("name", NAMES)
def test_oracle(name):
  """The whole layer; float32 against float64, on sums of some dozens of terms."""
  layer, x, got = alone(name)
  want = ORACLES[name](layer, x[0].astype(np.float64))
  want = (want[0] if isinstance(want, tuple) else want).reshape(T, -1)
  want = want @ np.asarray(layer.out_proj.kernel[...], np.float64)
  np.testing.assert_allclose(got[0], want, rtol=2e-5, atol=2e-5)


POOLED = dict(pool=3, top_k=6, rope_dim=0, index_rope_dim=0)


@pytest.mark.parametrize(
  "name, settings", [("minimax_m3", {}), ("dsa", {}), ("dsa", POOLED), ("csa", {})]
)
@pytest.mark.parametrize("dense", [False, True])
def test_indexer_loss(name, settings, dense):
  """Its value against the oracle's; its gradient reaches the indexer and nothing else."""
  layer, x = make(name, **settings), tokens()
  y, want = ORACLES[name](layer, x[0].astype(np.float64), dense=dense)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)

  def loss(params, x):
    out = nnx.merge(graph, params, rest)(x, context(0, T, 1, dense=dense))
    return out.aux["indexer_loss"], (out.y, out.aux)

  (dparams, dx), (got, aux) = jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
  want_y = y.reshape(T, -1) @ np.asarray(layer.out_proj.kernel[...], np.float64)
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


@pytest.mark.parametrize("name", NAMES)
def test_blocks_across_steps(name):
  """Pieces that end anywhere in blocks and pools, shorter and longer than they are, and single tokens."""
  layer, x, want = alone(name)
  got = read(layer, x, [7, 1, 1, 7, 1, 1, 7, 1, 1])
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


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

    return jax.tree.leaves(jit(jax.grad(loss, (0, 1), has_aux=True))(params, x))

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
  given = jit(lambda layer, x: layer(x, context(0, T, 1)).shared)(gives, x)
  ctx = context(0, T, 1)
  run = lambda layer, x, shared: layer(x, Context(ctx.positions, shared=shared)).y  # noqa: E731
  want = alone("dsa")[2]
  np.testing.assert_allclose(jit(run)(takes, x, given), want, rtol=1e-6, atol=1e-6)
  nothing = jax.tree.map(jnp.zeros_like, given)
  assert not np.any(jit(run)(takes, x, nothing))


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
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
    compiled = jit(jax.grad(loss, (0, 1))).lower(params, x, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  sizes = [temporary(length) for length in (8192, 16384, 32768)]
  for short, long in zip(sizes, sizes[1:], strict=False):
    assert long <= 2.1 * short
