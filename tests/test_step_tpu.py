"""The TPU kernel of one token, in Pallas's interpreter, against the recurrence's definition in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_races
from steps import CASES, assert_close, exact, make

from pallas_kernels import dispatch
from pallas_kernels.cost.kernels import pallas_calls
from pallas_kernels.linear_recurrence import (
  Recurrence,
  linear_recurrence,
  linear_recurrence_step,
  step_tpu,
)

step = functools.partial(linear_recurrence_step, backend="interpret")


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x) for x in c if x))
def test_matches_the_definition(case):
  """A handful of roundings of 2^-24 a number, and sums over 16 channels."""
  r, state = make(case)
  assert_close(jax.jit(step)(r, state), exact(r, state), 5e-7)


# One head of a key for many of a value; an odd number; values wider than the lanes; several grid steps a sequence.
@pytest.mark.parametrize(
  "sizes", [(1, 1, 5, 16, 8), (3, 3, 3, 5, 7), (2, 1, 1, 8, 260), (1, 2, 6, 256, 512)]
)
def test_any_shape(sizes):
  r, state = make(("channel", "key", "decayed", False), *sizes)
  assert_close(jax.jit(step)(r, state), exact(r, state), 1e-6)


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[10], CASES[14], CASES[15], CASES[18]])
def test_states_that_are_stored_with_keys_along_lanes(case):
  """Mamba-2's: 128 keys, 64 values."""
  r, state = make(case, Hv=3, K=128, V=16)
  assert_close(jax.jit(step)(r, state), exact(r, state), 1e-6)


def test_bfloat16_state():
  """The state is rounded once, on its way back: 2^-9 a number. Outputs are read before."""
  r, state = make(("scalar", "key", "decayed", False), K=32, V=32)
  state = state.astype(jnp.bfloat16)
  o, new = jax.jit(step)(r, state)
  assert o.dtype == jnp.float32 and new.dtype == jnp.bfloat16
  want_o, want = exact(r, state)
  assert_close([o], [want_o], 5e-7)
  np.testing.assert_allclose(np.asarray(new, np.float64), want, rtol=2**-8, atol=1e-6)


def test_bfloat16_tokens():
  r, state = make(("channel", "low_rank", "undecayed", False), dtype=jnp.bfloat16)
  o, new = jax.jit(step)(r, state)
  assert o.dtype == jnp.bfloat16 and new.dtype == jnp.float32
  want_o, want = exact(r, state)
  assert_close([new], [want], 5e-7)
  assert_close([o], [want_o], 2**-8)


def test_gradients():
  r, state = make(("channel", "key", "decayed", False))

  def loss(backend, r, state):
    o, new = linear_recurrence_step(r, state, backend=backend)
    return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(new))

  got, want = (jax.grad(loss, argnums=(1, 2))(b, r, state) for b in ("interpret", "reference"))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_is_the_recurrence_of_one_token():
  r, state = make(("scalar", "key", "decayed", False))
  o, new = linear_recurrence(r, state, return_state=True, backend="interpret")
  for a, b in zip((o, new), step(r, state), strict=True):
    np.testing.assert_array_equal(a, b)


def test_no_races_and_no_unwritten_memory():
  r, state = make(("channel", "key", "decayed", False), K=8)
  with tpu_races.none(1):
    assert_close(step_tpu.step(r, state, interpret=tpu_races.STRICT), exact(r, state), 5e-7)


@pytest.mark.parametrize(
  "K, V, dtype, serves",
  [
    (1024, 512, "float32", True),
    (1024, 1024, "float32", False),
    (1024, 1024, "bfloat16", True),
    (8192, 65, "float32", False),
  ],
)
def test_states_that_vmem_does_not_hold_are_refused(monkeypatch, K, V, dtype, serves):
  """ "auto" goes on with the reference; lanes that pad a state count."""
  monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
  q = jax.ShapeDtypeStruct((1, 1, 1, K), jnp.float32)
  r = Recurrence(q, q, jax.ShapeDtypeStruct((1, 1, 1, V), jnp.float32))
  state = jax.ShapeDtypeStruct((1, 1, K, V), jnp.dtype(dtype))
  assert bool(pallas_calls(jax.make_jaxpr(linear_recurrence_step)(r, state).jaxpr)) == serves
  if not serves:
    with pytest.raises(NotImplementedError, match="too large"):
      jax.eval_shape(step, r, state)


def test_refusals_say_why():
  r, state = make(("scalar", "key", "decayed", False))
  with pytest.raises(NotImplementedError, match="float16"):
    step(r, state.astype(jnp.float16))
  with pytest.raises(ValueError, match="unknown backend"):
    linear_recurrence_step(r, state, backend="xla")
  two = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), r)
  with pytest.raises(ValueError, match="one token"):
    step(two, state)
  with pytest.raises(ValueError, match="state must have shape"):
    step(r, state[:1])
  with pytest.raises(NotImplementedError, match="needs a TPU; this is a cpu"):
    linear_recurrence_step(r, state, backend="tpu")
  with jax.enable_x64(True):
    wide = dataclasses.replace(r, q=jnp.asarray(np.asarray(r.q, np.float64)))
    with pytest.raises(NotImplementedError, match="float64"):
      step(wide, state)
