"""Softmax attention against a dense definition in numpy, float64, one query at a time."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.softmax_attention import cudnn, softmax_attention, splash, xla
from pallas_kernels.softmax_attention.bias import as_channels
from pallas_kernels.softmax_attention.visibility import Visibility

B, H, HKV, D, V = 2, 4, 2, 6, 5
# Rows of different documents; the second has one token alone.
SEGMENTS = np.stack([np.repeat([1, 2, 3], [5, 20, 15]), np.repeat([1, 2, 3], [30, 1, 9])])


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 8 queries and 16 keys, 4 where there is a window: a short sequence has many."""
  monkeypatch.setattr(xla, "_CPU", (8, 16))
  monkeypatch.setattr(xla, "_MOST_KEYS", 32)
  monkeypatch.setattr(xla, "_WINDOW", 4)


def inputs(Tq, Tk=None, heads=(H, HKV), seed=0, dims=(D, V)):
  """q, k, v and sinks."""
  rng = np.random.default_rng(seed)
  Tk = Tk or Tq
  shapes = (B, Tq, heads[0], dims[0]), (B, Tk, heads[1], dims[0]), (B, Tk, heads[1], dims[1])
  return [rng.normal(size=s) for s in (*shapes, (heads[0],))]


def definition(
  q,
  k,
  v,
  sinks=None,
  *,
  scale=None,
  window=None,
  key_bias=None,
  query_positions=None,
  key_positions=None,
  segment_ids=None,
  key_segment_ids=None,
):
  """Each query's logits over the keys it sees, and the sink's, through a softmax."""
  key_bias = np.zeros((*k.shape[:2], q.shape[2])) if key_bias is None else key_bias
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  query_positions = range(q.shape[1]) if query_positions is None else query_positions
  key_positions = range(k.shape[1]) if key_positions is None else key_positions
  key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
  o, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
  for b, t, h in np.ndindex(*q.shape[:3]):

    def sees(s, b=b, t=t):
      now, then = query_positions[t], key_positions[s]
      near = 0 <= then <= now and (window is None or now - then < window)
      return near and (segment_ids is None or segment_ids[b, t] == key_segment_ids[b, s])

    g = h // (q.shape[2] // k.shape[2])
    seen = [s for s in range(k.shape[1]) if sees(s)]
    logits = [scale * q[b, t, h] @ k[b, s, g] + key_bias[b, s, h] for s in seen]
    logits += [] if sinks is None else [sinks[h]]
    if logits:
      top = max(logits)
      lse[b, t, h] = top + np.log(np.sum(np.exp(np.array(logits) - top)))
      for s, logit in zip(seen, logits, strict=False):
        o[b, t, h] += np.exp(logit - lse[b, t, h]) * v[b, s, g]
  return o, lse


def arrays(*args, **options):
  """Arguments with every numpy array made jax's."""
  return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, (args, options))


def attend(q, k, v, sinks=None, *, window=None, scale=None, backend="auto", **rest):
  """softmax_attention of numpy arrays, compiled: piece by piece it would take longer to compile than to run."""

  def run(args, rest):
    return within(*args, window=window, scale=scale, backend=backend, **rest)

  return jax.jit(run)(*arrays(q, k, v, sinks, **rest))


def within(q, k, v, sinks=None, **options):
  """The same inside a function that is compiled."""
  (q, k, v, sinks), options = arrays(q, k, v, sinks, **options)
  return softmax_attention(q, k, v, sinks=sinks, **options)


def weighted(o, lse, seed=1):
  """A scalar of both outputs, the same for numpy and jax."""
  rng = np.random.default_rng(seed)
  return (o * rng.normal(size=o.shape)).sum() + (lse * rng.normal(size=lse.shape)).sum()


def with_gradients(args, **options):
  """(o, lse) and the gradients of ``weighted`` in q, k, v (and sinks)."""

  def loss(args):
    out = within(*args, **options)
    return weighted(*out), out

  gradients, out = jax.jit(jax.grad(loss, has_aux=True))([jnp.asarray(x) for x in args])
  return out, gradients


# What a call may have, and a length: of the first blocks, of their borders, odd ones.
CASES = {
  "one": dict(T=1),
  "two": dict(T=2, sinks=True),
  "block": dict(T=8),
  "more": dict(T=9, sinks=True),
  "odd": dict(T=37),
  "heads each": dict(T=19, heads=(4, 4), sinks=True),
  "one key head": dict(T=19, heads=(3, 1)),
  "scale": dict(T=17, scale=0.3, sinks=True),
  "window": dict(T=40, window=5),
  "window of one": dict(T=17, window=1, sinks=True),
  "window of a block": dict(T=33, window=8),
  "window past the start": dict(T=17, window=100),
  "segments": dict(T=40, segment_ids=SEGMENTS),
  "all": dict(T=40, window=7, segment_ids=SEGMENTS, sinks=True),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(float64, small_blocks, name):
  """Outputs, and every gradient of both of them."""
  case = dict(CASES[name])
  args = inputs(case.pop("T"), heads=case.pop("heads", (H, HKV)))[
    : 4 if case.pop("sinks", 0) else 3
  ]
  got, gradients = with_gradients(args, **case)
  dense, dense_gradients = with_gradients(args, **case, backend="reference")
  want = definition(*args, **case)
  for g, d, w in zip(got, dense, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(d, w, rtol=1e-12, atol=1e-12)
  rng = np.random.default_rng(2)
  for i, gradient in enumerate(gradients):
    # Against differences of the definition along a direction: their error is about 1e-9 of the value.
    direction = rng.normal(size=gradient.shape)

    def at(step, i=i, direction=direction):
      moved = [x + step * direction if j == i else x for j, x in enumerate(args)]
      return weighted(*definition(*moved, **case))

    difference = (at(1e-5) - at(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.vdot(gradient, direction), difference, rtol=1e-6, atol=1e-7)
    # Element by element, against JAX's derivative of the dense form.
    np.testing.assert_allclose(gradient, dense_gradients[i], rtol=1e-9, atol=1e-12)


def forgotten(T, heads=H, each=-0.5, seed=4):
  """Biases [B, T, heads] as forgetting attention has them: they grow along a row."""
  return -np.cumsum(each * np.random.default_rng(seed).exponential(size=(B, T, heads)), axis=1)


@pytest.mark.parametrize("heads", [(4, 4), (H, HKV)])
def test_biases_of_keys(float64, small_blocks, heads):
  """As test_matches_the_definition, for a bias of every key and query head."""
  *args, sinks = inputs(40, heads=heads)
  bias, case = forgotten(40), dict(window=7, segment_ids=SEGMENTS)
  sinks = sinks + bias.mean()  # they have a share

  def loss(bias, backend):
    out = within(*args, sinks, key_bias=bias, **case, backend=backend)
    return weighted(*out), out

  run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
  want = definition(*args, sinks, key_bias=bias, **case)
  direction = np.random.default_rng(2).normal(size=bias.shape)
  ends = [
    weighted(*definition(*args, sinks, key_bias=bias + e * direction, **case))
    for e in (1e-5, -1e-5)
  ]
  for backend in ("xla", "reference"):
    gradient, got = run(jnp.asarray(bias), backend)
    for g, w in zip(got, want, strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)
    difference = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(np.vdot(gradient, direction), difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-4), ("bfloat16", 2**-7)])
def test_large_biases_keep_their_differences(dtype, bound):
  """Biases of up to 600, whose float32 spacing is 6e-5, where bfloat16's is 4. What is rounded in bfloat16 is scaled q,
  p and o, each by 2^-9."""
  q, k, v, _ = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in inputs(300))
  bias = forgotten(300, each=-2.0).astype(np.float32)
  assert bias.max() > 500
  o, lse = attend(*(jnp.asarray(x, dtype) for x in (q, k, v)), key_bias=bias)
  assert o.dtype == dtype and lse.dtype == jnp.float32
  want = definition(q, k, v, key_bias=np.float64(bias))
  assert relative(np.asarray(o), want[0]) < bound
  # Of numbers of up to 600: their spacing, and the roundings of scaled q.
  np.testing.assert_allclose(lse, want[1], atol=2e-4 if dtype == "float32" else 2e-2)


CACHES = {
  # The slots after the queries are not filled.
  "cache": dict(Tq=5, Tk=43, query_positions=np.arange(13, 18)),
  "one token": dict(Tq=1, Tk=43, query_positions=np.array([17])),
  # A ring of slots, in any order, some never filled.
  "ring": dict(
    Tq=9,
    Tk=35,
    query_positions=np.arange(40, 49),
    key_positions=np.r_[np.roll(np.arange(20, 48), 9), np.full(7, -1)],
  ),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_caches(float64, small_blocks, name, window, padded):
  options = dict(CACHES[name])
  q, k, v, sinks = inputs(Tq := options.pop("Tq"), Tk := options.pop("Tk"))
  if padded:  # on the left of the second row's prompt
    keys = np.ones((B, Tk), int)
    keys[1, :15] = 0
    options |= dict(segment_ids=np.ones((B, Tq), int), key_segment_ids=keys)
  got = attend(q, k, v, sinks, window=window, **options)
  for g, w in zip(got, definition(q, k, v, sinks, window=window, **options), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


def test_unfilled_slots_may_hold_anything(small_blocks):
  q, k, v, _ = inputs(3, 40)
  positions = np.arange(20, 23)
  want = attend(q, k, v, query_positions=positions)
  k[:, 23:], v[:, 23:] = 1e30, -1e30
  got = attend(q, k, v, query_positions=positions)
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  "backend, with_sinks", [("xla", False), ("xla", True), ("reference", False)]
)
def test_a_query_that_sees_nothing(small_blocks, backend, with_sinks):
  """Gives zero, and finite gradients to everything; one of the sinks is as good as none."""
  *args, sinks = inputs(12, 20)
  sinks[0] = -np.inf
  args = args + [sinks] * with_sinks
  options = dict(query_positions=np.arange(12), segment_ids=np.ones((B, 12), int))
  options["key_segment_ids"] = np.ones((B, 20), int)
  options["key_segment_ids"][0] = 2

  def run(args):
    o, lse = within(*args, **options, backend=backend)
    return jnp.sum(o) + jnp.sum(jnp.exp(lse)), (o, lse)

  gradients, (o, lse) = jax.jit(jax.grad(run, has_aux=True))([jnp.asarray(x) for x in args])
  assert not np.any(o[0]) and np.all(np.isfinite(o))
  expected = np.broadcast_to(sinks.astype(np.float32) if with_sinks else -np.inf, lse[0].shape)
  np.testing.assert_allclose(lse[0], expected, rtol=1e-6)
  assert all(np.all(np.isfinite(g)) for g in gradients)
  assert not np.any(gradients[1][0])


def test_an_id_that_comes_back_is_a_new_segment(float64, small_blocks):
  q, k, v, _ = inputs(21)
  ids = np.tile(np.repeat([1, 2, 1], 7), (B, 1))
  distinct = np.tile(np.repeat([1, 2, 3], 7), (B, 1))
  want = definition(q, k, v, segment_ids=distinct)[0]
  np.testing.assert_allclose(attend(q, k, v, segment_ids=ids)[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window, segment_ids", [(None, None), (9, SEGMENTS)])
def test_bitwise_causal(small_blocks, window, segment_ids):
  q, k, v, sinks = (x.astype(np.float32) for x in inputs(40))
  before = attend(q, k, v, sinks, window=window, segment_ids=segment_ids)
  for x in (q, k, v):
    x[:, 19:] = 1e6
  after = attend(q, k, v, sinks, window=window, segment_ids=segment_ids)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, :19], b[:, :19]), before, after)


def relative(got, want):
  return np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)


def test_real_blocks_in_float32():
  """Several blocks of their real size, the last of each not whole: sums of about 1000 terms in float32."""
  args = inputs(1100, heads=(2, 1))
  ids = np.sort(np.random.default_rng(3).integers(0, 3, (B, 1100)), axis=1)

  def run(backend):
    return jax.tree.leaves(with_gradients(args, segment_ids=ids, backend=backend))

  got = run("xla")
  with jax.enable_x64(True):
    want = run("reference")
  for g, w in zip(got, want, strict=True):
    assert g.dtype == jnp.float32 and w.dtype == jnp.float64
    assert relative(np.asarray(g), np.asarray(w)) < 2e-6


def test_bfloat16():
  """Against float64 on the same rounded inputs.

  p is rounded once and o once (2^-9 each); dlogits, which are differences, and the outputs in the backward pass: 1 %.
  """
  rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs(300)[:3]]
  sinks = jnp.asarray(inputs(1)[3], jnp.float32)

  def run(dtype, backend):
    def loss(args, sinks):
      o, lse = within(*args, sinks, backend=backend)
      assert o.dtype == dtype and lse.dtype == jnp.promote_types(dtype, jnp.float32)
      return weighted(o.astype(lse.dtype), lse), (o, lse)

    args = [x.astype(dtype) for x in rounded]
    gradients, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(args, sinks)
    assert gradients[1].dtype == sinks.dtype
    return [np.asarray(x, np.float64) for x in jax.tree.leaves((out, gradients))]

  got = run(jnp.bfloat16, "xla")
  with jax.enable_x64(True):
    sinks = sinks.astype(jnp.float64)
    want = run(jnp.float64, "reference")
  bounds = [2**-8, 2**-16, 1e-2, 1e-2, 1e-2, 1e-2]
  for g, w, bound in zip(got, want, bounds, strict=True):
    assert relative(g, w) < bound


def test_memory_is_linear_in_length():
  """Of forward and backward: at twice the length at most twice the bytes (the dense form: four times)."""

  def temporary(T):
    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    gradient = jax.grad(lambda q, k, v: jnp.sum(softmax_attention(q, k, v)[0]), (0, 1, 2))
    return jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

  short, long = temporary(4096), temporary(8192)
  assert long <= 2 * short
  assert long < 8192 * 8192 / 10


def visits(T, window=None, segment_ids=None):
  """Blocks of keys for each block of queries."""
  ids = None if segment_ids is None else jnp.asarray(segment_ids)
  seen = Visibility(jnp.arange(T), jnp.arange(T), ids, ids, window, True)
  return reached(T, T, seen)


def reached(Tq, Tk, seen):
  blocks = []

  def run(seen):
    blocks.append(xla._Blocks(Tq, Tk, seen))
    return blocks[0].end - blocks[0].first

  return np.asarray(jax.jit(run)(seen)), blocks[0]


def test_only_blocks_that_are_seen_are_computed():
  count, blocks = visits(4096)
  assert count.sum() < 0.6 * blocks.query_count * blocks.key_count
  count, blocks = visits(4100, window=300)
  assert count.max() * blocks.keys <= 3 * 512  # the window's block, and the queries' own
  ids = np.repeat(np.arange(8), 512)[None]
  count, blocks = visits(4096, segment_ids=ids)
  assert count.max() * blocks.keys == 512
  # A cache: only what is filled.
  count, blocks = reached(1, 65536, Visibility(jnp.array([3000]), jnp.arange(65536)))
  assert count[0] * blocks.keys < 3000 + blocks.keys


def test_residuals_are_inputs_and_outputs():
  q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in inputs(64))
  (o, lse), vjp = jax.jit(lambda *a: jax.vjp(softmax_attention, *a))(q, k, v)
  kept = sum(x.size for x in jax.tree.leaves(vjp))
  positions = 2 * 64
  assert kept <= sum(x.size for x in (q, k, v, o, lse)) + positions


# The libraries' kernels: this machine has no GPU and no TPU. jax.nn's own XLA form takes cuDNN's place, with the same
# arguments, and Pallas's interpreter the TPU's: what is tested is that they are asked for the right thing.
LIBRARIES = {
  "cudnn": functools.partial(cudnn.forward, implementation="xla"),
  "splash": functools.partial(splash.forward, interpret=True),
}


@pytest.mark.parametrize(
  "name, options",
  [
    ("cudnn", dict(window=5)),
    ("cudnn", dict(segments=True)),
    ("cudnn", dict(bias=True)),
    ("splash", dict()),
    ("splash", dict(bias=True)),
    ("splash", dict(sinks=True, segments=True, window=9)),
  ],
)
def test_libraries_are_asked_for_the_same(name, options):
  T, window = 40, options.get("window")
  args = inputs(T)[: 4 if options.get("sinks") else 3]
  ids = jnp.asarray(SEGMENTS) if options.get("segments") else None
  seen = Visibility(jnp.arange(T), jnp.arange(T), ids, ids, window, True)

  bias = jnp.asarray(forgotten(T), jnp.float32) if options.get("bias") else None

  def run(args, bias):
    q, k, v, *sinks = args
    scale = D**-0.5
    if bias is not None:
      q, k, scale = *as_channels(q, k, bias, scale), 1.0
    out = LIBRARIES[name](q, k, v, sinks[0] if sinks else None, seen, scale)
    return weighted(*out), out

  def dense(args, bias):
    return weighted(
      *within(*args, window=window, key_bias=bias, segment_ids=ids, backend="reference")
    )

  args = [jnp.asarray(x, jnp.float32) for x in args], bias
  of = 0 if bias is None else (0, 1)
  gradients, out = jax.jit(jax.grad(run, of, has_aux=True))(*args)
  gradients = jax.tree.leaves(gradients)
  arrays_ = [np.asarray(x) for x in args[0]]
  want = definition(
    *arrays_, window=window, key_bias=None if bias is None else np.asarray(bias), segment_ids=ids
  )
  for g, w in zip(out, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
  of_dense = jax.tree.leaves(jax.jit(jax.grad(dense, of))(*args))
  for g, w in zip(gradients, of_dense, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


def test_libraries_compute_lse_only_where_it_is_used():
  q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in inputs(600))
  seen = Visibility(jnp.arange(600), jnp.arange(600), aligned=True)

  def loops(which):
    def loss(q):
      return jnp.sum(LIBRARIES["cudnn"](q, k, v, None, seen, 1.0)[which])

    text = jax.jit(jax.grad(jax.checkpoint(loss))).lower(q).compile().as_text()
    return text.count(" while(")

  assert loops(0) == 0 < loops(1)


@pytest.mark.parametrize("with_lse", [False, True])
def test_auto_is_no_library_where_lse_is_used(monkeypatch, with_lse):
  asked = []
  monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
  monkeypatch.setattr(splash, "forward", lambda *args: asked.append("splash"))
  monkeypatch.setattr(xla, "forward", lambda *args: asked.append("xla"))
  q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs(40))
  softmax_attention(q, k, v, with_lse=with_lse)
  softmax_attention(q, k, v, with_lse=with_lse, backend="splash")
  assert asked == ["xla" if with_lse else "splash", "splash"]


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(dtype=jnp.float32), "bfloat16"),
    (dict(sinks=True), "sinks"),
    (dict(T=21, segments=True), "even"),
    (dict(T=100, segments=True), "larger than q"),
    (dict(segments=True, window=3), "window"),
    (dict(aligned=False), "positions"),
    (dict(max_dim=4), "channels"),
  ],
)
def test_what_cudnn_refuses(change, words):
  c = dict(dtype=jnp.bfloat16, sinks=False, T=20, segments=False, window=None) | change
  T, aligned, max_dim = c["T"], c.get("aligned", True), c.get("max_dim", 128)
  q, k, v, sinks = (jnp.asarray(x, c["dtype"]) for x in inputs(T))
  ids = jnp.ones((B, T), int) if c["segments"] else None
  seen = Visibility(jnp.arange(T), jnp.arange(T), ids, ids, c["window"], aligned)
  with pytest.raises(NotImplementedError, match=words):
    cudnn.limitations(q, k, v, sinks if c["sinks"] else None, seen, max_dim)


@pytest.mark.parametrize("backend, platform", [("splash", "tpu"), ("cudnn", "gpu")])
def test_libraries_refuse_queries_that_may_see_nothing(monkeypatch, backend, platform):
  """Keys that are padding, say: before the first of a query's id the library has a mean of values, not zero."""
  monkeypatch.setattr(dispatch, "platform", lambda: platform)
  card = types.SimpleNamespace(compute_capability="9.0")
  monkeypatch.setattr(jax, "local_devices", lambda: [card])
  T = 40
  args = [jnp.asarray(x, jnp.bfloat16) for x in inputs(T)[:3]]
  documents = dict(
    segment_ids=jnp.ones((B, T), int),
    key_segment_ids=jnp.tile(jnp.arange(T) >= 8, (B, 1)).astype(int),
  )
  with pytest.raises(NotImplementedError, match="key_segment_ids"):
    attend(*args, backend=backend, **documents)
  o, lse = attend(*args, **documents)
  want, want_lse = definition(*(np.asarray(x, np.float64) for x in args), **documents)
  assert not np.any(o[:, :8]) and np.all(lse[:, :8] == -np.inf)
  np.testing.assert_allclose(np.asarray(o, np.float64), want, rtol=2**-7, atol=2**-7)
  np.testing.assert_allclose(lse[:, 8:], want_lse[:, 8:], rtol=1e-2, atol=1e-2)


def test_splash_gives_sinks_a_gradient_of_their_dtype():
  x = jnp.ones(3, jnp.bfloat16)
  assert jax.grad(lambda x: jnp.sum(splash._own_dtype(x).astype(jnp.float32)))(x).dtype == x.dtype
  _, vjp = jax.vjp(splash._own_dtype, x)
  assert vjp(x)[0].dtype == x.dtype


@pytest.mark.parametrize("backend, words", [("cudnn", "GPU"), ("splash", "TPU")])
def test_a_named_backend_serves_or_says_why(backend, words):
  with pytest.raises(NotImplementedError, match=words):
    attend(*inputs(4), backend=backend)


def test_higher_derivatives_of_the_reference():
  """Along a direction, against differences of the first derivative."""
  with jax.enable_x64(True):
    q, k, v, _ = inputs(5)
    gradient = jax.grad(lambda q: weighted(*within(q, k, v, backend="reference")))
    direction = np.random.default_rng(5).normal(size=q.shape)
    second = jax.jit(jax.grad(lambda q: jnp.vdot(gradient(q), direction)))(q)
    gradient = jax.jit(gradient)
    difference = (gradient(q + 1e-5 * direction) - gradient(q - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(second, difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  "name, change",
  [
    ("q", dict(q=np.zeros((B, 6, H)))),
    ("k", dict(k=np.zeros((B, 6, HKV, D + 1)))),
    ("v", dict(v=np.zeros((B, 7, HKV, V)))),
    ("q's", dict(k=np.zeros((B, 6, 3, D)), v=np.zeros((B, 6, 3, V)))),
    ("q", dict(k=np.zeros((B, 7, HKV, D)), v=np.zeros((B, 7, HKV, V)))),
    ("window", dict(window=0)),
    ("sinks", dict(sinks=np.zeros(HKV))),
    ("key_bias", dict(key_bias=np.zeros((B, 6, HKV)))),
    ("query_positions", dict(query_positions=np.zeros(5, int))),
    ("key_positions", dict(key_positions=np.arange(6))),
    ("segment_ids", dict(segment_ids=np.zeros((B, 5), int))),
    ("key_segment_ids", dict(key_segment_ids=np.zeros((B, 6), int))),
  ],
)
def test_bad_arguments_are_named(name, change):
  q, k, v, _ = inputs(6)
  with pytest.raises(ValueError, match=rf"^{name} "):
    attend(**dict(q=q, k=k, v=v) | change)
