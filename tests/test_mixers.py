"""The contract of a mixer, checked for every registered one, with its defaults and each of its variants.

A new file in attnlab/mixers is covered with no edit here. Every parameter is moved away from its initial value, so that
no gradient vanishes because something starts at zero.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

import pallas_kernels as pk
from attnlab import sharding
from attnlab.mixers import Context, Layer, Mixer, configure, mix, mixers
from attnlab.mixers.linear import LinearMixer, Recent
from attnlab.mixers.linear_references import Place

D, B, T = 32, 4, 7
LAYERS = 2
# Small sizes, of which each mixer gets the fields that its Config has.
SIZES = dict(
  num_heads=2,
  head_dim=8,
  value_dim=6,
  state_dim=8,
  window=3,
  second_window=2,
  block_size=2,
  top_k=2,
  pool_size=2,
  pool_stride=1,
  initial=0,
  local=1,
  random=1,
  compress=2,
  q_lora_rank=8,
  out_rank=8,
  index_heads=2,
  index_dim=8,
  index_rope_dim=4,
  nope_dim=8,
  rope_dim=4,
  kv_lora_rank=12,
  mini_batch=4,
  levels=7,
)
# Rows with different documents, of one token and of more; an id that is not in order is a document all the same.
SEGMENTS = np.array(
  [[1] * 3 + [2] * 4, [1] * 7, [3] * 2 + [1] * 2 + [2] * 3, [1] + [2] * 6], np.int32
)
WHOLE = np.ones((B, T), np.int32)


# One of each kind, that is of each way to reach a kernel: of a test that is for the long run with all others.
FEW = ("softmax", "mla", "csa", "kda", "mamba2", "window_linear", "nsa")


def cases(shapes_alone, few, linear):
  """Parameters of ``case``: every mixer with its defaults and each variant.

  Args:
    shapes_alone: for a test of what depends on the shapes of arrays. Variants without a number among their settings
      have the default's, and are for the long run.
    few: for a test of which FEW, with their defaults, are for every run.
    linear: of linear mixers alone.
  """
  for name, cls in mixers().items():
    if linear and not issubclass(cls, LinearMixer):
      continue
    for variant, settings in {"default": {}, **cls.variants}.items():
      identity = f"{name}-{variant}"
      # One worker takes all tests of a case: they share compiled functions.
      marks = [pytest.mark.xdist_group(identity)]
      alike = all(isinstance(x, bool | str) for x in settings.values())
      # Selection and kernel are the same for all sparse mixers: their further settings are for the long run.
      other = cls.family == "sparse" or alike and shapes_alone
      if (variant != "default" and other) or (
        few and identity not in map("{}-default".format, FEW)
      ):
        marks.append(pytest.mark.slow)
      yield pytest.param((cls, dict(settings)), id=identity, marks=marks)


def of_shapes(test):
  """Marks a test as one of shapes alone."""
  test.of_shapes = True
  return test


def of_linear(test):
  """Marks a test as one of linear mixers, which have an equation."""
  test.of_linear = True
  return test


def of_few(test):
  """Marks a test as one that every run has of a few mixers."""
  test.of_few = True
  return test


def pytest_generate_tests(metafunc):
  if "case" in metafunc.fixturenames:
    marks = ("of_shapes", "of_few", "of_linear")
    of = cases(*(hasattr(metafunc.function, mark) for mark in marks))
    metafunc.parametrize("case", of, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request):
  return Case(*request.param)


def random(seed, *shape):
  """Normal numbers; numpy's, which need no compilation. float64 where jax has it."""
  dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def positions(segment_ids):
  """Positions that restart in each document."""
  ids = np.asarray(segment_ids)
  out = np.zeros_like(ids, dtype=np.int32)
  for t in range(1, ids.shape[1]):
    out[:, t] = np.where(ids[:, t] == ids[:, t - 1], out[:, t - 1] + 1, 0)
  return out


class Case:
  """One mixer with one setting: two layers as a model builds them, and the compiled functions that the tests share."""

  def __init__(self, cls, settings):
    fields = {f.name for f in dataclasses.fields(cls.Config)}
    self.cls = cls
    self.settings = {k: v for k, v in SIZES.items() if k in fields} | settings
    self.config = configure(cls, self.settings)
    # The second and third layer of four: neither end, where layer-dependent constants may degenerate.
    self.indices, self.keys = 1 + np.arange(LAYERS), jax.random.split(jax.random.key(0), LAYERS)
    self.built = jax.vmap(self.build)(self.indices, self.keys)
    self.graph, params, rest = nnx.split(self.built, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    moved = [np.asarray(x) + 0.1 * random(100 + i, *x.shape) for i, x in enumerate(leaves)]
    self.stacked = jax.tree.unflatten(tree, moved), jax.device_get(rest)
    self.params, self.rest = self.unstacked(1)  # of the layer that most tests use
    self.x = random(1, B, T, D)
    # The gradients of all outputs, as what a loss sends back.
    self.cotangent = random(2, B, T, D)

  def build(self, index, key):
    return self.cls(self.config, Layer(D, index, 4), key)

  def unstacked(self, i):
    return jax.tree.map(lambda x: x[i], self.stacked)

  def layer(self, params, rest=None):
    return nnx.merge(self.graph, params, self.rest if rest is None else rest)

  def shared(self, x):
    """What earlier layers hand on: here something of each token, so that it moves with the token."""
    shapes = self.cls.shared(self.config, D).items()
    return {
      k: jnp.zeros((*x.shape[:2], *s), jnp.int32)
      if k.endswith("_ids")
      else (x @ random(9, D, math.prod(s)).astype(x.dtype)).reshape(*x.shape[:2], *s)
      for k, s in shapes
    }

  def by_reference(self, params, rest=None, index=2, shared=None):
    """Outputs of the first row by the reference of the layer of this number, to which ``shared`` is handed on."""
    layer, x = self.layer(params, jax.device_get(rest)), np.float64(self.x[0])
    if not issubclass(self.cls, LinearMixer):
      return layer.reference(x)[0]
    shared = self.shared(self.x) if shared is None else shared
    place = Place(D, index, 4, shared={k: np.float64(s[0]) for k, s in shared.items()})
    return layer.reference(x, place)[0]

  def forward(self, params, x, pos, ids=None, cache=None):
    """The layer; with a cache also the new one."""
    out = self.layer(params)(x, Context(pos, ids, self.shared(x)), cache)
    return out.y, out.cache

  def loss(self, params, x, cotangent, pos, ids):
    y, _ = self.forward(params, x, pos, ids)
    return jnp.sum(y.astype(jnp.float32) * cotangent), y

  @functools.cached_property
  def compiled(self):
    return jax.jit(jax.grad(self.loss, argnums=(0, 1), has_aux=True))

  def gradients(self, x, cotangent, ids):
    """Outputs, and the gradients of parameters ("[0]...") and of x ("[1]")."""
    grads, y = jax.device_get(self.compiled(self.params, x, cotangent, positions(ids), ids))
    return y, self.reached(by_name(grads))

  def reached(self, grads):
    """Gradients of the outputs, without those of parameters that only the mixer's own losses train: they are zero."""
    own = {k for k in grads if k.startswith(tuple(f"[0]['{n}" for n in self.cls.own_loss))}
    assert not any(np.any(grads[k]) for k in own)
    assert bool(own) == bool(self.cls.own_loss)
    return {k: x for k, x in grads.items() if k not in own}

  @functools.cached_property
  def packed(self):
    """Outputs and gradients of the packed rows."""
    return self.gradients(self.x, self.cotangent, SEGMENTS)

  def apply(self, layer, carry):
    """((params, rest), (x, shared)) -> the output without residual, and (x, shared) for the next layer."""
    x, shared = carry
    out = self.layer(*layer)(x, Context(positions(np.ones(x.shape[:2])), None, shared))
    return out.y, (x + out.y, shared | out.shared)

  @functools.cached_property
  def step(self):
    return jax.jit(self.apply)

  def outputs(self, x):
    """Outputs of whole sequences, without documents."""
    return np.asarray(self.step((self.params, self.rest), (x, self.shared(x)))[0])

  @functools.cached_property
  def alone(self):
    """Outputs of each row as one document: what reading it in pieces must give."""
    return self.outputs(self.x)

  def cache(self, max_len, dtype=jnp.float32):
    return self.layer(self.params).init_cache(B, max_len, dtype)

  @functools.cached_property
  def prefill(self):
    """(x, positions, ids, cache) -> outputs and cache."""
    return jax.jit(lambda x, pos, ids, cache: self.forward(self.params, x, pos, ids, cache))

  @functools.cached_property
  def decode(self):
    """(x, position of the first token, cache) -> outputs and cache, token by token, as one scan."""

    def body(carry, token):
      pos, cache = carry
      y, cache = self.forward(self.params, token[:, None], pos[:, None], None, cache)
      return (pos + 1, cache), y[:, 0]

    def run(x, first, cache):
      (_, cache), y = jax.lax.scan(body, (first, cache), jnp.moveaxis(x, 1, 0))
      return jnp.moveaxis(y, 0, 1), cache

    return jax.jit(run)


def by_name(tree):
  return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def error(got, want):
  """Relative error in the norm."""
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def cosine(got, want):
  got, want = (np.asarray(x, np.float64).ravel() for x in (got, want))
  return got @ want / max(np.linalg.norm(got) * np.linalg.norm(want), 1e-30)


def assert_close(got, want, bound, angle=None):
  """Every array of two dicts within a relative error, and its cosine at least ``angle``."""
  assert got.keys() == want.keys()
  bad = {}
  for name in want:
    e, c = error(got[name], want[name]), cosine(got[name], want[name])
    if not e <= bound or (angle is not None and not c >= angle):
      bad[name] = f"error {e:.1e}, cosine {c:.6f}"
  assert not bad, f"beyond {bound:.0e}: {bad}"


# Equation against engine.


def by_equation(cls, signals, state, tokens, layer):
  """The paper's update, token by token, for each sequence and head by itself."""

  def wide(x):
    """[B, T, Hv, ...]: constants for all tokens, key heads repeated for their value heads."""
    x = x if x.shape[:2] == tokens else jnp.broadcast_to(x, (*tokens, *x.shape))
    return x if x.shape[2] == layer.Hv else jnp.repeat(x, layer.Hv // layer.H, axis=2)

  update = jax.vmap(jax.vmap(lambda S, token: cls.equation(S, **token)))
  by_time = jax.tree.map(lambda x: jnp.moveaxis(wide(x), 1, 0), signals)
  state, o = jax.lax.scan(update, state, by_time)
  return jnp.moveaxis(o, 0, 1), state


def correlate(x, rho):
  """Vectors [B, T, H, ..., K] that share a direction over time, of their old lengths."""
  length = np.linalg.norm(x, axis=-1, keepdims=True)
  common = random(7, *x.shape)[:, :1]
  common = common / np.linalg.norm(common, axis=-1, keepdims=True)
  y = rho**0.5 * common * length + (1 - rho) ** 0.5 * x
  return y * length / np.linalg.norm(y, axis=-1, keepdims=True)


def has_reference(cls):
  """Whether a mixer has a reference of its own, not that of another one that it is derived from."""
  owner = next(c for c in cls.__mro__ if "reference" in vars(c))
  return owner is cls or (owner is not Mixer and "name" not in vars(owner))


NO_REFERENCE = (
  "{} needs a reference: a method reference(self, x, dense=False) of its own, with the paper's equations for one"
  " document's tokens x [T, D] in numpy's float64 that gives (y [T, D], {{}}); attnlab/mixers/references.py has"
  " examples, and parts to write it with"
)
NO_LINEAR_REFERENCE = (
  "{} has an equation, but nothing says what lies around it: it needs a method reference(self, x, place) of its own,"
  " with what the paper makes of one document's tokens x [T, D] in numpy's float64 until they are the equation's"
  " arguments, and then of its outputs, that gives (y [T, D], {{}}); attnlab/mixers/linear_references.py has examples,"
  " and parts to write it with"
)


def hold_to_reference(case):
  """The whole layer against its reference: outputs, and the derivative by every parameter, along its gradient and
  across. float32 against float64, whose central differences are good to 1e-7: 1e-4.
  """
  message = NO_LINEAR_REFERENCE if issubclass(case.cls, LinearMixer) else NO_REFERENCE
  assert has_reference(case.cls), message.format(case.cls.__name__)
  params, cotangent = case.params, np.float64(case.cotangent[0])
  y, grads = case.gradients(case.x, case.cotangent * (np.arange(B) == 0)[:, None, None], WHOLE)
  np.testing.assert_allclose(y[0], case.by_reference(params), rtol=2e-5, atol=2e-5)
  leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, params))
  names = [f"[0]{k}" for k in by_name(params)]
  bad = {}
  for i, (name, value) in enumerate(zip(names, leaves, strict=True)):
    if name not in grads:
      continue
    g, across = np.float64(grads[name]), random(40 + i, *value.shape)
    g = g / np.linalg.norm(g)
    direction = g + across / np.linalg.norm(across)
    ends = [
      tree.unflatten([*leaves[:i], value + e * direction, *leaves[i + 1 :]]) for e in (EPS, -EPS)
    ]
    up, down = (np.vdot(cotangent, case.by_reference(params)) for params in ends)
    want, got = (up - down) / (2 * EPS), np.vdot(direction, np.float64(grads[name]))
    if not abs(got - want) <= 1e-4 * np.linalg.norm(grads[name]):
      bad[name] = f"{got:.6g} for {want:.6g}"
  assert not bad, bad


EPS = 1e-5


def hold_first_layer(case):
  """The first of the model, whose constants may differ, and to which nothing is handed on: its outputs."""
  shared = jax.tree.map(np.zeros_like, case.shared(case.x))
  rest = nnx.split(case.build(0, case.keys[0]), nnx.Param, ...)[2]
  y, _ = case.step((case.params, rest), (case.x, shared))
  want = case.by_reference(case.params, rest, 0, shared)
  np.testing.assert_allclose(y[0], want, rtol=2e-5, atol=2e-5)


def test_layer(case):
  """All of it; of a linear mixer that is what lies around the equation, to which ``test_equation`` holds the core."""
  hold_to_reference(case)
  by_layer = jax.tree.leaves(case.rest) or case.cls.shared(case.config, D)
  if issubclass(case.cls, LinearMixer) and by_layer:
    hold_first_layer(case)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("linear_attention", dict(feature_map="relu", qk_norm=True)),
    ("retnet", dict(rope_fraction=0.5, rope_theta=10.0, output_gate=False, qk_norm=True)),
    ("lightning", dict(num_heads=6, output_gate=False)),
    ("lightning_fla", dict(rope_fraction=1.0, rope_theta=10.0, conv_size=3)),
    ("gla", dict(gate_normalizer=4.0, gate_rank=5, output_gate=False)),
    ("hgrn2", dict(conv_size=3)),
    ("mamba2", dict(conv_size=0)),
    ("mamba3", dict(rank=2, rope_fraction=0.0)),
    ("deltanet", dict(num_value_heads=4, qk_norm=False)),
    ("gated_deltanet", dict(conv_size=0, output_gate=False, qk_norm=False)),
    ("comba", dict(conv_size=0, output_gate=False)),
    ("kda", dict(gate_bias=False, conv_size=0, num_value_heads=4)),
    ("kda", dict(output_gate=False, decay_gate="safe", lower_bound=-2.0)),
    ("gdn2", dict(conv_size=0, output_gate=False, qk_norm=False)),
    ("gated_delta_product", dict(steps=1, conv_size=0, output_gate=False)),
    ("mom", dict(top_k=1, shared=2, conv_size=0, output_gate=False)),
    ("rwkv6", dict(mix_rank=5, decay_rank=3)),
    ("ttt_linear", dict(conv_size=0, base_rate=3.0, mini_batch=3)),
    ("mesanet", dict(conv_size=0)),
  ],
  ids=str,
)
def test_settings(name, settings):
  """Outputs of linear mixers with settings that no variant has."""
  case = Case(mixers()[name], settings)
  np.testing.assert_allclose(case.alone[0], case.by_reference(case.params), rtol=2e-5, atol=2e-5)


@of_linear
def test_equation(case):
  """``core``, in chunks, against the equation: outputs, final state, and the gradient of every signal and the state.

  In float64, so that a bound of 1e-9 leaves no room for anything but rounding: the worst system here (keys correlated
  by 0.9 with beta up to 2) amplifies 1e-16 by less than 1e4.
  """
  x = random(6, 2, 13, D)

  def signals_of(layer, x):
    # In the middle of a document, which has given a state.
    ctx = Context(jnp.broadcast_to(5 + jnp.arange(x.shape[1]), x.shape[:2]))
    signals = layer.signals(x, Recent(layer, ctx, None), ctx)
    return {k: v for k, v in signals.items() if k not in layer.output_only}

  layer = case.layer(case.params)
  signals = jax.jit(signals_of)(layer, x)
  state = layer.init_state(len(x))
  with jax.enable_x64(True):
    signals = jax.tree.map(lambda x: np.asarray(x, np.float64), signals)
    leaves, tree = jax.tree.flatten(state)
    leaves = [random(20 + i, *x.shape) for i, x in enumerate(leaves)]
    for i in case.cls.sums_of_squares:
      leaves[i] = leaves[i] @ np.swapaxes(leaves[i], -1, -2)
    state = jax.tree.unflatten(tree, leaves)

    def by_core(signals, state):
      return case.cls.core(**signals, initial_state=state, return_state=True, chunk_size=8)

    def equation(signals, state):
      return by_equation(case.cls, signals, state, x.shape[:2], layer)

    def gradients(f):
      def loss(signals, state):
        out = f(signals, state)
        parts = [jnp.vdot(x, random(30 + i, *x.shape)) for i, x in enumerate(jax.tree.leaves(out))]
        return sum(parts), out

      g = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

      def run(*args):
        grads, out = jax.device_get(g(*args))
        assert not any(np.any(grads[0].pop(name)) for name in case.cls.without_gradient)
        return by_name(out), by_name(grads)

      return run

    got, want = gradients(by_core), gradients(equation)
    keys = {k: correlate(x, 0.9) for k, x in signals.items() if k in ("k", "kappa", "B")}
    for inputs in (signals, signals | keys):
      for a, b in zip(got(inputs, state), want(inputs, state), strict=True):
        assert_close(a, b, 1e-9, 1 - 1e-9)


# ``std sqrt(inputs)`` of matrices at the start that is not 1: the RWKV authors' and TTT's, whose W have a std of 0.02,
# the second of an MLP 0.02 / sqrt(2 layers).
STARTS = {
  ("rwkv6", "mix_down"): 0,
  ("rwkv6", "mix_up"): 0.01 * 32**0.5 / 3**0.5,
  ("rwkv6", "lora.down"): 0,
  ("rwkv6", "lora.up"): 0.01 * 64**0.5 / 3**0.5,
  ("rwkv7", "k_proj"): 0.1,
  ("rwkv7", "lora.down"): 0,
  ("rwkv7", "lora.up"): 0.1,
  ("ttt_linear", "W1"): 0.02 * 8**0.5,
  ("ttt_mlp", "W1"): 0.02 * 8**0.5,
  ("ttt_mlp", "W2"): 0.02 * 32**0.5 / (2 * 4) ** 0.5,
}


def test_start(case):
  """Where parameters begin: a matrix with a variance of one over its inputs, of heads or groups each by itself; decays
  and steps in their ranges; taps as PyTorch's. (So few numbers have a standard deviation within a quarter.)"""
  built = nnx.state(case.built, nnx.Param)
  for path, p in jax.tree_util.tree_leaves_with_path(built):
    name = ".".join(str(getattr(k, "key", getattr(k, "name", ""))) for k in path)
    name, x = name.removesuffix(".value"), np.float64(p)[1]
    if name.endswith("A_log"):
      assert np.all((np.exp(x) >= 1e-4) & (np.exp(x) <= 16.01)), name
    elif name.endswith("dt_bias") and np.any(x):
      assert np.all((np.log1p(np.exp(x)) >= 9.9e-4) & (np.log1p(np.exp(x)) <= 0.101)), name
    elif name.endswith("conv.weight"):
      assert np.abs(x).max() <= len(x) ** -0.5, name
      np.testing.assert_allclose(x.std() * len(x) ** 0.5, 3**-0.5, rtol=0.25, err_msg=name)
    elif name.endswith("_features"):
      for W in x:
        np.testing.assert_allclose(W @ W.T * len(W) ** 0.5, np.eye(len(W)), atol=1e-5)
    elif name.endswith(("kernel", "group_proj", "mix_up", "W1", "W2")):
      own = [v for (n, part), v in STARTS.items() if n == case.cls.name and part in name]
      for matrix in x.reshape(-1, *x.shape[-2:]):
        got = matrix.std() * len(matrix) ** 0.5
        np.testing.assert_allclose(got, *own or [1], rtol=0.25, atol=1e-9, err_msg=name)


# The whole layer.


@of_shapes
def test_causal(case):
  """Bit for bit: what comes later changes nothing earlier, with and without documents."""
  changed = case.x.copy()
  changed[:, 5:] += random(3, B, T - 5, D)
  y, z = case.packed[0], case.gradients(changed, case.cotangent, SEGMENTS)[0]
  np.testing.assert_array_equal(y[:, :5], z[:, :5])
  assert np.abs(y[:, 5:] - z[:, 5:]).max() > 1e-3
  np.testing.assert_array_equal(case.alone[:, :5], case.outputs(changed)[:, :5])


def test_packed(case):
  """Documents in a row give what each gives alone: outputs, and the gradients of parameters and inputs.

  The same float32 terms are added in another order: 1e-4.
  """
  rows = []
  for b, ids in enumerate(SEGMENTS):
    starts = [0, *(np.flatnonzero(np.diff(ids)) + 1), T]
    rows += [(b, s, e) for s, e in zip(starts, starts[1:], strict=False)]
  assert len(rows) == 2 * B

  def each(x, rows):  # each document in a row of its own; what follows it there has no influence
    return np.stack([np.pad(x[b, s:e], ((0, T - e + s), (0, 0))) for b, s, e in rows])

  y, grads = case.packed
  total: dict = {}
  for some in (rows[:B], rows[B:]):
    z, alone = case.gradients(each(case.x, some), each(case.cotangent, some), WHOLE)
    dx = alone.pop("[1]")
    total = {k: v + total.get(k, 0) for k, v in alone.items()}
    for (b, s, e), row, drow in zip(some, z, dx, strict=True):
      np.testing.assert_allclose(y[b, s:e], row[: e - s], rtol=1e-4, atol=1e-4)
      assert error(grads["[1]"][b, s:e], drow[: e - s]) < 1e-4
  assert_close({k: v for k, v in grads.items() if k != "[1]"}, total, 1e-4, 1 - 1e-8)


def read(case, pieces, total, dtype=jnp.float32):
  """Outputs of tokens that come in pieces of three, then one by one, from an empty cache."""
  cache = first = case.cache(12, dtype)
  tokens, done, out = case.x.astype(dtype), 0, []
  for _ in range(pieces):
    pos = np.broadcast_to(done + np.arange(3), (B, 3))
    y, cache = case.prefill(tokens[:, done : done + 3], pos, WHOLE[:, :3], cache)
    out.append(y)
    done += 3
  x = np.pad(tokens, ((0, 0), (0, 4), (0, 0)))[:, done : done + 4]
  y, cache = case.decode(x, np.full(B, done), cache)
  assert jax.tree.map(jax.typeof, cache) == jax.tree.map(jax.typeof, first)
  return np.concatenate([*out, y], axis=1)[:, :total]


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_decode(case, pieces):
  """A prompt in no, one or two pieces, then token by token (a scan: the cache keeps its form) is the whole sequence.

  float32 sums in another order: 1e-4.
  """
  total = min(3 * pieces + 4, T)
  np.testing.assert_allclose(read(case, pieces, total), case.alone[:, :total], rtol=1e-4, atol=1e-4)


@of_few
def test_decode_in_bfloat16(case):
  """A prompt and four more tokens, activations and cache in bfloat16, beside the whole sequence in float32: as
  ``test_bfloat16``, and half as much again, for what a step reads was rounded when it was kept."""
  case = for_bfloat16(case)
  y = read(case, 1, T, jnp.bfloat16)
  assert y.dtype == jnp.bfloat16
  assert error(y, case.alone) < 0.03


@of_shapes
@pytest.mark.parametrize("pieces", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_left_padding(case, pieces):
  """Prompts of different lengths, padded on the left, are as good as alone; also where a piece is padding only."""
  lengths = np.array([3, 2, 1, 3])
  columns = np.arange(3 * pieces) - (3 * pieces - lengths)[:, None]  # the token at each column
  ids = (columns >= 0).astype(np.int32)
  rows = np.arange(B)[:, None]
  noise = random(8, *ids.shape, D)
  x = np.where(ids[..., None] > 0, case.x[rows, np.maximum(columns, 0)], noise)
  cache, y = case.cache(12), None
  for i in range(pieces):
    part = slice(3 * i, 3 * i + 3)
    pos = np.maximum(columns[:, part], 0)
    y, cache = case.prefill(x[:, part], pos, ids[:, part], cache)
  z, _ = case.decode(case.x[rows, lengths[:, None] + np.arange(4)], lengths, cache)
  for b, n in enumerate(lengths):
    want = case.alone[b, : n + 4]
    np.testing.assert_allclose(y[b, 3 - n :], want[:n], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(z[b], want[n:], rtol=1e-4, atol=1e-4)


@of_shapes
def test_odd_length(case):
  """One more token than the engine's chunk, which on a CPU is 16 or 32: the last is alone in its chunk."""
  more = random(5, B, 33 - T, D)
  want = case.outputs(np.concatenate([case.x, more], axis=1))
  assert np.isfinite(want).all()
  np.testing.assert_allclose(want[:, :T], case.alone, rtol=1e-4, atol=1e-4)
  more[:, -1:] += 1
  after = case.outputs(np.concatenate([case.x, more], axis=1))
  np.testing.assert_array_equal(after[:, :-1], want[:, :-1])
  assert np.abs(after[:, -1] - want[:, -1]).max() > 1e-3


@of_few
@pytest.mark.parametrize("length", [1, 32])
def test_prefix(case, length):
  """One token, and whole chunks: as those of a longer sequence."""
  x = random(5, B, 33, D)
  want = case.outputs(x)[:, :length]
  np.testing.assert_allclose(case.outputs(x[:, :length]), want, rtol=1e-4, atol=1e-4)


def for_bfloat16(case):
  """A case whose bfloat16 can be held to its float32.

  bfloat16 keeps 8 bits, a rounding error of 2e-3; some dozens of roundings on the way add up to several percent. Where
  an indexer chooses, all is chosen: it may rightly take another of two whose rounded scores are nearly equal.
  """
  return Case(case.cls, case.settings | dict(top_k=8)) if case.cls.own_loss else case


def bfloat16_bound(case):
  """Of outputs. What a fit says of a query that is like no key is small, and the norm behind it makes its rounding
  large: of fits it is three percent."""
  return 0.03 if getattr(case.cls, "sums_of_squares", ()) else 0.02


@of_shapes
def test_bfloat16(case):
  case = for_bfloat16(case)
  y = case.outputs(case.x.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  assert error(y, case.alone) < bfloat16_bound(case)


@of_few
def test_gradients_in_bfloat16(case):
  """Of documents, the gradient of every parameter."""
  case = for_bfloat16(case)
  y, grads = case.packed
  z, low = case.gradients(case.x.astype(jnp.bfloat16), case.cotangent, SEGMENTS)
  assert z.dtype == jnp.bfloat16
  assert error(z, y) < bfloat16_bound(case)
  assert_close(low, grads, 0.2, 0.98)


def on_a_mesh(case, run, *args, data=4, context=1, model=2):
  """``run`` of parameters and of arrays of the batch, where devices share rows, tokens and heads."""
  sizes = dict(data=data, context=context, model=model)
  mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
  with jax.set_mesh(mesh):
    params = jax.device_put(case.params, sharding.shardings(case.params, mesh))
    return run(params, *jax.device_put(args, sharding.batch_sharding(mesh)))


def traced(run):
  """Shapes of what ``run`` gives: shardings are types, so that what is at odds does not trace."""
  return functools.partial(jax.eval_shape, run)


def sharded_gradients(case, **sizes):
  run = jax.jit(jax.grad(case.loss, argnums=(0, 1), has_aux=True))
  batch = case.x, case.cotangent, positions(SEGMENTS), SEGMENTS
  grads, y = jax.device_get(on_a_mesh(case, run, *batch, **sizes))
  return y, case.reached(by_name(grads))


def test_matrices_of_heads_are_not_taken_for_tokens():
  """TTT's W1 [H, K, K], where there are as many rows as heads and as many tokens as channels."""
  case = Case(mixers()["ttt_linear"], dict(num_heads=4, head_dim=8))
  x = random(1, 4, 8, D)
  run = traced(
    lambda params, x: case.forward(params, x, jnp.tile(jnp.arange(8, dtype=jnp.int32), (4, 1)))[0]
  )
  assert on_a_mesh(case, run, x, data=2, model=2).shape == x.shape


@of_few
def test_sharded(case):
  """Four parts of the batch times two of the heads: the same outputs and gradients (float32 sums in another order)."""
  y, grads = case.packed
  z, split = sharded_gradients(case, data=4, model=2)
  np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4)
  assert_close(split, grads, 1e-4, 1 - 1e-8)


@of_shapes
def test_gradients_on_a_mesh(case):
  """Of documents. As they come out of it, so they went in."""
  run = jax.grad(case.loss, argnums=(0, 1), has_aux=True)
  batch = case.x, case.cotangent, positions(SEGMENTS), SEGMENTS
  grads, y = on_a_mesh(case, traced(run), *batch)
  assert by_name(jax.tree.map(jnp.shape, grads[0])) == by_name(jax.tree.map(jnp.shape, case.params))
  assert y.shape == grads[1].shape == case.x.shape


def in_parts(case, params, x, cotangent, pos, ids):
  """``Case.loss`` on a mesh that shares the tokens of rows."""
  x, cotangent, pos, ids = map(sharding.split_rows, (x, cotangent, pos, ids))
  ctx = Context(pos, ids, case.shared(x), parts=sharding.size("context"))
  y = mix(case.layer(params), x, ctx, None).y
  return jnp.sum(y.astype(jnp.float32) * cotangent), sharding.whole_rows(y)


def gradients_in_parts(case):
  """Of rows in two parts, which documents cross: the gradients of parameters and inputs, and the outputs."""
  run = jax.grad(functools.partial(in_parts, case), argnums=(0, 1), has_aux=True)
  batch = (x[:, :6] for x in (case.x, case.cotangent, positions(SEGMENTS), SEGMENTS))
  return run, batch, dict(data=2, context=2, model=2)


@of_few
def test_in_parts(case):
  """As whole rows: their first six tokens, which know nothing of a seventh that has no gradient."""
  run, batch, sizes = gradients_in_parts(case)
  grads, z = jax.device_get(on_a_mesh(case, jax.jit(run), *batch, **sizes))
  cotangent = np.where(np.arange(T)[:, None] < 6, case.cotangent, 0)
  y, want = case.gradients(case.x, cotangent, SEGMENTS)
  want["[1]"] = want["[1]"][:, :6]
  np.testing.assert_allclose(z, y[:, :6], rtol=1e-4, atol=1e-4)
  assert_close(case.reached(by_name(grads)), want, 1e-4, 1 - 1e-8)


def test_who_computes_otherwise_says_that_it_takes_parts():
  """It is not inherited from what computed otherwise: whole rows are always right."""
  for name, cls in mixers().items():
    order = [vars(c) for c in cls.__mro__]
    said, computed = (
      next(i for i, names in enumerate(order) if what in names) for what in ("in_parts", "__call__")
    )
    assert said <= computed or not cls.in_parts, name


@of_shapes
def test_gradients_in_parts(case):
  run, batch, sizes = gradients_in_parts(case)
  grads, y = on_a_mesh(case, traced(run), *batch, **sizes)
  assert y.shape == grads[1].shape == (B, 6, D)


@of_shapes
def test_cached_on_a_mesh(case):
  """Prefill, then decoding in a loop."""

  def run(params, x, pos, ids):
    cache = case.layer(params).init_cache(B, 12)
    _, cache = case.forward(params, x[:, :3], pos[:, :3], ids[:, :3], cache)

    def body(i, cache):
      return case.forward(params, x[:, 3:4], pos[:, 3:4] + i, None, cache)[1]

    return jax.lax.fori_loop(0, 2, body, cache)

  on_a_mesh(case, traced(run), case.x, positions(WHOLE), WHOLE)


@of_few
def test_one_row_on_a_mesh(case):
  """A slice of its ids may be a single number, of which jax forgets where it lies."""
  batch = (x[:1, :3] for x in (case.x, positions(WHOLE), WHOLE))
  on_a_mesh(case, traced(case.forward), *batch, data=1, model=1)


@of_shapes
def test_built_by_vmap(case):
  """Layers built over their number are those built one by one."""
  one, stacked = by_name(case.build(2, case.keys[1])), by_name(case.built)
  for name, value in one.items():
    np.testing.assert_allclose(stacked[name][1], value, rtol=1e-5, atol=1e-6)


@of_few
def test_scanned(case):
  """Layers that are scanned are those applied in turn. (That all can be, test_configs.py traces.)"""
  # The first layer of a kind is handed zeros.
  first = jax.tree.map(np.zeros_like, case.shared(case.x))
  in_turn = case.x, first
  for i in range(LAYERS):
    _, in_turn = case.step(case.unstacked(i), in_turn)
  scan = jax.jit(
    lambda x: jax.lax.scan(lambda c, l: case.apply(l, c)[::-1], (x, first), case.stacked)
  )
  np.testing.assert_allclose(scan(case.x)[0][0], in_turn[0], rtol=1e-4, atol=1e-4)


def test_parameters(case):
  """Every parameter says what its axes are and whether it decays; rates, steps and biases do not."""
  for path, p in nnx.to_flat_state(nnx.state(case.built, nnx.Param)):
    meta = p.get_metadata()
    assert len(meta["axes"]) == p[...].ndim - 1, path
    assert not meta["weight_decay"] or p[...].ndim > 2, path
    if {"A_log", "dt_bias", "bias"} & {str(part) for part in path}:
      assert not meta["weight_decay"], path


def test_key_heads_fewer_than_devices():
  """Value heads on four devices, key heads two: each device must get the key heads that its value heads use."""
  cls = mixers()["gated_deltanet"]
  case = Case(cls, dict(num_heads=2, num_value_heads=8))
  y, grads = case.packed
  z, split = sharded_gradients(case, data=2, model=4)
  np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4)
  assert_close(split, grads, 1e-4, 1 - 1e-8)


def residuals(capsys, f, *args):
  """Shape and origin of every array that the backward pass of f keeps."""
  print_saved_residuals(f, *args)
  found = re.findall(r"^\w+\[([\d,]*)\] (.*)$", capsys.readouterr().out, re.MULTILINE)
  return [(tuple(map(int, filter(None, shape.split(",")))), origin) for shape, origin in found]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_the_backward_pass_keeps(capsys, recompute):
  """Of a Gated DeltaNet layer: arguments, activations of each token, and the states at the chunks' boundaries: of the
  recurrence nothing else. Recomputed in the backward pass, the arguments alone."""
  cls, T, H, K, V = mixers()["gated_deltanet"], 512, 2, 16, 24
  config = configure(cls, dict(num_heads=H, head_dim=K, value_dim=V))
  layer = jax.eval_shape(lambda: cls(config, Layer(D), jax.random.key(0)))
  layer = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), layer)

  def f(layer, x):
    return layer(x, Context(jnp.arange(T)[None])).y

  kept = residuals(capsys, jax.checkpoint(f) if recompute else f, layer, random(0, 1, T, D))
  made = [(shape, origin) for shape, origin in kept if "argument" not in origin]
  if recompute:
    assert all(math.prod(shape) <= 1 for shape, _ in made), made
    return
  states = [shape for shape, _ in made if shape[-2:] == (K, V)]
  assert len(states) == 1 and states[0][1:] == (1, H, K, V)
  assert states[0][0] <= T // 16
  for shape, origin in made:  # a number or a vector of each token, or of none
    if shape not in states:
      size = math.prod(shape) / (T if T in shape else 1)
      assert shape.count(T) <= 1 and size <= 4 * H * V, (shape, origin)


# Identities between mechanisms.


@pytest.fixture
def inputs():
  """Random q, k, v, g, beta and a state in float64, of two heads."""
  with jax.enable_x64(True):

    def unit(x):
      return x / np.linalg.norm(x, axis=-1, keepdims=True)

    H, K = 2, 4
    yield (
      random(0, B, T, H, K),
      unit(random(1, B, T, H, K)),
      random(2, B, T, H, K + 1),
      -jax.nn.softplus(random(3, B, T, H)),
      2 * jax.nn.sigmoid(random(4, B, T, H)),
      random(5, B, H, K, K + 1),
    )


def assert_same(pairs, inputs):
  """Both of each pair of results: float64, two ways to compute one thing."""
  for a, b in jax.jit(pairs)(inputs):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


def channels(x, like):
  return jnp.broadcast_to(x[..., None], like.shape)


def test_identities_of_the_delta_rule(inputs):
  def pairs(inputs):
    q, k, v, g, beta, S = inputs
    options = dict(initial_state=S, return_state=True)
    delta = pk.delta_rule(q, k, v, beta, **options)
    gated = pk.gated_delta_rule(q, k, v, g, beta, **options)
    kda = pk.kda(q, k, v, channels(g, k), beta, **options)
    one = (k[..., None, :], v[..., None, :], beta[..., None])
    erase, write = channels(beta, k), channels(beta, v)
    scaled = q * k.shape[-1] ** -0.5
    return [
      # Without decay: DeltaNet.
      (pk.gated_delta_rule(q, k, v, 0 * g, beta, **options), delta),
      # The same decay in every channel: Gated DeltaNet.
      (kda, gated),
      # One step a token.
      (pk.gated_delta_product(q, *one, g, **options), gated),
      (pk.gated_delta_product(q, *one, **options), delta),
      # One step size for what is erased and what is written: KDA.
      (pk.gdn2(q, k, v, channels(g, k), erase, write, **options), kda),
      # Without decay, erasing under the key itself.
      (pk.comba(q, k, v, 0 * g, beta, jnp.ones(2), **options), delta),
      # Without decay, one rate for all channels, and the key that is removed is the one that is written.
      (pk.rwkv7(scaled, 0 * k, erase * k, v, k, erase, **options), delta),
    ]

  assert_same(pairs, inputs)


def test_no_step_keeps_the_state(inputs):
  q, k, v, g, beta, S = inputs
  run = jax.jit(functools.partial(pk.delta_rule, return_state=True))
  o, after = run(q, k, v, 0 * beta, initial_state=S)
  np.testing.assert_array_equal(after, S)
  want = jnp.einsum("bthk,bhkv->bthv", q * k.shape[-1] ** -0.5, S)
  np.testing.assert_allclose(o, want, rtol=1e-12)


def test_identities_of_decay(inputs):
  def pairs(inputs):
    q, k, v, g, _, S = inputs
    options = dict(initial_state=S, return_state=True)
    linear = pk.linear_attention(q, k, v, scale=1.0, **options)
    constant = jnp.array([-0.1, -1.0])
    lightning = pk.lightning_attention(q, k, v, constant, scale=1.0, **options)
    ssd = pk.ssd(v, -g, -jnp.ones(2), k, q, **options)
    nothing_before = (jnp.zeros((B, 2, 1, 4)), jnp.zeros((B, 2, 1, 5)))
    y, (after, *_) = pk.mamba3(
      *(x[..., None, :] for x in (q, k, v)),
      g,
      -g,
      jnp.ones_like(g),
      initial_state=(S, *nothing_before),
      return_state=True,
    )
    return [
      (pk.gla(q, k, v, 0 * k, scale=1.0, **options), linear),
      (pk.lightning_attention(q, k, v, 0 * constant, scale=1.0, **options), linear),
      (pk.retention(q, k, v, constant, scale=1.0, **options), lightning),
      # A step of one.
      (pk.ssd(v, jnp.ones_like(g), constant, k, q, **options), lightning),
      # A token's own weight of one, without decay.
      (pk.rwkv6(q, k, v, 0 * k, jnp.ones((2, 4)), **options), linear),
      # All of the trapezoid's weight on the token itself: Mamba-2.
      ((y[..., 0, :], after), ssd),
    ]

  assert_same(pairs, inputs)
