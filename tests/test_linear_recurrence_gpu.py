"""The GPU kernels of the linear recurrence in Pallas's interpreter, against the reference in float64.

That the compilers for a Hopper GPU accept them, without spilling registers, is in test_gpu_compile.py.

Bounds. float32: an operand of a product is two bfloat16 of 8 bits each, and the product of the low parts is dropped:
roundings of 2^-17, some of them in a row: 3e-5. bfloat16: operands are rounded to 2^-9, outputs and gradients are a few
such roundings off: 1.5e-2; keys of correlation 0.9 under beta 1.9 amplify them.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_races import watch
from jax.experimental.pallas import mosaic_gpu as plgpu
from recurrences import (
  CASES,
  FEW,
  assert_close,
  call,
  cast,
  ids,
  jit,
  make,
  rounded,
  run,
  some,
)  # fmt: skip

from pallas_kernels import dispatch
from pallas_kernels.cost.kernels import pallas_calls
from pallas_kernels.linear_recurrence import (
  api,
  gpu,
  gpu_gradients,
  gpu_stream,
  linear_recurrence,
  linear_recurrence_step,
)

KDA, GDN = ("channel", "key", "decayed", False), ("scalar", "key", "decayed", False)
RWKV6, RWKV7 = ("channel", None, "decayed", True), ("channel", "low", "undecayed", False)
SSD = ("scalar", None, "decayed", False)
# Three chunks: a change of segment within one, a segment of one token, an id that comes back in the next chunk, and a
# chunk in which a segment begins that ends in the one after.
SEGMENTS = np.repeat([1, 2, 3, 1, 2], [30, 1, 40, 20, 40])[None]


def inputs(case, dtype=jnp.float32, **sizes):
  with jax.enable_x64(True):
    r, S = make(*case, **{"T": 131, "B": 1, "H": 1, "Hv": 2, "K": 64, "V": 64, **sizes})
    return rounded(r, dtype), cast(S, jnp.float32)


def both(r, S, segment_ids=None):
  """What the kernels give, and the reference in float64 for the same inputs."""
  got = run(r, S, segment_ids, backend="interpret_gpu", chunk=64)
  with jax.enable_x64(True):
    r, S = cast((r, S), jnp.float64)
    return got, run(r, S, segment_ids, backend="reference", chunk=None)


@pytest.mark.parametrize("case", some(CASES, [SSD, KDA, RWKV6, RWKV7]))
def test_matches_reference(case):
  """Outputs, final state and every gradient, of packed segments. (An erase whose value heads share keys:
  ``test_bfloat16``.)"""
  heads = 2 if case[1] is None else 1
  assert_close(*both(*inputs(case, Hv=heads), SEGMENTS), 3e-5)


@pytest.mark.parametrize("case", some([GDN, *FEW], [GDN]))
def test_bfloat16(case):
  assert_close(*both(*inputs(case, jnp.bfloat16), SEGMENTS), 1.5e-2)


@pytest.mark.parametrize("case", some([("none", *GDN[1:]), GDN, RWKV7], [("none", *GDN[1:])]))
def test_correlated_keys(case):
  """Keys of correlation 0.9 and steps of 1.9: what breaks an inverse by powers (test_triangular.py)."""
  sizes = dict(rho=0.9, beta=1.9, T=128, Hv=1)
  assert_close(*both(*inputs(case, **sizes)), 1e-4)
  assert_close(*both(*inputs(case, jnp.bfloat16, **sizes)), 5e-2)


@pytest.mark.parametrize(
  "T", [1, 65, *(pytest.param(T, marks=pytest.mark.slow) for T in (2, 63, 64))]
)
def test_any_length(T):
  assert_close(*both(*inputs(GDN, T=T, Hv=1)), 3e-5)


def test_nothing_but_queries_keys_and_values():
  """Without numbers a token, segments or tiles that are shared, a program has nothing to bring before it begins."""
  assert_close(*both(*inputs(("none", None, "decayed", False), T=65, Hv=1)), 3e-5)


def test_queries_of_another_dtype():
  """What is float32 has gradients of float32, whatever queries are."""
  r, S = inputs(GDN, T=64, Hv=1)
  got, want = both(dataclasses.replace(r, q=r.q.astype(jnp.bfloat16)), S)
  for name in ("k", "v"):
    a, b = (np.asarray(getattr(x["d"], name), np.float64) for x in (got, want))
    assert np.linalg.norm(a - b) < 3e-5 * np.linalg.norm(b), name


@pytest.mark.slow
@pytest.mark.parametrize("K, V", [(128, 128), (256, 64)])
@pytest.mark.parametrize("case", [RWKV6, GDN, RWKV7], ids=ids)
def test_larger_states(case, K, V):
  """More than one block of a state's rows, and of its columns; with 256 keys blocks of 32 columns."""
  assert_close(*both(*inputs(case, jnp.bfloat16, K=K, V=V, T=100)), 1.5e-2)


# Of an erase, with more keys than the walk over chunks has room for: they come a block of channels at a time.
LONG = [(GDN, 256), (KDA, 256), (RWKV7, 128), (("scalar", "low", "decayed", False), 256)]
LONG_NAMES = [f"{ids(case)}-{K}" for case, K in LONG]


@pytest.mark.parametrize(
  "case, K",
  [pytest.param(*x, marks=[pytest.mark.slow] if i else []) for i, x in enumerate(LONG)],
  ids=LONG_NAMES,
)
def test_long_float32_keys(case, K):
  r, S = inputs(case, K=K, Hv=1, T=95)
  assert gpu._scan(gpu._plan(r), 4) is gpu_stream
  assert_close(*both(r, S, SEGMENTS[:, :95]), 3e-5)


@pytest.mark.parametrize("case", some([GDN, KDA, RWKV7], [KDA]))
def test_decays_from_none_to_strong(case):
  """From 1 to e^-5 a token, some far beyond, and to nothing: exp of no difference overflows, and none leaks."""
  r, S = inputs(case, T=95, Hv=1)
  rng = np.random.default_rng(2)
  decay = -5.0 * rng.random(r.log_decay.shape) ** 3
  decay[rng.random(decay.shape) < 0.02] = -1e4
  decay[rng.random(decay.shape) < 0.02] = -np.inf
  r = dataclasses.replace(r, log_decay=jnp.asarray(decay, jnp.float32))
  assert_close(*both(r, S, SEGMENTS[:, :95]), 3e-5)


def test_gate_gradients_summed_over_time():
  """What a model's A_log gets: a sum over tokens, in which roundings that do not cancel would stay."""
  r, S = inputs(KDA, jnp.bfloat16, T=256, Hv=1)
  got, want = both(r, S)
  total = [np.sum(np.float64(x["d"].log_decay) * r.log_decay, axis=1) for x in (got, want)]
  assert_close(*total, 1.5e-2)


outputs = jit(functools.partial(call, backend="interpret_gpu", chunk=64))


@pytest.mark.parametrize("case", some(FEW[1:], [KDA]))
def test_bitwise_causal(case):
  """Later tokens, however large, change no bit of earlier outputs."""
  r, S = inputs(case, T=128, Hv=1)
  at = 77  # within a chunk
  later = jax.tree.map(lambda x: x.at[:, at:].multiply(-3.0) if x.ndim > 2 else x, r)
  if later.log_decay is not None:
    later = dataclasses.replace(later, log_decay=-jnp.abs(later.log_decay))
  a, b = outputs(r, S)[0], outputs(later, S)[0]
  np.testing.assert_array_equal(a[:, :at], b[:, :at])
  assert not np.array_equal(a[:, at:], b[:, at:])


def watched(monkeypatch, case, segment_ids, **sizes):
  """``both`` with races of all kernels looked for, in memory that is NaN where nothing was written."""
  mode = plgpu.InterpretGPUParams(uninitialized_memory="nan", detect_races=True)
  passes = (functools.partial(f, interpret=mode) for f in (gpu.forward, gpu.backward))
  monkeypatch.setitem(api._CHUNKED, "interpret_gpu", tuple(passes))
  r, S = inputs(case, **sizes)
  with watch() as kernels:
    got, want = both(r, S, segment_ids)
    jax.block_until_ready(got)
  # A chunk's operands and the walk, twice; then values, comparisons and channels.
  least = 7 if gpu_gradients.serves(gpu._plan(r)) else 4
  assert kernels.kernels >= least and not kernels.racy
  return got, want


@pytest.mark.parametrize("case", some([SSD, GDN, KDA, ("none", "low", *GDN[2:]), RWKV7], [GDN]))
def test_no_races_and_the_right_values(monkeypatch, case):
  """Packed, of an odd length, keys of correlation 0.9 and steps of 1.9: what is hard, in one program."""
  sizes = dict(T=95, Hv=1, rho=0.9, beta=1.9)
  assert_close(*watched(monkeypatch, case, SEGMENTS[:, :95], **sizes), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case, K", LONG, ids=LONG_NAMES)
def test_no_races_with_long_float32_keys(monkeypatch, case, K):
  assert_close(*watched(monkeypatch, case, SEGMENTS[:, :95], T=95, Hv=1, K=K), 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [GDN, RWKV7], ids=ids)
def test_no_races_between_programs(monkeypatch, case):
  """Two batch rows, shared key heads, two blocks of columns, a tail."""
  packed = np.repeat(np.pad(SEGMENTS, ((0, 0), (0, 4))), 2, axis=0)
  sizes = dict(dtype=jnp.bfloat16, B=2, V=128, T=135)
  assert_close(*watched(monkeypatch, case, packed, **sizes), 1.5e-2)


def test_what_no_kernel_holds_is_xla_s():
  """The gradients of a low-rank erase in float32."""
  p = gpu._plan(inputs(RWKV7)[0])
  assert not gpu_gradients.serves(p)
  assert gpu_gradients.serves(dataclasses.replace(p, parts=1))
  assert gpu_gradients.serves(dataclasses.replace(p, erase="key"))


@pytest.mark.parametrize(
  "capability, K, words", [("8.0", 64, "it is 8.0"), ("9.0", 32, "64, 128 or 256")]
)
def test_auto_becomes_xla_on_a_gpu_that_the_kernels_do_not_serve(monkeypatch, capability, K, words):
  """Another GPU, and a Hopper that is asked for other keys; named, the backend says why."""
  monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  card = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, "local_devices", lambda: [card])
  r, S = inputs(GDN, T=3, K=K, Hv=1)
  with pytest.raises(NotImplementedError, match=words):
    linear_recurrence(r, S, backend="gpu")
  got, want = (linear_recurrence(r, S, backend=name)[0] for name in ("auto", "xla"))
  np.testing.assert_array_equal(got, want)


def test_auto_is_the_kernels(monkeypatch):
  """For a sequence and for a token, in bfloat16 and float32."""
  monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
  monkeypatch.setattr(dispatch, "needs_hopper", lambda: None)
  for dtype in (jnp.bfloat16, jnp.float32):
    r, S = inputs(GDN, dtype)
    token = jax.tree.map(lambda x: x[:, :1], r)
    for fn, args in ((linear_recurrence, (r, S)), (linear_recurrence_step, (token, S))):
      assert pallas_calls(jax.make_jaxpr(fn)(*args).jaxpr)


def test_named_backend_says_why_it_cannot():
  r, S = inputs(GDN)
  with pytest.raises(NotImplementedError, match="need a Hopper GPU; this is a cpu"):
    linear_recurrence(r, S, backend="gpu")
  with pytest.raises(NotImplementedError, match="chunks of 64"):
    linear_recurrence(r, S, backend="interpret_gpu", chunk_size=32)
  long = jax.tree.map(lambda x: jax.ShapeDtypeStruct((70_000, *x.shape[1:]), x.dtype), r)
  with pytest.raises(NotImplementedError, match="up to 65535 chunks of 64; got 210000"):
    gpu.supports(long, None)
  small, S = inputs(GDN, K=32)
  with pytest.raises(NotImplementedError, match="64, 128 or 256 channels"):
    linear_recurrence(small, S, backend="interpret_gpu")
  with jax.enable_x64(True):
    r, S = make(*GDN)
    with pytest.raises(NotImplementedError, match="float64"):
      linear_recurrence(r, S, backend="interpret_gpu")
