"""What linear mixers are held to: all that lies around their recurrences, for one document in numpy's float64.

A reference takes a layer, for its sizes and parameters, float64 tokens [T, D] and the layer's place in the model. It
makes the arguments of the mixer's ``equation`` as the paper or its authors' code does, has them go through it token by
token (``recur``), and gives the layer's output [T, D]. It shares no code with the layer but the equation, which has a
test of its own. A mixer names its own as ``reference``, which may as well be a method in its file.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np

from attnlab.mixers.base import Layer
from attnlab.mixers.references import array, rotate, sigmoid, softmax


@dataclasses.dataclass(frozen=True)
class Place(Layer):
  """Where in the model a layer stands, and what earlier layers hand on to it.

  Attributes:
    shared: by name (``Mixer.shared``), of the document's tokens [T, ...].
  """

  shared: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


# Functions of numbers.


def identity(x):
  return x


def silu(x):
  return x * sigmoid(x)


def softplus(x):
  return np.log(1 + np.exp(x))


def log_sigmoid(x):
  return -softplus(-x)


def gelu(x):
  """With a tanh, as GPT-2 has it (arXiv:1606.08415, section 2)."""
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# Parts of layers.


def affine(layer, x):
  y = x @ array(layer.kernel)
  return y if layer.bias is None else y + array(layer.bias)


def low_rank(layer, x, activation=identity):
  return affine(layer.up, activation(affine(layer.down, x)))


def convolved(conv, x):
  """Each channel under taps of its own, the last of which is for the token itself; nothing is before the first."""
  taps, y = array(conv.weight), np.zeros_like(x)
  for t in range(len(x)):
    for back in range(min(len(taps), t + 1)):
      y[t] += taps[len(taps) - 1 - back] * x[t - back]
  return y if conv.bias is None else y + array(conv.bias)


def projected(layer, name, x, activation=silu):
  """A projection, its short convolution where the layer has any, then the activation."""
  y = affine(getattr(layer, f"{name}_proj"), x)
  if layer.config.conv_size:
    y = convolved(getattr(layer, f"{name}_conv"), y)
  return activation(y)


def split(x, *shape):
  """Channels [T, D] as [T, *shape], the last of which is what remains."""
  return x.reshape(len(x), *shape, -1)


def unit(x):
  return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def rms(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def centred(x, scale, bias, eps):
  """LayerNorm (arXiv:1607.06450); of heads that are normalised each, GroupNorm (arXiv:1803.08494)."""
  x = x - np.mean(x, axis=-1, keepdims=True)
  return rms(x, scale, eps) + bias


def before(x):
  """The token before each."""
  return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def always(x, value):
  """What is the same for every token."""
  return np.broadcast_to(value, (len(x), *np.shape(value)))


def qkv(layer, x, activation=silu, norm=unit):
  """q, k [T, H, K] and v [T, Hv, V], as DeltaNet's (arXiv:2406.06484): a convolution, SiLU, q and k of length 1.

  ``qk_norm`` may ask for another norm than the mechanism's.
  """
  norm = {None: norm, True: unit, False: identity}[layer.config.qk_norm]
  q, k = (norm(split(projected(layer, name, x, activation), layer.H)) for name in "qk")
  return q, k, split(projected(layer, "v", x, activation), layer.Hv)


def turned(q, k, c):
  """RoPE of both at the tokens' positions."""
  return (
    np.stack([rotate(y, t, c.rope_theta, c.rope_fraction) for t, y in enumerate(each)])
    for each in (q, k)
  )


def decay(f, A_log, dt_bias):
  """``-exp(A_log) softplus(f + dt_bias)``: a rate times a step (arXiv:2405.21060, 2412.06464)."""
  return -np.exp(A_log) * softplus(f + dt_bias)


def step(layer, x, name="b_proj"):
  """beta, up to 1, or to 2 (arXiv:2411.12537)."""
  most = 2 if layer.config.negative_eigenvalues else 1
  return most * sigmoid(affine(getattr(layer, name), x))


def recur(layer, **signals):
  """The mixer's equation for each head, from an empty state: its outputs [T, Hv, ...].

  Signals are [T, Hv, ...], or [T, H, ...] where neighbouring heads of values have a head of keys together.
  """
  shared = layer.Hv // layer.H
  with jax.enable_x64(True):
    tokens = {
      name: np.repeat(x, shared, axis=1) if x.shape[1] == layer.H else x
      for name, x in signals.items()
    }
    empty = jax.tree.map(lambda S: np.zeros(S.shape[1:]), layer.init_state(1))
    return np.asarray(_by_equation(type(layer))(empty, tokens))


@functools.cache
def _by_equation(cls):
  def head(S, tokens):
    return jax.lax.scan(lambda S, token: cls.equation(S, **token), S, tokens)[1]

  return jax.jit(jax.vmap(head, in_axes=(0, 1), out_axes=1))


def leave(layer, o, gate=1.0, *, eps):
  """``W_o (RMSNorm(o) * gate)``, the norm over each head, all with one scale (RetNet's, arXiv:2307.08621, eq. 8)."""
  return affine(
    layer.out_proj, (rms(o, array(layer.out_norm.scale), eps) * gate).reshape(len(o), -1)
  )


def gate(layer, x, activation, project=affine):
  """Of the output: the activation of another projection, if the layer has it."""
  if not layer.config.output_gate:
    return 1.0
  return activation(split(project(layer.gate_proj, x), layer.Hv))


# Decay without erasing.


def linear_attention(layer, x, place):
  """arXiv:2006.16236: phi of q and k, which is elu + 1; values are not changed."""

  def phi(y):
    positive = {
      "elu": np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))),
      "relu": np.maximum(y, 0),
      "identity": y,
    }
    return positive[layer.config.feature_map]

  q, k, v = qkv(layer, x, identity, identity)
  return leave(layer, recur(layer, q=phi(q), k=phi(k), v=v), eps=place.norm_eps), {}


def retnet(layer, x, place):
  """arXiv:2307.08621, eq. 8: q and k are turned by their positions, gamma_h = 1 - 2^(-5 - h), a swish gate."""
  q, k, v = qkv(layer, x, identity, identity)
  q, k = turned(q, k, layer.config)
  gamma = np.array([1 - 2.0 ** (-5 - h) for h in range(layer.H)])
  o = recur(layer, q=q, k=k, v=v, g=always(x, np.log(gamma)))
  return leave(layer, o, gate(layer, x, silu), eps=place.norm_eps), {}


def alibi(heads):
  """arXiv:2108.12409, section 3: a geometric sequence that ends at 2^-8; its authors' code, where heads are no power of
  two: that of the power below, and then every other of the power above."""
  power = 2
  while power <= heads:
    power *= 2
  power //= 2
  below = [2.0 ** (-8 * h / power) for h in range(1, power + 1)]
  above = [2.0 ** (-8 * h / (2 * power)) for h in range(1, 2 * power, 2)]
  return np.array((below + above)[:heads])


def lightning(layer, x, place):
  """arXiv:2501.08313: SiLU of q, k and v, decay by head and layer, one norm over all heads, a sigmoid gate."""
  slopes = alibi(layer.H) * (1 - place.index / (place.count - 1) + 1e-5)
  return _lightning(layer, x, place, slopes)


def lightning_fla(layer, x, place):
  """The same with the slopes of flash-linear-attention, which grow evenly from head to head."""
  slopes = np.array([8 / layer.H * (1 - place.index / place.count) * h for h in range(layer.H)])
  return _lightning(layer, x, place, slopes)


def _lightning(layer, x, place, slopes):
  q, k, v = qkv(layer, x, silu, identity)
  q, k = turned(q, k, layer.config)
  o = recur(layer, q=q, k=k, v=v, g=always(x, -slopes)).reshape(len(x), -1)
  o = rms(o, array(layer.out_norm.scale).ravel(), place.norm_eps)
  o = split(o, layer.H) * gate(layer, x, sigmoid)
  return affine(layer.out_proj, o.reshape(len(x), -1)), {}


def gla(layer, x, place):
  """arXiv:2312.06635, section 4.4: alpha = sigmoid(W_2 W_1 x + b)^(1/tau), tau = 16, by channels of keys."""
  q, k, v = qkv(layer, x, identity, identity)
  alpha = sigmoid(low_rank(layer.g_proj, x)) ** (1 / layer.config.gate_normalizer)
  o = recur(layer, q=q, k=k, v=v, g=split(np.log(alpha), layer.H))
  return leave(layer, o, gate(layer, x, silu), eps=place.norm_eps), {}


def hgrn2(layer, x, place):
  """arXiv:2404.07904, with the lower bounds of arXiv:2311.04823: f = gamma + (1 - gamma) sigmoid(W x), gamma zero in
  the first layer. q is under SiLU, values are not; one norm over all channels, no gate."""
  gamma = 0.0 if place.index == 0 else sigmoid(array(layer.bound).ravel())
  f = gamma + (1 - gamma) * sigmoid(projected(layer, "k", x, identity))
  q, i = projected(layer, "q", x), projected(layer, "v", x, identity)
  q, g, i = split(q, layer.H), split(np.log(f), layer.H), split(i, layer.H)
  o = recur(layer, q=q, v=i, g=g).reshape(len(x), -1)
  return affine(layer.out_proj, rms(o, array(layer.out_norm.scale).ravel(), place.norm_eps)), {}


# State space models.


def _mamba2(layer, x):
  low, high = layer.config.dt_limit
  dt = softplus(affine(layer.dt_proj, x) + array(layer.dt_bias))
  return dict(
    x=split(projected(layer, "x", x), layer.Hv),
    dt=np.minimum(np.maximum(dt, low), high),
    A=always(x, -np.exp(array(layer.A_log))),
    B=split(projected(layer, "B", x), layer.H),
    C=split(projected(layer, "C", x), layer.H),
  )


def _leave_mamba2(layer, x, y, signals, eps):
  """``W_o RMSNorm((y + D x) * silu(z))``, a norm over the heads that have B and C together."""
  y = (y + array(layer.D)[:, None] * signals["x"]) * silu(
    split(affine(layer.gate_proj, x), layer.Hv)
  )
  y = rms(split(y, layer.H), array(layer.out_norm.scale).reshape(layer.H, -1), eps)
  return affine(layer.out_proj, y.reshape(len(x), -1))


def mamba2(layer, x, place):
  """arXiv:2405.21060 and its authors' code: x, B and C under a convolution with biases, then SiLU; Delta is
  softplus(W x + b), within bounds; A = -exp(A_log); the norm is behind the gate."""
  signals = _mamba2(layer, x)
  return _leave_mamba2(layer, x, recur(layer, **signals), signals, place.norm_eps), {}


def mamba3(layer, x, place):
  """arXiv:2603.15569 and its authors' code: no convolution and no activation; B and C are normalised and have biases,
  by head and rank; A is of the token, at most -1e-4; all heads have the same angles; D x behind the recurrence, then
  SiLU of z."""
  c, H, R = layer.config, layer.H, layer.config.rank

  def by_head(name):
    y = split(affine(getattr(layer, f"{name}_proj"), x), c.groups, R)
    y = rms(y, array(getattr(layer, f"{name}_norm").scale), place.norm_eps)
    of_group = np.stack([y[:, h * c.groups // H] for h in range(H)], axis=1)
    return of_group + array(getattr(layer, f"{name}_bias"))

  def ranks(y, name):
    """Each rank has weights of its own of a head's channels."""
    y = split(y, H)[:, :, None]
    return y if R == 1 else y * array(getattr(layer, f"mimo_{name}"))

  dt = softplus(affine(layer.dt_proj, x) + array(layer.dt_bias))
  A = np.minimum(-softplus(affine(layer.A_proj, x)), -1e-4)
  none = np.zeros((len(x), 0))
  theta = affine(layer.theta_proj, x) if c.rope_fraction * layer.K >= 2 else none
  values = ranks(affine(layer.x_proj, x), "x")
  y = recur(
    layer,
    C=by_head("C"),
    B=by_head("B"),
    x=values,
    g=dt * A,
    dt=dt,
    trap=sigmoid(affine(layer.trap_proj, x)),
    theta=np.stack([theta] * H, axis=1),
  )
  y = y + array(layer.D)[:, None, None] * values
  y = y * silu(ranks(affine(layer.gate_proj, x), "z"))
  y = y[:, :, 0] if R == 1 else np.sum(y * array(layer.mimo_o), axis=2)
  return affine(layer.out_proj, y.reshape(len(x), -1)), {}


# Delta rules.


def deltanet(layer, x, place):
  """arXiv:2406.06484: beta = sigmoid(W_b x); a norm of heads and no gate."""
  q, k, v = qkv(layer, x)
  return leave(layer, recur(layer, q=q, k=k, v=v, beta=step(layer, x)), eps=place.norm_eps), {}


def _gated_deltanet(layer, x):
  q, k, v = qkv(layer, x)
  g = decay(affine(layer.a_proj, x), array(layer.A_log), array(layer.dt_bias))
  return dict(q=q, k=k, v=v, g=g, beta=step(layer, x))


def gated_deltanet(layer, x, place):
  """arXiv:2412.06464: DeltaNet's q, k, v and beta, Mamba-2's decay, a SiLU gate behind the norm."""
  o = recur(layer, **_gated_deltanet(layer, x))
  return leave(layer, o, gate(layer, x, silu), eps=place.norm_eps), {}


def comba(layer, x, place):
  """arXiv:2506.02475 and its authors' code: p = sigmoid(d) k is what is erased under, and q - D p reads; Gated
  DeltaNet's gates within, and a sigmoid at the output."""
  signals = _gated_deltanet(layer, x)
  c = sigmoid(array(layer.c))
  p = c[:, None] * signals["k"]
  signals |= dict(q=signals["q"] - array(layer.D)[:, None] * p, c=always(x, c))
  return leave(layer, recur(layer, **signals), gate(layer, x, sigmoid), eps=place.norm_eps), {}


def kda(layer, x, place):
  """arXiv:2510.26692: a decay for each channel of keys, of low rank, and a sigmoid gate of low rank. The
  bounded decay, and gates of full rank, are later models' of its authors and of others."""
  c, project = layer.config, low_rank if layer.config.low_rank_gates else affine
  q, k, v = qkv(layer, x)
  f = split(project(layer.f_proj, x), layer.Hv)
  A_log, dt_bias = array(layer.A_log)[:, None], array(layer.dt_bias)
  if c.decay_gate == "safe":
    g = c.lower_bound * sigmoid(np.exp(A_log) * (f + dt_bias))
  else:
    g = decay(f, A_log, dt_bias)
  o = recur(layer, q=q, k=k, v=v, g=g, beta=step(layer, x))
  return leave(layer, o, gate(layer, x, sigmoid, project), eps=place.norm_eps), {}


def gdn2(layer, x, place):
  """arXiv:2605.22791: KDA with an erase gate for each channel of keys and a write gate for each channel of values, both
  of full rank."""
  q, k, v = qkv(layer, x)
  f = split(low_rank(layer.f_proj, x), layer.Hv)
  g = decay(f, array(layer.A_log)[:, None], array(layer.dt_bias))
  b = split(step(layer, x), layer.Hv)
  w = split(sigmoid(affine(layer.w_proj, x)), layer.Hv)
  o = recur(layer, q=q, k=k, v=v, g=g, b=b, w=w)
  return leave(layer, o, gate(layer, x, sigmoid, low_rank), eps=place.norm_eps), {}


def gated_delta_product(layer, x, place):
  """arXiv:2502.10297: n keys, values and betas a token, each as DeltaNet's; one decay a token, if any."""
  n = layer.config.steps
  signals = dict(
    q=unit(split(projected(layer, "q", x), layer.H)),
    k=unit(split(projected(layer, "k", x), layer.H, n)),
    v=split(projected(layer, "v", x), layer.Hv, n),
    beta=split(step(layer, x), layer.Hv),
  )
  if layer.config.forget_gate:
    f = affine(layer.a_proj, x)
    signals["g"] = decay(f, array(layer.A_log), array(layer.dt_bias))
  return leave(layer, recur(layer, **signals), gate(layer, x, silu), eps=place.norm_eps), {}


def mixture_of_memories(layer, x, place):
  """arXiv:2502.13685: a softmax over memories, of which the top k get weights whose sum is one; Gated
  DeltaNet's keys, values and gates for each memory, rates for all; shared memories have weight one."""
  c, H = layer.config, layer.H
  M = c.memories + c.shared
  route = np.zeros((len(x), M))
  route[:, c.memories :] = 1
  for t, logits in enumerate(affine(layer.router, x)):
    p = softmax(logits)
    best = np.argsort(p)[-c.top_k :]
    route[t, best] = p[best] / p[best].sum()
  A_log, dt_bias = array(layer.A_log)[:, None], array(layer.dt_bias)[:, None]
  o = recur(
    layer,
    q=unit(split(projected(layer, "q", x), H)),
    k=unit(split(projected(layer, "k", x), H, M)),
    v=split(projected(layer, "v", x), H, M),
    g=decay(split(affine(layer.a_proj, x), H), A_log, dt_bias),
    beta=sigmoid(split(affine(layer.b_proj, x), H)),
    route=np.stack([route] * H, axis=1),
  )
  return leave(layer, o, gate(layer, x, silu), eps=place.norm_eps), {}


# RWKV.


def rwkv6(layer, x, place):
  """arXiv:2404.05892 and its authors' code: each of five inputs is between the token and the one before it, by an
  amount of the token's; w = exp(-exp(d)); a GroupNorm, eps 1e-5 a channel of a head; SiLU of a gate with an input of
  its own."""
  H, past = layer.H, before(x) - x
  low = np.tanh(affine(layer.mix_down, x + past * array(layer.mix_x)))
  mixed = {}
  for i, name in enumerate("wkvrg"):
    rank = layer.config.mix_rank
    amount = array(layer.mix)[i] + low[:, i * rank : (i + 1) * rank] @ array(layer.mix_up)[i]
    mixed[name] = x + past * amount
  d = array(layer.decay).ravel() + low_rank(layer.w_lora, mixed["w"], np.tanh)
  r, k, v = (split(affine(getattr(layer, f"{name}_proj"), mixed[name]), H) for name in "rkv")
  o = recur(layer, r=r, k=k, v=v, g=split(-np.exp(d), H), u=always(x, array(layer.bonus)))
  o = centred(o, array(layer.out_norm.scale), array(layer.out_norm.bias), 1e-5 * layer.V)
  return affine(
    layer.out_proj, o.reshape(len(x), -1) * silu(affine(layer.gate_proj, mixed["g"]))
  ), {}


def rwkv7(layer, x, place):
  """arXiv:2503.14456 and its authors' code: w = exp(-e^-0.5 sigmoid(d)); the removal key is of the key before its rate
  weighs it; values lean on the first layer's; what the token gives itself comes behind the norm, before the gate."""
  H, past = layer.H, before(x) - x
  xr, xw, xk, xv, xa, xg = (x + past * mu for mu in array(layer.mix))

  def flat(name):
    return array(getattr(layer, name)).ravel()

  r, k, v = affine(layer.r_proj, xr), affine(layer.k_proj, xk), affine(layer.v_proj, xv)
  w = -np.exp(-0.5) * sigmoid(flat("w0") + low_rank(layer.w_lora, xw, np.tanh))
  a = sigmoid(flat("a0") + low_rank(layer.a_lora, xa))
  nu = sigmoid(flat("v0") + low_rank(layer.v_lora, xv))
  first, has = place.shared["rwkv7_v"].reshape(len(x), -1), place.shared["rwkv7_has_v"]
  v = v + has[:, None] * nu * (first - v)
  kappa = unit(split(k * flat("k_k"), H))
  k = k * (1 - flat("k_a") + a * flat("k_a"))
  r, w, k, v, a = (split(y, H) for y in (r, w, k, v, a))
  o = recur(layer, r=r, w=w, k=k, v=v, kappa=kappa, a=a)
  o = centred(o, array(layer.out_norm.scale), array(layer.out_norm.bias), 1e-5 * layer.V)
  o = o + np.sum(r * array(layer.r_k) * k, axis=-1, keepdims=True) * v
  return affine(layer.out_proj, o.reshape(len(x), -1) * low_rank(layer.g_lora, xg, sigmoid)), {}


# States that are more than one matrix.


def _levels(layer, x):
  """Weights of levels, softplus(L * W x), and where in the document a token is."""
  raw = split(affine(layer.level_proj, x), layer.Hv)
  position = np.stack([np.arange(len(x), dtype=np.float64)] * layer.Hv, axis=1)
  return dict(weights=softplus(array(layer.level_scale) * raw), position=position)


def log_linear_mamba2(layer, x, place):
  """arXiv:2506.04761 and its authors' code: Mamba-2, and weights of levels from the token."""
  signals = _mamba2(layer, x)
  y = recur(layer, **signals, **_levels(layer, x))
  return _leave_mamba2(layer, x, y, signals, place.norm_eps), {}


def log_linear_gated_deltanet(layer, x, place):
  """arXiv:2506.04761 and its authors' code: Gated DeltaNet, and weights of levels from the token."""
  o = recur(layer, **_gated_deltanet(layer, x), **_levels(layer, x))
  return leave(layer, o, gate(layer, x, silu), eps=place.norm_eps), {}


def ttt(layer, x, place):
  """arXiv:2407.04620, section 2.7 and its authors' code: q and k are one projection under two convolutions, turned by
  their places in the mini-batch; eta is a sigmoid of the token times base / K, and times max(1 / (i + 1) + bias, 0) of
  the place i; LayerNorm over all channels, then a GELU gate."""
  c, H, b = layer.config, layer.H, layer.config.mini_batch
  qk, places = affine(layer.q_proj, x), np.arange(len(x)) % b

  def key(name):
    y = convolved(getattr(layer, f"{name}_conv"), qk) if c.conv_size else qk
    return np.stack([rotate(y, i, c.rope_theta) for i, y in zip(places, split(y, H), strict=True)])

  names = ["W1", "b1"] + ["W2", "b2"] * (layer.hidden > 0)
  own = {name: getattr(layer, name) for name in names}
  own |= {"scale": layer.inner_scale, "bias": layer.inner_bias}
  steps = np.maximum(1 / np.arange(1, b + 1) + array(layer.step_bias), 0)
  o = recur(
    layer,
    q=key("q"),
    k=key("k"),
    v=split(affine(layer.v_proj, x), H),
    rate=c.base_rate * sigmoid(affine(layer.rate_proj, x)) / layer.K,
    place=np.stack([places.astype(np.float64)] * H, axis=1),
    step=always(x, np.stack([steps] * H)),
    **{name: always(x, array(p)) for name, p in own.items()},
  )
  scale, bias = (array(p).ravel() for p in (layer.out_norm.scale, layer.out_norm.bias))
  o = centred(o.reshape(len(x), -1), scale, bias, place.norm_eps)
  return affine(layer.out_proj, gelu(affine(layer.gate_proj, x)) * o), {}


def mesanet(layer, x, place):
  """arXiv:2506.05233: q and k as DeltaNet's, v as it is projected; gamma and beta are sigmoids of the token,
  Lambda is at least 1/4; a norm of heads, and no gate unless one is asked for."""
  q, k = (unit(split(projected(layer, name, x), layer.H)) for name in "qk")
  o = recur(
    layer,
    q=q,
    k=k,
    v=split(affine(layer.v_proj, x), layer.Hv),
    g=np.log(sigmoid(affine(layer.a_proj, x))),
    beta=sigmoid(affine(layer.b_proj, x)),
    lam=always(x, 0.25 + softplus(array(layer.raw_lam))),
  )
  return leave(layer, o, gate(layer, x, silu), eps=place.norm_eps), {}
