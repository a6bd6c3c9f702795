"""What mixers that are no recurrence are held to: their papers' equations for one document, token by token in numpy.

A reference takes a layer, for its sizes and parameters, and float64 tokens [T, D]. It gives the layer's output [T, D]
and the scalars of ``MixerOutput.aux``, and shares no code with the layer: what it needs besides is here. A mixer names
its own as ``reference``, which may as well be a method in its file. Those of recurrences are in linear_references.py.
"""

import numpy as np


def array(parameter) -> np.ndarray:
  return np.asarray(parameter[...], np.float64)


def linear(layer, x):
  return x @ array(layer.kernel)


def project(layer, name, x, heads):
  """[T, heads, channels]."""
  return linear(getattr(layer, name), x).reshape(len(x), heads, -1)


def rms(x, norm):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + norm.eps) * array(norm.scale)


def frequency(pair, size, theta, scaling=None):
  """Radians a token of a pair of ``size`` channels: arXiv:2104.09864, changed as in arXiv:2407.21783 or 2309.00071."""
  plain = theta ** (-2 * pair / size)
  if scaling is None:
    return plain
  kind, factor, length, low, high = scaling
  if kind == "llama3":
    turns = length * plain / (2 * np.pi)
    if turns < low:
      return plain / factor
    if turns > high:
      return plain
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * plain / factor + smooth * plain
  # YaRN's ramp is over the numbers of pairs, from the whole one before that of ``high`` turns to that behind ``low``'s.
  number = [
    size * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta)) for turns in (high, low)
  ]
  first, last = max(np.floor(number[0]), 0), min(np.ceil(number[1]), size - 1)
  ramp = min(max((pair - first) / (last - first), 0), 1)
  return ramp * plain / factor + (1 - ramp) * plain


def rotate(x, position, theta, fraction=1.0, scaling=None):
  """RoPE (arXiv:2104.09864) of the first channels of [..., K] at a position; halves are paired."""
  size = int(x.shape[-1] * fraction) // 2 * 2
  angle = position * np.array([frequency(i, size, theta, scaling) for i in range(size // 2)])
  a, b, rest = np.split(x, [size // 2, size], axis=-1)
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def rotated(x, theta, fraction=1.0, scaling=None):
  """Of [T, ...], each token at its position."""
  return np.stack([rotate(y, t, theta, fraction, scaling) for t, y in enumerate(x)])


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(logits):
  p = np.exp(np.asarray(logits) - np.max(logits))
  return p / p.sum()


def attention(q, keys, values, sink=None):
  """Of one query; nothing gives zero. A sink is one more logit, whose value is zero."""
  if not len(keys):
    return np.zeros(len(q))
  logits = [q @ k / np.sqrt(len(q)) for k in keys]
  p = softmax(logits if sink is None else [*logits, sink])[: len(keys)]
  return p @ np.asarray(values)


def heads(layer, name, x, count, norm=None, rope=True):
  """A projection with what softmax attention's settings add: the norm of heads, then RoPE."""
  c, y = layer.config, project(layer, name, x, count)
  if c.qk_norm and norm is not None:
    y = rms(y, getattr(layer, norm))
  return rotated(y, c.rope_theta, c.rope_fraction, c.rope_scaling) if rope else y


def qkv(layer, x):
  """q [T, H, K], and k and v [T, Hkv, K]."""
  return (
    heads(layer, "q_proj", x, layer.H, "q_norm"),
    heads(layer, "k_proj", x, layer.Hkv, "k_norm"),
    project(layer, "v_proj", x, layer.Hkv),
  )


def sinks(layer):
  """A logit for each head, or none."""
  return [None] * layer.H if layer.sinks is None else array(layer.sinks)


def leave(layer, o, x):
  """The output gate of softmax attention (arXiv:2505.06708), and the last projection."""
  if getattr(layer, "gate_proj", None) is not None:
    o = o * sigmoid(project(layer, "gate_proj", x, layer.H))
  return linear(layer.out_proj, o.reshape(len(x), -1))


def attend(layer, x, seen):
  """Each head over what ``seen(t, head)`` says, with the keys of its group."""
  (q, k, v), sink, groups = qkv(layer, x), sinks(layer), layer.H // layer.Hkv
  o = np.zeros_like(q)
  for t, h in np.ndindex(*q.shape[:2]):
    tokens = list(seen(t, h))
    o[t, h] = attention(q[t, h], k[tokens, h // groups], v[tokens, h // groups], sink[h])
  return leave(layer, o, x)


def softmax_attention(layer, x, dense=False):
  """arXiv:1706.03762, section 3.2: softmax(q k^T / sqrt(K)) v over the tokens up to the query's own."""
  return attend(layer, x, lambda t, h: range(t + 1)), {}


def sliding_window(layer, x, dense=False):
  """arXiv:2004.05150, section 3.1: over the last ``window`` tokens."""
  return attend(layer, x, lambda t, h: range(max(0, t - layer.config.window + 1), t + 1)), {}


def forgetting_attention(layer, x, dense=False):
  """arXiv:2503.02130, eqs. 5 to 9: the logit of token s at token t has the sum of log f over s + 1 to t."""
  c = layer.config
  log_f = np.log(sigmoid(linear(layer.f_proj, x) + array(layer.f_proj.bias)))

  def shifted(name):
    y = project(layer, f"{name}_proj", x, layer.Hkv)
    if not c.kv_shift:
      return y
    a = sigmoid(linear(getattr(layer, f"{name}_shift_proj"), x))[..., None]
    before = np.concatenate([np.zeros_like(y[:1]), y[:-1]])
    return a * before + (1 - a) * y

  q, k, v = heads(layer, "q_proj", x, layer.H, "q_norm"), shifted("k"), shifted("v")
  k = rotated(rms(k, layer.k_norm) if c.qk_norm else k, c.rope_theta, c.rope_fraction)
  o, groups = np.zeros_like(q), layer.H // layer.Hkv
  for t, h in np.ndindex(*q.shape[:2]):
    logits = [
      q[t, h] @ k[s, h // groups] / np.sqrt(layer.K) + log_f[s + 1 : t + 1, h].sum()
      for s in range(t + 1)
    ]
    o[t, h] = softmax(logits) @ v[: t + 1, h // groups]
  if c.output_norm:
    o = rms(o, layer.out_norm)
  return leave(layer, o, x), {}


def deltaformer(layer, x, dense=False):
  """arXiv:2505.19488: attention to values, of each of which attention to those before it has been taken away."""
  (q, k, v), c = qkv(layer, x), layer.config
  w = heads(layer, "w_proj", x, layer.H, "w_norm") if c.own_w else q
  beta = linear(layer.beta_proj, x) + array(layer.beta_proj.bias)
  if c.beta == "sigmoid":
    beta = sigmoid(beta)
  u, o = np.zeros_like(v), np.zeros_like(q)
  for t, h in np.ndindex(*v.shape[:2]):
    u[t, h] = v[t, h] - beta[t, h] * attention(w[t, h], k[:t, h], u[:t, h])
    o[t, h] = attention(q[t, h], k[: t + 1, h], u[: t + 1, h])
  return leave(layer, o, x), {}


def simplicial(layer, x, dense=False):
  """arXiv:2507.02754, section 4: attention to pairs (j, m), whose logit is a product of three."""
  (q, k, v), c, groups = qkv(layer, x), layer.config, layer.H // layer.Hkv
  k2 = heads(layer, "k2_proj", x, layer.Hkv, "k2_norm")
  v2 = project(layer, "v2_proj", x, layer.Hkv)
  o = np.zeros_like(q)
  for t, h in np.ndindex(*q.shape[:2]):
    first = range(max(0, t - c.window + 1), t + 1)
    second = range(max(0, t - c.second_window + 1), t + 1)
    pairs, g = [(j, m) for j in first for m in second], h // groups
    keys, values = ([a[j, g] * b[m, g] for j, m in pairs] for a, b in ((k, k2), (v, v2)))
    o[t, h] = attention(q[t, h], keys, values)
  return leave(layer, o, x), {}


def latent_heads(layer, x):
  """arXiv:2405.04434, equations 9 to 19: each head's q, k and v, from the latents."""
  c, T, H = layer.config, len(x), layer.H
  content = rms(linear(layer.kv_down, x), layer.kv_norm)
  latent = rms(linear(layer.q_down, x), layer.q_norm) if c.q_lora_rank else x
  q = linear(layer.q_up, latent).reshape(T, H, -1)
  k = linear(layer.k_up, content).reshape(T, H, -1)
  v = linear(layer.v_up, content).reshape(T, H, -1)
  if c.rope_dim:
    turn = (lambda y: rotated(y, c.rope_theta, 1.0, c.rope_scaling)) if c.rope else lambda y: y
    q = np.concatenate([q[..., : c.nope_dim], turn(q[..., c.nope_dim :])], axis=-1)
    k_rope = turn(linear(layer.k_rope, x))[:, None]
    k = np.concatenate([k, np.repeat(k_rope, H, axis=1)], axis=-1)
  return q, k, v, latent


def latent_attention(layer, x, dense=False):
  """The same paper: attention of these heads."""
  q, k, v, _ = latent_heads(layer, x)
  o = np.zeros((len(x), layer.H, v.shape[-1]))
  for t, h in np.ndindex(*o.shape[:2]):
    o[t, h] = attention(q[t, h], k[: t + 1, h], v[: t + 1, h])
  return leave(layer, o, x), {}


def temporal_latent_attention(layer, x, dense=False):
  """arXiv:2505.13544, section 3: latents are summed within chunks, each with a weight of its own, and a query sees the
  sums at the ends of chunks before it and the one at itself."""
  c, s = layer.config, layer.config.compress
  (q, k, _, _), content = latent_heads(layer, x), rms(linear(layer.kv_down, x), layer.kv_norm)
  rank = c.kv_lora_rank
  for t in range(len(x)):
    sines = [
      (np.cos if j % 2 else np.sin)((t // s) * 10000.0 ** (-(j - j % 2) / rank))
      for j in range(rank)
    ]
    chunk = linear(layer.chunk_proj, np.array(sines)) + array(layer.chunk_proj.bias)
    token = linear(layer.token_proj, content[t]) + array(layer.token_proj.bias)
    content[t] = sigmoid(chunk @ token) * content[t]
  merged = np.stack([content[t - t % s : t + 1].sum(axis=0) for t in range(len(x))])
  own, v = (linear(up, merged).reshape(len(x), layer.H, -1) for up in (layer.k_up, layer.v_up))
  k = np.concatenate([own, k[..., c.nope_dim :]], axis=-1)
  o = np.zeros((len(x), layer.H, c.value_dim))
  for t, h in np.ndindex(*o.shape[:2]):
    seen = [m for m in range(t + 1) if m == t or (m + 1) % s == 0]
    o[t, h] = attention(q[t, h], k[seen, h], v[seen, h])
  return leave(layer, o, x), {}


def window_linear(layer, x, dense=False):
  """arXiv:2410.10254, section 3.3: the window's weights, over its greatest, and the features' products over one sum."""
  q, k, v = qkv(layer, x)
  gamma = sigmoid(array(layer.raw_gamma))
  w_q, w_k = array(layer.q_features), array(layer.k_features)

  def phi(y, w):
    return np.concatenate([softmax(y @ w), softmax(-(y @ w))])

  o = np.zeros_like(q)
  for t, h in np.ndindex(*q.shape[:2]):
    weight = np.zeros(t + 1)
    near = [s for s in range(t + 1) if t - s < layer.config.window]
    top = max(q[t, h] @ k[s, h] / np.sqrt(layer.K) for s in near)
    for s in range(t + 1):
      if s in near:
        weight[s] = gamma[h] * np.exp(q[t, h] @ k[s, h] / np.sqrt(layer.K) - top)
      else:
        weight[s] = phi(q[t, h], w_q[h]) @ phi(k[s, h], w_k[h])
    o[t, h] = weight @ v[: t + 1, h] / weight.sum()
  return leave(layer, o, x), {}
