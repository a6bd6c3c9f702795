"""The short convolution against a loop over tokens and taps in numpy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_races

from pallas_kernels import dispatch
from pallas_kernels.short_conv import short_conv, short_conv_step

D = 5
# Rows with different segments, an id that comes back (a new segment all the same), and segments
# shorter than the taps.
SEGMENTS = np.array([[1] * 4 + [2] + [3] * 6, [7, 7, 3, 3, 3, 7, 7, 7, 7, 7, 1]])


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def loop(x, weight, bias, before, segment_ids):
  """The definition: one token, one tap at a time."""
  B, T, _ = x.shape
  W = weight.shape[0]
  y, after = np.zeros_like(x), np.zeros_like(before)
  for b in range(B):

    def tap(t, seen_from, b=b):
      """The input at t, as a token of that segment sees it."""
      for s in range(max(t, 0), seen_from):
        if segment_ids is not None and segment_ids[b, s] != segment_ids[b, s + 1]:
          return 0.0
      return x[b, t] if t >= 0 else before[b, W - 1 + t]

    for t in range(T):
      y[b, t] = 0 if bias is None else bias
      for w in range(W):
        y[b, t] += weight[w] * tap(t - (W - 1) + w, t)
    for w in range(W - 1):
      after[b, w] = tap(T - (W - 1) + w, T - 1)
  return y, after


def inputs(T, W=4, B=2, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (B, T, D), (W, D), (D,), (B, W - 1, D)
  return [rng.normal(size=s) for s in shapes]


@pytest.mark.parametrize("T", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("packed", [False, True])
def test_matches_the_loop(T, packed):
  segment_ids = SEGMENTS[:, :T] if packed else None
  x, weight, bias, before = inputs(T)
  got = short_conv(x, weight, bias, before, segment_ids=segment_ids)
  want = loop(x, weight, bias, before, segment_ids)
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("W", [1, 2, 7])
def test_any_number_of_taps(W):
  x, weight, _, before = inputs(5, W)
  got = short_conv(x, weight, None, before, segment_ids=SEGMENTS[:, :5])
  want = loop(x, weight, None, before, SEGMENTS[:, :5])
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


def test_no_state_is_zero_state():
  x, weight, bias, before = inputs(6)
  jax.tree.map(
    np.testing.assert_array_equal,
    short_conv(x, weight, bias),
    short_conv(x, weight, bias, 0 * before),
  )


@pytest.mark.parametrize("T, platform", [(2, "cpu"), (11, "cpu"), (37, "cpu"), (37, "gpu")])
@pytest.mark.parametrize("packed", [False, True])
def test_every_gradient_matches_the_loop(T, platform, packed, monkeypatch):
  """Also the weight's with B > 1 and packing. The loop is linear, so its transpose is exact."""
  monkeypatch.setattr(dispatch, "platform", lambda: platform)
  segment_ids = np.tile(SEGMENTS, (1, 4))[:, :T] if packed else None
  args = inputs(T)
  dy, dafter = (np.random.default_rng(1).normal(size=args[i].shape) for i in (0, 3))

  def value(conv, *args):
    y, after = conv(*args)
    return (y * dy).sum() + (after * dafter).sum()

  got = jax.grad(
    functools.partial(value, lambda *a: short_conv(*a, segment_ids=segment_ids)),
    argnums=(0, 1, 2, 3),
  )(*map(jnp.asarray, args))
  # Multilinear: the derivative along a unit vector is the difference of two values, exactly.
  numpy_value = functools.partial(value, lambda *a: loop(*a, segment_ids))
  base = numpy_value(*args)
  rng = np.random.default_rng(2)
  for i, (arg, gradient) in enumerate(zip(args, got, strict=True)):
    picks = range(arg.size) if arg.size <= 40 else rng.choice(arg.size, 40, replace=False)
    for at in picks:
      moved = arg.copy()
      moved.flat[at] += 1
      changed = numpy_value(*args[:i], moved, *args[i + 1 :])
      np.testing.assert_allclose(np.ravel(gradient)[at], changed - base, rtol=1e-9, atol=1e-9)


def test_packed_is_separate():
  """Outputs, and gradients of inputs and weights, of a packed row are its sequences' own."""
  lengths = (4, 1, 6)
  x, weight, bias, _ = inputs(sum(lengths), B=1)
  ids = np.repeat([1, 2, 1], lengths)[None]

  def loss(x, weight, ids):
    return jnp.sum(jnp.sin(short_conv(x, weight, bias, segment_ids=ids)[0]))

  gradient = jax.grad(loss, argnums=(0, 1))
  dx, dweight = gradient(x, weight, ids)
  parts = [gradient(p, weight, None) for p in np.split(x, np.cumsum(lengths)[:-1], axis=1)]
  np.testing.assert_allclose(dx, np.concatenate([p[0] for p in parts], axis=1), rtol=1e-12)
  np.testing.assert_allclose(dweight, sum(p[1] for p in parts), rtol=1e-12)


def test_another_segment_cannot_poison():
  x, weight, bias, before = inputs(11)
  x[0, :4], before[0] = np.nan, np.inf
  y, after = short_conv(x, weight, bias, before, segment_ids=SEGMENTS)
  assert np.isfinite(y[0, 4:]).all() and np.isfinite(after).all()


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_prefill_and_steps_continue_each_other(cut):
  x, weight, bias, before = inputs(11)
  want, last = short_conv(x, weight, bias, before)
  y, state = short_conv(x[:, :cut], weight, bias, before)
  np.testing.assert_allclose(y, want[:, :cut], rtol=1e-12)
  for t in range(cut, 11):
    y, state = short_conv_step(x[:, t : t + 1], weight, state, bias)
    np.testing.assert_allclose(y, want[:, t : t + 1], rtol=1e-12)
  np.testing.assert_array_equal(state, last)


def test_bitwise_causal():
  x, weight, bias, before = inputs(11)
  later = x.copy()
  later[:, 6:] = 1e30
  a, b = short_conv(x, weight, bias, before)[0], short_conv(later, weight, bias, before)[0]
  np.testing.assert_array_equal(a[:, :6], b[:, :6])


def test_bfloat16():
  """Rounded once, at the end: within half a bfloat16 ulp (2^-9) of float32, and gradients as well.

  The weight's gradient is float32 all the way; it would lose 1 % here if it were summed in bfloat16.
  """
  x, weight, bias, before = (jnp.asarray(a, jnp.float32) for a in inputs(501, B=3))
  x, before = x.astype(jnp.bfloat16), before.astype(jnp.bfloat16)

  def run(dtype):
    def loss(x, weight, bias, before):
      y, after = short_conv(x.astype(dtype), weight, bias, before.astype(dtype))
      assert y.dtype == after.dtype == dtype
      return jnp.sum(y.astype(jnp.float32)), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
      x.astype(jnp.float32), weight, bias, before.astype(jnp.float32)
    )
    return y, gradients

  y, (dx, dweight, dbias, dbefore) = run(jnp.bfloat16)
  want, (dx32, dweight32, dbias32, dbefore32) = run(jnp.float32)
  np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-8, atol=0)
  np.testing.assert_allclose(dx, dx32, rtol=2**-8, atol=0)
  np.testing.assert_allclose(dbefore, dbefore32, rtol=2**-8, atol=0)
  assert dweight.dtype == dbias.dtype == jnp.float32
  scale = jnp.abs(dweight32).max()
  np.testing.assert_allclose(dweight, dweight32, atol=1e-5 * scale)
  np.testing.assert_allclose(dbias, dbias32, rtol=1e-6)


def test_backward_keeps_inputs_only():
  x, weight, bias, before = (jnp.asarray(a, jnp.float32) for a in inputs(11))
  _, vjp = jax.vjp(lambda *a: short_conv(*a), x.astype(jnp.bfloat16), weight, bias, before)
  kept = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(vjp))
  inputs_bytes = x.size * 2 + 4 * (weight.size + bias.size) + 2 * before.size
  assert kept <= inputs_bytes


@pytest.mark.parametrize(
  "name, change",
  [
    ("x", dict(x=np.zeros((2, D)))),
    ("x", dict(x=np.zeros((2, 0, D)))),
    ("weight", dict(weight=np.zeros((4, D + 1)))),
    ("weight", dict(weight=np.zeros((0, D)))),
    ("bias", dict(bias=np.zeros((1, D)))),
    ("initial_state", dict(initial_state=np.zeros((2, 4, D)))),
    ("segment_ids", dict(segment_ids=np.zeros((2, 10), int))),
  ],
)
def test_bad_shapes_name_the_argument(name, change):
  x, weight, bias, before = inputs(11)
  good = dict(x=x, weight=weight, bias=bias, initial_state=before, segment_ids=SEGMENTS)
  with pytest.raises(ValueError, match=rf"^{name} must"):
    short_conv(**good | change)


def test_step_takes_one_token_and_its_state():
  x, weight, bias, before = inputs(2)
  with pytest.raises(ValueError, match="one token"):
    short_conv_step(x, weight, before, bias)
  with pytest.raises(ValueError, match="^state must"):
    short_conv_step(x[:, :1], weight, before[:, 1:], bias)


# --- the TPU kernels, in Pallas's interpreter ---


def packed_ids(B, T, seed=3):
  """Segments of three tokens on average, so that taps meet their ends everywhere."""
  return np.cumsum(np.random.default_rng(seed).random((B, T)) < 0.3, axis=1)


def in_float64(args):
  """All of them but ids."""
  exact = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
  return jax.tree.map(exact, args)


def run_and_gradients(backend, args, segment_ids, dy, dafter):
  def run(*args):
    return short_conv(*args, segment_ids=segment_ids, backend=backend)

  @jax.jit
  def both(*args):
    out, vjp = jax.vjp(run, *args)
    return out, vjp((dy, dafter))

  return both(*args)


# Lengths around the taps, a register's 8 rows and a block's 128; channels around the 128 lanes; one or two halo
# registers; the last inputs, which are the final state, in one piece of a block, in two, and in two blocks.
@pytest.mark.parametrize(
  "T, channels, W, packed",
  [
    (1, 5, 4, True),
    (2, 130, 4, False),
    (9, 5, 1, True),
    (34, 5, 12, True),
    (128, 128, 4, False),
    (513, 5, 4, True),
  ],
)
def test_kernel_matches_xla(T, channels, W, packed):
  """In float32 both add the same few numbers in another order; the weight's and bias's sums are over B T of them."""
  rng = np.random.default_rng(T)
  B = 2
  shapes = (B, T, channels), (W, channels), (channels,), (B, W - 1, channels)
  args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
  ids = packed_ids(B, T) if packed else None
  dy, dafter = (jnp.asarray(rng.normal(size=shapes[i]), jnp.float32) for i in (0, 3))
  got = run_and_gradients("interpret", args, ids, dy, dafter)
  exact = in_float64((args, ids, dy, dafter))
  want = run_and_gradients("xla", *exact)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert g.dtype == jnp.float32
    np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6 * np.abs(w).max(initial=0))


def test_kernel_in_bfloat16():
  """Rounded once, at the end: half a bfloat16 ulp, 2^-9 of the value; sums of the weights stay float32."""
  x, weight, bias, before = (jnp.asarray(a, jnp.float32) for a in inputs(140))
  x, before = x.astype(jnp.bfloat16), before.astype(jnp.bfloat16)
  ids = packed_ids(2, 140)
  args = (x, weight, bias, before), ids, x, before
  (y, after), (dx, dweight, dbias, dbefore) = run_and_gradients("interpret", *args)
  assert y.dtype == after.dtype == dx.dtype == dbefore.dtype == jnp.bfloat16
  exact = in_float64(args)
  (wy, wafter), (wdx, wdweight, wdbias, wdbefore) = run_and_gradients("xla", *exact)
  for g, w in ((y, wy), (dx, wdx), (after, wafter), (dbefore, wdbefore)):
    # float32 sums before the rounding leave something where they cancel
    np.testing.assert_allclose(g.astype(jnp.float64), w, rtol=2**-8, atol=1e-6)
  for g, w in ((dweight, wdweight), (dbias, wdbias)):
    np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6 * np.abs(w).max())


def test_kernel_is_bitwise_causal():
  """Across pieces and blocks of the kernel, and in what an interrupted sequence would give."""
  x, weight, bias, before = (jnp.asarray(a, jnp.float32) for a in inputs(520))
  run = jax.jit(functools.partial(short_conv, backend="interpret"))
  y = run(x, weight, bias, before)[0]
  for cut in (6, 127, 513):
    later = run(x.at[:, cut:].set(jnp.nan), weight, bias, before)[0]
    np.testing.assert_array_equal(y[:, :cut], later[:, :cut])


def test_kernel_keeps_segments_apart():
  """Not even NaN crosses from one segment to another, forward or backward."""
  x, weight, bias, before = (jnp.asarray(a, jnp.float32) for a in inputs(140))
  ids = np.repeat([[1, 2, 3]], [70, 10, 60], axis=1).repeat(2, axis=0)
  spoiled = x.at[:, 70:80].set(jnp.nan)

  def loss(x):
    y, after = short_conv(x, weight, bias, before, segment_ids=ids, backend="interpret")
    return jnp.sum(jnp.sin(y)) + jnp.sum(after), y

  dx, y = jax.jit(jax.grad(loss, has_aux=True))(spoiled)
  for a in (dx, y):
    assert np.isnan(a[:, 70:80]).any()
    assert np.isfinite(a[:, :70]).all() and np.isfinite(a[:, 80:]).all()


def test_kernel_without_races_or_unwritten_memory():
  from pallas_kernels import segments
  from pallas_kernels.short_conv import tpu, xla

  x, weight, bias, before = (jnp.asarray(a, jnp.float32) for a in inputs(130))
  runs = segments.runs(jnp.asarray(packed_ids(2, 130), jnp.int32))
  args = x, weight, bias, before, runs
  with tpu_races.none(2):
    pairs = [(tpu.forward(*args, interpret=tpu_races.STRICT), xla.forward(*args))]
    args = *args, x, before
    pairs.append((tpu.backward(*args, interpret=tpu_races.STRICT), xla.backward(*args)))
    for got, want in pairs:
      for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_there_is_no_gpu_kernel_and_it_says_why():
  x = jnp.ones((1, 4096, 128), jnp.bfloat16)  # 1 MiB
  with pytest.raises(NotImplementedError, match="XLA.* 2 MiB forward.* 5 MiB of at least 3"):
    short_conv(x, jnp.ones((4, 128)), backend="gpu")


def test_named_kernel_says_that_this_is_no_tpu():
  with pytest.raises(NotImplementedError, match="needs a TPU; this is a cpu"):
    short_conv(jnp.ones((1, 4, 8)), jnp.ones((4, 8)), backend="tpu")


def test_kernel_refuses_float64():
  x, weight, bias, before = inputs(5)
  with pytest.raises(NotImplementedError, match="float64"):
    short_conv(x, weight, bias, before, backend="interpret")
  with pytest.raises(ValueError, match="unknown backend"):
    short_conv(x, weight, bias, before, backend="triton")
