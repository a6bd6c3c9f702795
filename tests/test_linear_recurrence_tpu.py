"""The TPU kernels of the linear recurrence in Pallas's interpreter, against the reference in float64.

The interpreter runs the kernels' own arithmetic, roundings to bfloat16 included. Chunks of 32 tokens
keep compiling cheap and pass through every part of a chunk of 128, which some cases take too. That
the chips' compilers accept the kernels is tested in test_tpu_compile.py.

Bounds. float32: products of 24 bits, sums of some hundred terms, a triangular solve: 1e-5. bfloat16:
operands of products are rounded to 2^-9, which errors of one to three roundings in outputs and up to
twice that in gradients follow; keys of correlation 0.9 under beta 1.9 amplify them tenfold.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_races
from recurrences import (
  CASES,
  FEW,
  assert_close,
  assert_cosines,
  call,
  cast,
  ids,
  jit,
  make,
  named,
  rounded,
  run,
  some,
)  # fmt: skip

from pallas_kernels import dispatch, segments
from pallas_kernels.cost.kernels import pallas_calls
from pallas_kernels.linear_recurrence import linear_recurrence, linear_recurrence_step, tpu

SEGMENTS = np.stack([np.repeat([1, 2, 3], [5, 40, 26]), np.repeat([4, 2, 4, 9], [1, 31, 8, 31])])


def both(r, S, segment_ids=None, *, chunk=32):
  """What the kernels give, and the reference in float64 for the same inputs."""
  got = run(r, S, segment_ids, backend="interpret", chunk=chunk)
  with jax.enable_x64(True):
    r, S = cast((r, S), jnp.float64)
    return got, run(r, S, segment_ids, backend="reference", chunk=None)


def inputs(case, dtype=jnp.float32, **sizes):
  with jax.enable_x64(True):
    r, S = make(*case, **{"T": 71, "H": 1, "Hv": 2, "K": 16, "V": 8, **sizes})
    return rounded(r, dtype), cast(S, jnp.float32)


KDA, GDN = ("channel", "key", "decayed", False), ("scalar", "key", "decayed", False)
RWKV6, RWKV7 = ("channel", None, "decayed", True), ("channel", "low", "undecayed", False)
SSD = ("scalar", None, "decayed", False)


@pytest.mark.parametrize(
  "case", some(CASES, [*FEW, RWKV6, SSD, ("constant", "key", "decayed", False)])
)
def test_matches_reference(case):
  """Outputs, final state and every gradient, two rows packed differently."""
  assert_close(*both(*inputs(case), SEGMENTS), 1e-5)


@pytest.mark.parametrize("case", some(FEW, [KDA, RWKV7]))
def test_bfloat16(case):
  assert_close(*both(*inputs(case, jnp.bfloat16), SEGMENTS), 1.5e-2)


@pytest.mark.parametrize("case", some([("none", *GDN[1:]), GDN, RWKV7], [("none", *GDN[1:])]))
def test_correlated_keys(case):
  """Keys of correlation 0.9 and steps of 1.9: what breaks an inverse by powers (test_triangular.py)."""
  sizes = dict(rho=0.9, beta=1.9, T=64, B=1, K=64)
  assert_close(*both(*inputs(case, **sizes)), 1e-4)
  assert_close(*both(*inputs(case, jnp.bfloat16, **sizes)), 5e-2)


@pytest.mark.parametrize("T", [1, 33, *(pytest.param(T, marks=pytest.mark.slow) for T in (31, 32))])
def test_any_length(T):
  assert_close(*both(*inputs(GDN, T=T, B=1)), 1e-5)


def test_chunk_of_128():
  assert_close(*both(*inputs(KDA, T=129, B=1, H=1, Hv=1, K=128, V=128), chunk=128), 1e-5)


@pytest.mark.parametrize("case", some([SSD, GDN], [SSD]))
def test_many_value_heads_a_key_head(case):
  """Mamba-2's: more than a step takes, so that steps share a key head and add up its gradients."""
  r, S = inputs(case, H=1, Hv=24, K=16, V=64, T=40)
  assert_close(*both(r, S), 1e-5)


@pytest.mark.parametrize(
  "case, sizes, steps",
  [
    pytest.param(GDN, dict(H=4, Hv=8), ((4, 2), (4, 2)), id="key"),
    # The last step has two heads more than there are.
    pytest.param(
      ("none", None, "decayed", True), dict(H=3, Hv=6), ((4, 2), (4, 2)), id="bonus-ragged"
    ),
    pytest.param(KDA, dict(H=5, Hv=5), ((4, 2), (2, 3)), id="ragged", marks=pytest.mark.slow),
    # Steps that share a key head, of two.
    pytest.param(GDN, dict(H=2, Hv=48, K=128), ((4, 2), (2, 2)), id="many", marks=pytest.mark.slow),
  ],
)
def test_several_groups_of_heads(case, sizes, steps):
  """Heads are taken in groups, with several key heads each: as ``steps`` says, (heads, groups) forward and backward."""
  r, S = inputs(case, **{"T": 40, "K": 64, "V": 64, "B": 1, **sizes})
  plans = [tpu._plan(r, None, 16, direction) for direction in ("forward", "backward")]
  assert tuple((p.heads, p.groups) for p in plans) == steps
  assert_close(*both(r, S, chunk=16), 1e-5)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-5), (jnp.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("case", some([GDN, KDA, RWKV7], [KDA]))
def test_decays_from_none_to_strong(case, dtype, bound):
  """From 1 to e^-5 a token, some far beyond: exp of no difference overflows, and none leaks."""
  r, S = inputs(case, dtype)
  rng = np.random.default_rng(2)
  decay = -5.0 * rng.random(r.log_decay.shape) ** 3
  decay[rng.random(decay.shape) < 0.02] = -1e4
  r = dataclasses.replace(r, log_decay=jnp.asarray(decay, jnp.float32))
  assert_close(*both(r, S, SEGMENTS), bound)


def test_gate_gradients_summed_over_time():
  """What a model's A_log gets: a sum over tokens, in which roundings that do not cancel would stay.

  Operands are rounded alike in rows and columns, so they do: without that the error is 0.05.
  """
  r, S = inputs(KDA, jnp.bfloat16, T=256, B=1, K=64, V=64)
  got, want = both(r, S)
  total = [np.sum(np.float64(x["d"].log_decay) * r.log_decay, axis=1) for x in (got, want)]
  assert_close(*total, 1.5e-2)


outputs = jit(functools.partial(call, backend="interpret", chunk=32))


@pytest.mark.parametrize("case", some(FEW[1:], [KDA]))
def test_bitwise_causal(case):
  """Later tokens, however large, change no bit of earlier outputs."""
  r, S = inputs(case)
  at = 45  # within a chunk
  later = jax.tree.map(lambda x: x.at[:, at:].multiply(-3.0) if x.ndim > 2 else x, r)
  if later.log_decay is not None:
    later = dataclasses.replace(later, log_decay=-jnp.abs(later.log_decay))
  a, b = outputs(r, S)[0], outputs(later, S)[0]
  np.testing.assert_array_equal(a[:, :at], b[:, :at])
  assert not np.array_equal(a[:, at:], b[:, at:])


@pytest.mark.parametrize(
  "case, sizes",
  [
    pytest.param(GDN, dict(V=64), id="key"),
    pytest.param(RWKV7, dict(B=1, T=33), id="low-rank"),
    pytest.param(SSD, dict(B=1, T=33, Hv=8, V=64), id="shared-keys"),
    pytest.param(KDA, dict(V=64), id="channels", marks=pytest.mark.slow),
    pytest.param(RWKV6, dict(V=64), id="bonus", marks=pytest.mark.slow),
  ],
)
def test_nothing_unwritten_is_read(case, sizes):
  """Memory starts as NaN, and races are looked for: a tail of some tokens, segments, shared key heads."""
  r, S = inputs(case, **{"T": 39, **sizes})
  B, T = r.v.shape[:2]
  runs = segments.runs(jnp.asarray(SEGMENTS[:B, :T]))

  @jax.jit
  def walk(r, S, do):
    o, final, boundaries = tpu.forward(r, S, runs, 32, keep=True, interpret=tpu_races.STRICT)
    return o, final, tpu.backward(r, runs, 32, boundaries, do, S, interpret=tpu_races.STRICT)

  with tpu_races.none(2):
    for name, x in named(walk(r, S, jnp.ones_like(r.v))).items():
      assert np.isfinite(x).all(), name


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_input_in_float32(name):
  """All arithmetic is then float32's; the others' gradients are rounded as they are."""
  r, S = inputs(GDN)
  short = {x: getattr(r, x).astype(jnp.bfloat16) for x in {"q", "k", "v"} - {name}}
  r = dataclasses.replace(r, **short)
  got = linear_recurrence(r, S, backend="interpret", return_state=True)
  want = linear_recurrence(r, S, backend="reference", return_state=True)
  for a, b, bound in zip(got, want, (3e-5 if name == "v" else 5e-3, 3e-5), strict=True):
    assert np.linalg.norm(np.float64(a) - np.float64(b)) < bound * np.linalg.norm(np.float64(b))


def test_a_wide_erase_keeps_the_arithmetic_of_keys():
  """RWKV-7 multiplies bfloat16 keys by float32 rates: that is still a model in bfloat16, in one pass a product."""
  r, _ = inputs(RWKV7, jnp.bfloat16)
  r = dataclasses.replace(r, erase=jax.tree.map(lambda x: x.astype(jnp.float32), r.erase))
  assert not any(tpu._plan(r, None, None, way).exact for way in ("forward", "backward"))


def test_auto_is_the_kernels(monkeypatch):
  """For a sequence and for a token, in bfloat16 and float32."""
  monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
  for dtype in (jnp.bfloat16, jnp.float32):
    r, S = inputs(GDN, dtype)
    token = jax.tree.map(lambda x: x[:, :1], r)
    for fn, args in ((linear_recurrence, (r, S)), (linear_recurrence_step, (token, S))):
      assert pallas_calls(jax.make_jaxpr(fn)(*args).jaxpr)


def test_named_backend_says_why_it_cannot():
  with jax.enable_x64(True):
    r, S = make(*GDN)
    with pytest.raises(NotImplementedError, match="float64"):
      linear_recurrence(r, S, backend="interpret")
  r, S = inputs(GDN)
  with pytest.raises(NotImplementedError, match="needs a TPU; this is a cpu"):
    linear_recurrence(r, S, backend="tpu")
  with pytest.raises(NotImplementedError, match="chunks of 16 to 128"):
    linear_recurrence(r, S, backend="interpret", chunk_size=8)
  o, _ = linear_recurrence(r, S, backend="xla", chunk_size=8)
  assert o.shape == r.v.shape  # what one cannot, another can


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_every_case_in_chunks_of_128(case, rho, dtype):
  sizes = dict(T=257, B=2, K=128, V=64, rho=rho)
  got, want = both(*inputs(case, dtype, **sizes), chunk=128)
  exact, correlated = dtype == jnp.float32, rho == 0.9  # as in test_correlated_keys
  assert_close(got, want, (1e-4 if exact else 5e-2) if correlated else (1e-5 if exact else 2e-2))
  assert_cosines(got, want, 0.9999 if exact else 0.999)


@pytest.mark.slow
@pytest.mark.parametrize(
  "dtype, bound, least", [(jnp.float32, 1e-4, 0.9999), (jnp.bfloat16, 5e-2, 0.999)]
)
@pytest.mark.parametrize("case", [("none", *GDN[1:]), GDN, KDA, RWKV7], ids=ids)
def test_correlated_keys_in_chunks_of_128(case, dtype, bound, least):
  """As test_correlated_keys: the system of a chunk is twice as large there, and joined in one step more."""
  got, want = both(*inputs(case, dtype, rho=0.9, beta=1.9, T=257, B=1, K=128, V=64), chunk=128)
  assert_close(got, want, bound)
  assert_cosines(got, want, least)


@pytest.mark.slow
@pytest.mark.parametrize("case, H", [(GDN, 8), (KDA, 16)], ids=["key", "channels"])
def test_as_many_heads_a_step_as_where_vmem_is_large(case, H, monkeypatch):
  """The plan of v6e: 16 heads a step forward and 8 backward, chunks of 128."""
  monkeypatch.setattr(dispatch, "vmem", lambda: 128 * 2**20)
  r, S = inputs(case, jnp.bfloat16, H=H, Hv=16, K=64, V=64, T=130, B=1)
  plans = [tpu._plan(r, None, None, direction) for direction in ("forward", "backward")]
  assert [(p.C, p.heads, p.groups) for p in plans] == [(128, 16, 1), (128, 8, 2)]
  assert_close(*both(r, S, chunk=None), 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("case", [FEW[2], KDA], ids=ids)
def test_past_65536_tokens(case):
  r, S = inputs(case, B=1, T=65537, H=1, Hv=1, K=8, V=8)
  assert_close(*both(r, S, chunk=128), 2e-5)
