"""The sparse mixers' references (attnlab/mixers/references.py says what one is)."""

import functools

import numpy as np

from attnlab.mixers.references import (
  array,
  attend,
  attention,
  heads,
  latent_heads,
  leave,
  linear,
  project,
  qkv,
  rms,
  rotate,
  rotated,
  sigmoid,
  sinks,
  softmax,
)


def best(scores, k):
  """The k blocks of the largest scores {block: score}; of equal ones the lower."""
  return sorted(sorted(scores, key=lambda j: (-scores[j], j))[:k])


def tokens_of(blocks, size, t):
  """The tokens of some blocks, up to t."""
  return [s for j in blocks for s in range(j * size, (j + 1) * size) if s <= t]


def group_of(layer, g):
  """The query heads of a key head."""
  return range(g * (layer.H // layer.Hkv), (g + 1) * (layer.H // layer.Hkv))


def with_forced(scores, now, config):
  """The best blocks, and besides them the first and the last ones."""
  forced = {j for j in range(now + 1) if j < config.initial or j > now - config.local}
  free = {j: s for j, s in scores.items() if j not in forced}
  return sorted(forced | set(best(free, config.top_k - config.initial - config.local)))


def divergence(p, scores):
  """KL(p || softmax(scores))."""
  return np.sum(p * (np.log(p) - np.log(softmax(scores))))


def overlap(chosen, top):
  """How many of the best were chosen, of one."""
  return len(set(chosen) & set(top)) / len(top) if top else 1.0


def measured(T, dense):
  """The queries whose recall is measured: all, or 16 that are evenly spaced."""
  return range(T) if dense or T <= 16 else [(i + 1) * T // 16 - 1 for i in range(16)]


def moba(layer, x, dense=False):
  """arXiv:2502.13189, equations 2, 3, 5 and 6: by each head, its own block always."""
  c, (q, k, _) = layer.config, qkv(layer, x)

  def seen(t, h):
    g, now = h // (layer.H // layer.Hkv), t // c.block_size
    means = {j: k[j * c.block_size : (j + 1) * c.block_size, g].mean(axis=0) for j in range(now)}
    chosen = best({j: q[t, h] @ mean for j, mean in means.items()}, c.top_k - 1) + [now]
    return tokens_of(chosen, c.block_size, t)

  return attend(layer, x, seen), {}


def infllm2(layer, x, dense=False):
  """arXiv:2509.24663, section 3.2: the largest of a block's pools' summed weights; first and last blocks always."""
  c, (q, k, _) = layer.config, qkv(layer, x)

  @functools.cache
  def chosen(t, g):
    now = t // c.block_size
    pools = [i for i in range(len(x)) if i * c.pool_stride + c.pool_size <= t + 1]
    span = lambda i: (i * c.pool_stride, i * c.pool_stride + c.pool_size)  # noqa: E731
    means = [k[slice(*span(i)), g].mean(axis=0) for i in pools]
    weight = np.zeros(len(pools))
    for h in group_of(layer, g):
      if pools:
        weight += softmax([q[t, h] @ m / np.sqrt(layer.K) for m in means])
    scores = {}
    for j in range(now + 1):
      first, end = j * c.block_size, (j + 1) * c.block_size
      reach = [
        w for i, w in zip(pools, weight, strict=True) if span(i)[0] < end and span(i)[1] > first
      ]
      scores[j] = max(reach, default=0.0)
    return tokens_of(with_forced(scores, now, c), c.block_size, t)

  return attend(layer, x, lambda t, h: chosen(t, h // (layer.H // layer.Hkv))), {}


def three_branches(layer, x, q_pool, pools, q, selected, near, size, stride):
  """arXiv:2502.11089, equations 5 to 12. ``pools``: i -> the summary's key and value, of all key heads."""
  c, T, K = layer.config, len(x), layer.K
  up = (
    linear(layer.branch_up, x) if hasattr(layer, "branch_up") else None
  )  # the paper's MLP; fla has none
  gates = sigmoid(project(layer, "branch_proj", x if up is None else up * sigmoid(up), layer.H))
  o = np.zeros_like(q)
  for t, g in np.ndindex(T, layer.Hkv):
    now = t // c.block_size
    seen = [i for i in range(T) if i * stride + size <= t + 1]
    keys, values = ([pools(i)[n][g] for i in seen] for n in (0, 1))
    p = np.zeros(T * 2)  # of pool i
    for h in group_of(layer, g):
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
    blocks = tokens_of(with_forced(scores, now, c), c.block_size, t)
    last = range(max(0, t - c.window + 1), t + 1)
    for h in group_of(layer, g):
      branches = (
        attention(q_pool[t, h], keys, values),
        attention(q[t, h], selected[0][blocks, g], selected[1][blocks, g]),
        attention(q[t, h], near[0][last, g], near[1][last, g]),
      )
      o[t, h] = gates[t, h] @ np.stack(branches)
  return leave(layer, o, x), {}


def nsa(layer, x, dense=False):
  """Keys and values of each branch, pools through an MLP of their tokens and places."""
  c, (q, k, v), Hkv = layer.config, qkv(layer, x), layer.Hkv
  k_near = heads(layer, "k_near_proj", x, Hkv, "k_norm")
  k_pool = heads(layer, "k_pool_proj", x, Hkv, "k_norm", rope=False)
  v_near, v_pool = (project(layer, f"{n}_proj", x, Hkv) for n in ("v_near", "v_pool"))

  def summary(mlp, y, i):
    places, up, down = (array(getattr(mlp, n)) for n in ("places", "up", "down"))
    out = []
    for g in range(Hkv):
      z = (y[i * c.pool_stride : i * c.pool_stride + c.pool_size, g] + places).ravel() @ up
      out.append((z * sigmoid(z)) @ down)
    return out

  @functools.cache
  def pools(i):
    return summary(layer.k_mlp, k_pool, i), summary(layer.v_mlp, v_pool, i)

  plain = heads(layer, "q_proj", x, layer.H, "q_norm", rope=False)
  sizes = c.pool_size, c.pool_stride
  return three_branches(layer, x, plain, pools, q, (k, v), (k_near, v_near), *sizes)


def nsa_fla(layer, x, dense=False):
  """One set of keys and values; a pool is the mean of a block."""
  (q, k, v), size = qkv(layer, x), layer.config.block_size

  @functools.cache
  def pools(i):
    block = slice(i * size, (i + 1) * size)
    return k[block].mean(axis=0), v[block].mean(axis=0)

  return three_branches(layer, x, q, pools, q, (k, v), (k, v), size, size)


def longformer(layer, x, dense=False):
  """arXiv:2004.05150, section 3.1, made causal."""
  c = layer.config

  def seen(t, h):
    near = {t - i * c.dilation for i in range(c.window)}
    return sorted(s for s in near | set(range(c.initial)) if 0 <= s <= t)

  return attend(layer, x, seen), {}


def bigbird(layer, x, dense=False):
  """arXiv:2007.14062, section 2, made causal; the random blocks by the hash written out."""
  c = layer.config

  def noise(a, b):
    y = (a * 0x9E3779B1 + b + int(layer.layer[...]) * 0x85EBCA77) % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
      y = (y ^ (y >> shift)) * factor % 2**32
    return y >> 8

  def seen(t, h):
    now = t // c.block_size
    forced = {j for j in range(now + 1) if j < c.initial or j > now - c.local}
    free = {j: noise(now, j) for j in range(now + 1) if j not in forced}
    return tokens_of(sorted(forced | set(best(free, c.random))), c.block_size, t)

  return attend(layer, x, seen), {}


def minimax_m3(layer, x, dense=False):
  """arXiv:2606.13392: a block's score is the largest product of the group's index query with its keys; the query's own
  block always.

  The indexer's loss is on the tokens it chose, or on all; its recall, how many of the blocks with the largest weight in
  full attention its choice has.
  """
  c, (q, k, v), T, K, sink = layer.config, qkv(layer, x), len(x), layer.K, sinks(layer)
  index_q, index_k = (
    rotated(
      rms(project(layer, f"index_{n}_proj", x, h), getattr(layer, f"index_{n}_norm")),
      c.rope_theta,
      c.rope_fraction,
      c.rope_scaling,
    )
    for n, h in (("q", layer.Hkv), ("k", 1))
  )
  o, loss, found = np.zeros_like(q), 0.0, []
  for t, g in np.ndindex(T, layer.Hkv):
    now = t // c.block_size
    score = index_k[:, 0] @ index_q[t, g] / np.sqrt(c.index_dim)
    largest = {j: score[tokens_of([j], c.block_size, t)].max() for j in range(now)}
    chosen = range(now + 1) if dense else best(largest, c.top_k - 1) + [now]
    seen, group = tokens_of(chosen, c.block_size, t), group_of(layer, g)
    for h in group:
      o[t, h] = attention(q[t, h], k[seen, g], v[seen, g], sink[h])
    p = np.mean([softmax(k[seen, g] @ q[t, h] / np.sqrt(K)) for h in group], axis=0)
    loss += c.index_weight * divergence(p, score[seen]) / (T * layer.Hkv)
    p = np.mean([softmax(k[: t + 1, g] @ q[t, h] / np.sqrt(K)) for h in group], axis=0)
    weight = {j: p[tokens_of([j], c.block_size, t)].sum() for j in range(now)}
    if t in measured(T, dense):
      found.append(overlap(best(largest, c.top_k - 1), best(weight, c.top_k - 1)))
  return leave(layer, o, x), {"indexer_loss": loss, "indexer_recall": np.mean(found)}


def dsa(layer, x, dense=False):
  """arXiv:2512.02556, equations 1 to 4, with the keys and values of each head written out; pools as in GLM-5-Next."""
  c, i, T, H = layer.config, layer.indexer, len(x), layer.H
  q, k, v, q_input = latent_heads(layer, x)
  fraction = c.index_rope_dim / c.index_dim
  index_q = linear(i.q_proj, q_input).reshape(T, c.index_heads, c.index_dim)
  index_q = rotated(index_q, c.rope_theta, fraction, c.rope_scaling)
  w = linear(i.w_proj, x) * (c.index_heads * c.index_dim) ** -0.5
  y = linear(i.k_proj, x)
  y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + i.k_norm.eps)
  y = y * array(i.k_norm.scale) + array(i.k_norm.bias)
  index_k = rotated(y, c.rope_theta, fraction, c.rope_scaling)
  P, keys = c.pool, []
  for j in range(T // P):
    pool = slice(j * P, (j + 1) * P)
    if P == 1:
      keys.append(index_k[j])
    else:
      u = linear(i.gate_proj, x)[pool] + array(i.places)
      gate = np.exp(u) / np.exp(u).sum(axis=0)
      keys.append((gate * index_k[pool]).sum(axis=0))
  o, loss, found = np.zeros((T, H, c.value_dim)), 0.0, []
  for t in range(T):
    full = (t + 1) // P
    score = {j: w[t] @ np.maximum(index_q[t] @ keys[j], 0) for j in range(full)}
    chosen = best(score, c.top_k // P)
    rest = [s for s in range(full * P, t + 1)]
    seen = list(range(t + 1)) if dense else tokens_of(chosen, P, t) + rest
    p, scale = np.zeros((H, t + 1)), (c.nope_dim + c.rope_dim) ** -0.5
    for h in range(H):
      p[h, seen] = softmax(k[seen, h] @ q[t, h] * scale)
      o[t, h] = p[h, seen] @ v[seen, h]
    full_p = np.mean([softmax(k[: t + 1, h] @ q[t, h] * scale) for h in range(H)], axis=0)
    pools = {j: p.mean(axis=0)[j * P : (j + 1) * P].sum() for j in range(full)}
    taught = list(range(full)) if dense else chosen
    if taught:
      target = np.array([pools[j] for j in taught])
      loss += c.index_weight * divergence(target / target.sum(), [score[j] for j in taught]) / T
    heaviest = best({j: full_p[j * P : (j + 1) * P].sum() for j in range(full)}, c.top_k // P)
    if t in measured(T, dense):
      found.append(overlap(chosen, heaviest))
  scalars = {"indexer_loss": loss, "indexer_recall": np.mean(found)}
  return leave(layer, o, x), scalars


def rope_last(x, position, n, theta):
  return np.concatenate([x[..., :-n], rotate(x[..., -n:], position, theta)], axis=-1) if n else x


def entry(layer, make, x, w):
  """Entry w of DeepSeek-V4's compressors: by channel a softmax over the window's slots, and those before."""
  m, d, theta = make.m, make.channels, layer.config.rope_theta
  places, slots = array(make.places), range(w * m, (w + 1) * m)
  c = linear(make.kv_proj, x)
  z = linear(make.gate_proj, x) + places[np.arange(len(x)) % m]
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
  c, theta, T, H, K = layer.config, layer.config.rope_theta, len(x), layer.H, layer.K
  latent = rms(linear(layer.q_down, x), layer.q_norm)
  q = linear(layer.q_up, latent).reshape(T, H, K)
  q = q / np.sqrt(np.mean(q * q, axis=-1, keepdims=True) + layer.head_norm.eps)
  k = rms(linear(layer.kv_proj, x), layer.kv_norm)
  q = np.stack([rope_last(y, t, c.rope_dim, theta) for t, y in enumerate(q)])
  k = np.stack([rope_last(y, t, c.rope_dim, theta) for t, y in enumerate(k)])
  entries = [entry(layer, layer.compressor, x, w) for w in range(T // c.compress)]
  sink, indexed = array(layer.sink), hasattr(layer, "index_q")
  if indexed:
    n = c.index_rope_dim
    index_k = [entry(layer, layer.index_compressor, x, w) for w in range(T // c.compress)]
    index_q = linear(layer.index_q, latent).reshape(T, c.index_heads, -1)
    index_q = np.stack([rope_last(y, t, n, theta) for t, y in enumerate(index_q)])
    weight = linear(layer.index_w, x) * c.index_heads**-0.5
  o, loss, found = np.zeros((T, H, K)), 0.0, []

  def weights_of(keys, t):
    return np.array([softmax([*(keys @ q[t, h] / np.sqrt(K)), sink[h]])[:-1] for h in range(H)])

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
      terms = divergence(target / target.sum(), [scores[w] for w in closed])
      loss += c.index_weight * terms / T
    if indexed and t in measured(T, dense):
      full = weights_of(np.array(near + [entries[w] for w in every]), t).mean(axis=0)
      heaviest = best({w: full[len(near) + w] for w in every}, c.top_k)
      found.append(overlap(best(scores, c.top_k), heaviest))
  o = np.einsum("tgi,gir->tgr", o.reshape(T, c.out_groups, -1), array(layer.group_proj))
  y = linear(layer.out_proj, o.reshape(T, -1))
  return y, {"indexer_loss": loss, "indexer_recall": np.mean(found)} if indexed else {}
