"""The linear recurrence: definition, chunked backend, gradients, packing, numerics, memory.

``reference`` (token by token) is checked against numpy written from the equation; everything else is
checked against ``reference`` in float64, whose gradients JAX derives.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import (
  CASES,
  FEW,
  SEGMENTS,
  assert_close,
  call,
  cast,
  ids,
  make,
  named,
  outputs,
  reference,
  reference_in_pieces,
  run,
  run_jit,
)

from pallas_kernels import gated_delta_rule
from pallas_kernels.linear_recurrence import (
  KeyErase,
  LowRankErase,
  linear_recurrence,
  linear_recurrence_step,
  xla,
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


# --- the definition ---------------------------------------------------------------------------


def equation(r, S, segment_ids=None):
  """The recurrence of the docstring of ``recurrence.py``, in numpy, one head and token at a time."""
  B, T, H, K = r.k.shape
  Hv = r.v.shape[2]
  r, S = jax.tree.map(np.asarray, r), np.array(S)
  o = np.zeros(r.v.shape)
  for b, h in itertools.product(range(B), range(Hv)):
    kh = h // (Hv // H)
    state = S[b, h]
    for t in range(T):
      if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
        state = np.zeros_like(state)
      q, k, v = r.q[b, t, kh], r.k[b, t, kh], r.v[b, t, h]
      decay = np.ones(K)
      if r.log_decay is not None:
        g = r.log_decay[h] if r.log_decay.ndim == 1 else r.log_decay[b, t, h]
        decay = np.exp(g) * decay
      A, write = np.diag(decay), v
      if r.erase is not None:
        if isinstance(r.erase, KeyErase):
          beta = r.erase.beta[b, t, h]
          left, right, write = -beta * k, k, beta * v
        else:
          left, right = r.erase.a[b, t, h], r.erase.b[b, t, h]
        A = A + np.outer(left, right * decay if r.reads == "decayed" else right)
      before, state = state, A @ state + np.outer(k, write)
      read = state if r.bonus is None else before + np.outer(r.bonus[kh] * k, v)
      o[b, t, h] = read.T @ q
    S[b, h] = state
  return o, S


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_reference_is_the_equation(case):
  r, S = make(*case, T=9, K=4, V=3)
  segment_ids = SEGMENTS[:, :9]
  got = linear_recurrence(r, S, segment_ids=segment_ids, return_state=True, backend="reference")
  assert_close(got, equation(r, S, segment_ids), 1e-13)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_matches_reference(case):
  """Outputs, final state and every gradient, packed, in float64."""
  r, S = make(*case)
  assert_close(run(r, S, SEGMENTS), reference(r, S, SEGMENTS), 1e-11)


@pytest.mark.parametrize("case", FEW[2:], ids=ids)
def test_matches_reference_without_segments(case):
  r, S = make(*case)
  assert_close(run(r, S), reference(r, S), 1e-11)


@pytest.mark.parametrize("case", FEW[-3:], ids=ids)
def test_chunk_size_changes_nothing(case):
  r, S = make(*case)
  want = run(r, S, SEGMENTS)
  for chunk in (1, 2, None):
    assert_close(run(r, S, SEGMENTS, chunk=chunk), want, 1e-11)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 23])
def test_any_length(T):
  """Around the chunk of 8: shorter, a chunk, a token more, odd."""
  r, S = make("constant" if T == 9 else "channel", "key", "decayed", False, T=T)
  assert_close(run(r, S), reference(r, S), 1e-11)


def test_past_65536_tokens():
  """In float32. Random signs of rounding: sqrt(T) roundings of 2^-24 in sums over all tokens."""
  r, S = cast(
    make("scalar", "key", "decayed", False, B=1, T=65537, H=1, Hv=1, K=4, V=4), jnp.float32
  )
  got, want = run(r, S, chunk=64), reference_in_pieces(r, S, 64)
  assert_close(got, want, 2e-5)
  assert_close(got["o"][:, -64:], want["o"][:, -64:], 1e-5)
  assert_close(got["d"].v[:, -64:], want["d"].v[:, -64:], 1e-5)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_resets_cost_no_digits(decay):
  """Decays that forget everything, every second token of half a chunk, and weak ones after them.

  A sum of 16 logs of -32 is 512, of which a rounding in float32 is 3e-5.
  """
  r, S = cast(make(decay, None, "decayed", False, B=1, T=64), jnp.float32)
  t = np.arange(64)[None, :, None, None]
  g = jnp.broadcast_to(np.where((t < 32) & (t % 2 == 0), -1000.0, -0.01), r.log_decay.shape)
  r = dataclasses.replace(r, log_decay=g.astype(jnp.float32))
  want = linear_recurrence(r, S, backend="reference", return_state=True)
  got = linear_recurrence(r, S, chunk_size=64, backend="xla", return_state=True)
  for a, b in zip(got, want, strict=True):
    assert np.linalg.norm(a - b) < 4e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("case", FEW[-3:], ids=ids)
def test_groups_of_chunks(case, monkeypatch):
  """What accelerators use; on a CPU a group is one chunk."""
  r, S = make(*case)
  want = reference(r, S, SEGMENTS)
  monkeypatch.setattr(xla, "_sizes", lambda r, chunk: (4, 3))
  assert_close(run(r, S, SEGMENTS, chunk=4), want, 1e-11)


def test_on_a_mesh():
  """As README.md has it: within shard_map, with every gradient; without it an error that says so."""
  r, _ = cast(make("scalar", "key", "decayed", False, B=2, H=4, Hv=4), jnp.float32)
  args = r.q, r.k, r.v, r.log_decay[..., 0], r.erase.beta
  mesh, axes = jax.make_mesh((2, 2), ("data", "model")), jax.P("data", None, "model")

  def gradients(run):
    return jax.jit(jax.grad(lambda args: jnp.sum(run(*args)[0] ** 2)))

  want = gradients(gated_delta_rule)(args)
  with jax.set_mesh(mesh):
    args = jax.device_put(args, jax.NamedSharding(mesh, axes))
    run = jax.shard_map(
      gated_delta_rule, in_specs=(axes,) * 5, out_specs=(axes, None), check_vma=False
    )
    for a, b in zip(gradients(run)(args), want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    with pytest.raises(ValueError, match="shard_map"):
      gated_delta_rule(*args)


def test_ungrouped_heads_and_no_state():
  r, S = make("channel", "low", "decayed", False, H=3, Hv=3)
  assert_close(run(r, 0 * S), reference(r, 0 * S), 1e-11)
  got, final = jax.jit(functools.partial(linear_recurrence, chunk_size=8))(r)
  np.testing.assert_allclose(got, outputs(r, 0 * S)[0], rtol=1e-12)
  assert final is None


# --- packing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW[1:], ids=ids)
def test_packed_is_separate(case):
  """Rows with different segments: each sequence gets what it gets alone, gradients too.

  The initial state is the first segment's, the final state the last one's. Lengths repeat, so that
  few shapes are compiled.
  """
  lengths = ((4, 11, 4), (11, 4, 4))
  r, S = make(*case, T=19)
  segment_ids = np.stack([np.repeat([5, 1, 5], n) for n in lengths])
  do = np.random.default_rng(3).normal(size=r.v.shape)
  dS = np.random.default_rng(4).normal(size=S.shape)
  packed = run(r, S, segment_ids, do, dS)
  by_token = lambda x: x.ndim > 2  # noqa: E731  constants and the bonus have no time

  shared = None
  for row, row_lengths in enumerate(lengths):
    ends = np.cumsum(row_lengths)
    for i, (start, end) in enumerate(zip(ends - row_lengths, ends, strict=True)):
      cut = lambda x, s=start, e=end, b=row: x[b : b + 1, s:e] if by_token(x) else x  # noqa: E731
      one = slice(row, row + 1)
      first, last = i == 0, end == ends[-1]
      alone = run(jax.tree.map(cut, r), first * S[one], None, do[one, start:end], last * dS[one])
      assert_close(alone["o"], cut(packed["o"]), 1e-11)
      tokens, constants = partition(alone["d"], by_token)
      assert_close(tokens, partition(jax.tree.map(cut, packed["d"]), by_token)[0], 1e-11)
      shared = constants if shared is None else jax.tree.map(jnp.add, shared, constants)
      if first:
        assert_close(alone["dinitial"], packed["dinitial"][one], 1e-11)
      if last:
        assert_close(alone["final"], packed["final"][one], 1e-11)
  assert_close(shared, partition(packed["d"], by_token)[1], 1e-11)


def partition(tree, predicate):
  leaves = jax.tree.leaves(tree)
  return [x for x in leaves if predicate(x)], [x for x in leaves if not predicate(x)]


# --- causality --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW, ids=ids)
def test_bitwise_causal(case):
  """Later tokens, however large, change no bit of earlier outputs."""
  r, S = make(*case)
  r, S = cast((r, S), jnp.float32)
  at = 13  # within a chunk
  for factor in (-1.0, 1e6):
    later = jax.tree.map(lambda x, f=factor: x.at[:, at:].multiply(f) if x.ndim > 2 else x, r)
    if later.log_decay is not None:
      later = dataclasses.replace(later, log_decay=-jnp.abs(later.log_decay))
    if factor > 1:  # the delta rule diverges for such keys: only what stays finite is enlarged
      later = dataclasses.replace(later, k=r.k, erase=r.erase)
    for segment_ids in (None, SEGMENTS):
      a, b = outputs(r, S, segment_ids)[0], outputs(later, S, segment_ids)[0]
      np.testing.assert_array_equal(a[:, :at], b[:, :at])
      assert not np.array_equal(a[:, at:], b[:, at:])


def test_longer_is_the_same_prefix():
  r, S = cast(make("channel", "key", "decayed", False), jnp.float32)
  shorter = jax.tree.map(lambda x: x[:, :24], r)
  np.testing.assert_array_equal(outputs(r, S)[0][:, :24], outputs(shorter, S)[0])


# --- identities between mechanisms ------------------------------------------------------------


def same(a, b, bound=1e-12):
  """Two recurrences give the same outputs and final state."""
  assert_close(outputs(*a), outputs(*b), bound)


@pytest.mark.parametrize("width", [1, 8])
def test_no_decay_is_zero_decay(width):
  r, S = make("none", "key", "decayed", False)
  zero = dataclasses.replace(r, log_decay=jnp.zeros((*r.v.shape[:3], width)))
  same((zero, S), (r, S))
  # and the gradient at zero is right, where a clip or a minimum would halve it
  assert_close(run(zero, S), reference(zero, S), 1e-11)


def test_equal_channels_are_a_scalar_and_equal_tokens_a_constant():
  r, S = make("constant", "key", "undecayed", False)
  scalar = jnp.broadcast_to(r.log_decay[:, None], (*r.v.shape[:3], 1))
  channel = jnp.broadcast_to(scalar, (*r.v.shape[:3], r.k.shape[-1]))
  same((dataclasses.replace(r, log_decay=scalar), S), (r, S))
  same((dataclasses.replace(r, log_decay=channel), S), (r, S))


def test_beta_zero_keeps_the_state():
  r, S = make("none", "key", "decayed", False, beta=0.0)
  np.testing.assert_array_equal(outputs(r, S)[1], S)


@pytest.mark.parametrize("reads", ["decayed", "undecayed"])
def test_key_erase_is_low_rank_erase(reads):
  r, S = make("channel", "key", reads, False)
  beta, k = r.erase.beta, jnp.repeat(r.k, 2, axis=2)
  low = dataclasses.replace(r, v=beta[..., None] * r.v, erase=LowRankErase(-beta[..., None] * k, k))
  same((low, S), (r, S))


# --- one token at a time ----------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW, ids=ids)
def test_prefill_and_steps_are_one_run(case):
  r, S = make(*case, T=19)
  want = outputs(r, S)
  constants = lambda x: x.ndim <= 2  # noqa: E731
  part = lambda s, e: jax.tree.map(lambda x: x if constants(x) else x[:, s:e], r)  # noqa: E731
  step = jax.jit(linear_recurrence_step)
  o, state = outputs(part(0, 11), S)
  parts = [o]
  for t in range(11, 19):
    o, state = step(part(t, t + 1), state)
    parts.append(o)
  assert_close((jnp.concatenate(parts, 1), state), want, 1e-12)
  assert_close(step(part(0, 1), S), outputs(part(0, 1), S), 1e-13)


def test_step_keeps_dtypes():
  r, S = make("channel", "key", "decayed", False, T=1)
  o, state = linear_recurrence_step(cast(r, jnp.bfloat16), S.astype(jnp.bfloat16))
  assert o.dtype == state.dtype == jnp.bfloat16


# --- numerics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_float32_with_correlated_keys(decay):
  """Keys that point the same way, steps up to 1.9: where inverting by powers fails by 4e6.

  A chunk is 64 dependent updates, and each may round by 2^-24 (a few times, over its sums):
  64 * 2^-24 = 4e-6, taken thrice. Weak decay, so that nothing is forgotten meanwhile.
  """
  for rho, beta in itertools.product((0.0, 0.5, 0.9), (1.0, 1.9)):
    r, S = make(decay, "key", "decayed", False, T=192, K=32, V=32, rho=rho, beta=beta)
    if r.log_decay is not None:
      r = dataclasses.replace(r, log_decay=0.01 * r.log_decay)
    r, S = cast((r, S), jnp.float32)
    want = reference_in_pieces(*cast((r, S), jnp.float64), 24)
    assert_close(run(r, S, chunk=64), want, 1.2e-5)


STRENGTHS = {
  "mixed": [0.0, -1e-3, -1.0, -10.0, -50.0],
  "strong": [-50.0],
  "reset": [0.0, -1e-2, -1e9],
}


@pytest.mark.parametrize("case", FEW[1:], ids=ids)
def test_strong_decay(case):
  """From no decay to e^-50 a token, and "forget everything": finite, and the gradients are right.

  Decay between two tokens is a difference of sums over the chunk of at most 16 * 88 (a token's
  log decay counts no further than float32 reaches), so its error is at most 16 * 88 * 2^-24 = 8e-5.
  Where nothing survives a token the true gradient of the decay is e^-50: rounding of 0.
  """
  r, S = make(*case, T=70, K=16, V=16)
  for strength in STRENGTHS.values():
    g = np.random.default_rng(5).choice(strength, size=r.log_decay.shape)
    r, S = cast((dataclasses.replace(r, log_decay=jnp.asarray(g)), S), jnp.float32)
    want = reference(*cast((r, S), jnp.float64))
    assert_close(run(r, S, chunk=16), want, 1e-4, floor=1.0)


@pytest.mark.parametrize("case", (FEW[2], *FEW[-2:]), ids=ids)
def test_bfloat16_inputs(case):
  """Inputs are rounded by the caller, outputs once; nothing in between is below float32.

  So against float32 with the same rounded inputs: half an ulp, 2^-9, where a result is bfloat16
  (twice for q and k, whose heads' parts are summed), and rounding of float32 where it is not. The
  gradients of decay and beta are float32: one-pass bfloat16 products would leave them at cosine 0.3.
  """
  r, S = make(*case)
  S = S.astype(jnp.float32)
  narrow = dataclasses.replace(
    cast(r, jnp.float32), **{n: getattr(r, n).astype(jnp.bfloat16) for n in ("q", "k", "v")}
  )
  do = jnp.asarray(np.random.default_rng(6).normal(size=r.v.shape), jnp.bfloat16)
  got, want = run(narrow, S, SEGMENTS, do), run(cast(narrow, jnp.float32), S, SEGMENTS, do)
  assert got["o"].dtype == jnp.bfloat16 and got["final"].dtype == jnp.float32
  for path, x in jax.tree_util.tree_flatten_with_path(got)[0]:
    name = jax.tree_util.keystr(path)
    y = named(want)[name]
    assert_close(x, y, 2**-8 if x.dtype == jnp.bfloat16 else 1e-6)


# --- memory -----------------------------------------------------------------------------------


def nbytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_backward_keeps_inputs_and_boundary_states(decay):
  """Between forward and backward: the inputs as given, and one float32 state a chunk. No more."""
  r, S = cast(make(decay, "key", "decayed", False, T=256, K=16, V=16), jnp.float32)
  r = dataclasses.replace(r, **{n: getattr(r, n).astype(jnp.bfloat16) for n in ("q", "k", "v")})
  for chunk in (16, 64):
    forward = functools.partial(call, chunk=chunk)
    vjp = jax.eval_shape(lambda r, S, f=forward: jax.vjp(f, r, S)[1], r, S)
    assert nbytes(vjp) <= nbytes(r) + 256 // chunk * nbytes(S)


def test_memory_is_linear_in_length():
  """Compiled temporaries, forward + backward: in proportion to T, and far below T x T."""

  def temporaries(T):
    r, S = cast(make("channel", "key", "decayed", False, B=1, T=T, K=16, V=16), jnp.float32)
    return (
      run_jit.lower(r, S, None, r.v, S, backend="xla", chunk=None)
      .compile()
      .memory_analysis()
      .temp_size_in_bytes
    )

  short, long = temporaries(1024), temporaries(4096)
  assert long <= 4.1 * short
  assert long < 4096 * 4096


# --- bad input --------------------------------------------------------------------------------


def replaced(name, shape):
  def change(r):
    if name.startswith("erase."):
      erase = dataclasses.replace(r.erase, **{name[6:]: jnp.zeros(shape)})
      return dataclasses.replace(r, erase=erase)
    return dataclasses.replace(r, **{name: jnp.zeros(shape)})

  return change


@pytest.mark.parametrize(
  "case, name, shape",
  [
    (FEW[0], "q", (2, 5, 2, 7)),
    (FEW[0], "k", (2, 5, 16)),
    (FEW[0], "v", (2, 6, 4, 6)),
    (FEW[0], "v", (2, 5, 3, 6)),
    (FEW[0], "erase.beta", (2, 5, 2)),
    (FEW[1], "erase.a", (2, 5, 2, 8)),
    (FEW[1], "erase.b", (2, 5, 4, 6)),
    (FEW[1], "log_decay", (2,)),
    (FEW[4], "log_decay", (2, 5, 4)),
    (FEW[2], "bonus", (4, 8)),
  ],
)
def test_bad_shapes_name_the_argument(case, name, shape):
  r, S = make(*case, T=5)
  with pytest.raises(ValueError, match=rf"\b{name}\b"):
    linear_recurrence(replaced(name, shape)(r), S)


def test_other_bad_arguments():
  r, S = make("none", None, "decayed", False, T=5)
  with pytest.raises(ValueError, match="chunk_size must be a power of two"):
    linear_recurrence(r, S, chunk_size=48)
  with pytest.raises(ValueError, match="segment_ids must have shape"):
    linear_recurrence(r, S, segment_ids=SEGMENTS)
  with pytest.raises(ValueError, match="initial_state must have shape"):
    linear_recurrence(r, S[:1])
  with pytest.raises(
    ValueError, match="unknown backend 'cuda'; known: auto, tpu, interpret, gpu, "
  ):
    linear_recurrence(r, S, backend="cuda")
  with pytest.raises(ValueError, match="at least one sequence"):
    linear_recurrence(jax.tree.map(lambda x: x[:0], r))
  with pytest.raises(ValueError, match="at least one token"):
    linear_recurrence(jax.tree.map(lambda x: x[:, :0], r), S)
  with pytest.raises(ValueError, match="a step takes one token; got 5"):
    linear_recurrence_step(r, S)
  both = dataclasses.replace(r, bonus=jnp.ones((2, 8)), erase=KeyErase(jnp.ones((2, 5, 4))))
  with pytest.raises(ValueError, match="bonus together with an erase"):
    linear_recurrence(both, S)
  with pytest.raises(ValueError, match="reads must be"):
    linear_recurrence(dataclasses.replace(r, reads="both"), S)
