"""The GPU kernel of one token, in Pallas's interpreter, against the recurrence's definition in float64."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_races import watch
from jax.experimental.pallas import mosaic_gpu as plgpu
from steps import CASES, assert_close, exact, make

from pallas_kernels import dispatch
from pallas_kernels.linear_recurrence import linear_recurrence_step, step_gpu

step = functools.partial(linear_recurrence_step, backend="interpret_gpu")
KDA = ("channel", "key", "decayed", False)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x) for x in c if x))
def test_matches_the_definition(case):
  """A handful of roundings of 2^-24 a number, and sums over 64 channels."""
  r, state = make(case, B=1, K=64, V=32)
  assert_close(jax.jit(step)(r, state), exact(r, state), 1e-6)


# One head of a key for many of a value; several blocks of values; the largest number of keys.
@pytest.mark.parametrize("sizes", [(2, 1, 3, 64, 256), (1, 2, 2, 128, 64), (1, 1, 1, 256, 96)])
def test_shapes(sizes):
  r, state = make(KDA, *sizes)
  assert_close(jax.jit(step)(r, state), exact(r, state), 1e-6)


@pytest.mark.parametrize("case", [KDA, ("scalar", "none", "decayed", True)])
def test_heads_of_keys_are_shared(case):
  r, state = make(case, 1, 2, 4, 64, 32)
  assert_close(jax.jit(step)(r, state), exact(r, state), 1e-6)


@pytest.mark.parametrize("V", [32, 64])
def test_bfloat16_state(V):
  """The state is rounded once, on its way back: 2^-9 a number. Outputs are read before."""
  r, state = make(("scalar", "key", "decayed", False), K=64, V=V)
  state = state.astype(jnp.bfloat16)
  o, new = jax.jit(step)(r, state)
  assert o.dtype == jnp.float32 and new.dtype == jnp.bfloat16
  want_o, want = exact(r, state)
  assert_close([o], [want_o], 1e-6)
  np.testing.assert_allclose(np.asarray(new, np.float64), want, rtol=2**-8, atol=1e-6)


def test_bfloat16_tokens():
  case = ("channel", "low_rank", "undecayed", False)
  r, state = make(case, K=64, V=32, dtype=jnp.bfloat16)
  o, new = jax.jit(step)(r, state)
  assert o.dtype == jnp.bfloat16 and new.dtype == jnp.float32
  want_o, want = exact(r, state)
  assert_close([new], [want], 1e-6)
  assert_close([o], [want_o], 2**-8)


def test_gradients():
  r, state = make(KDA, B=1, K=64, V=32)

  def loss(backend, r, state):
    o, new = linear_recurrence_step(r, state, backend=backend)
    return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(new))

  got, want = (jax.grad(loss, argnums=(1, 2))(b, r, state) for b in ("interpret_gpu", "reference"))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_no_races():
  r, state = make(KDA, K=64, V=64)
  mode = plgpu.InterpretGPUParams(detect_races=True)
  with watch() as watched:
    assert_close(step_gpu.step(r, state, interpret=mode), exact(r, state), 1e-6)
  assert watched.kernels == 1 and not watched.racy


def test_other_gpus_are_served_by_xla(monkeypatch):
  r, state = make(KDA, K=64, V=32)
  monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  ampere = types.SimpleNamespace(compute_capability="8.0")
  monkeypatch.setattr(jax, "local_devices", lambda: [ampere])
  with pytest.raises(NotImplementedError, match="here it is 8.0"):
    linear_recurrence_step(r, state, backend="gpu")
  linear_recurrence_step(r, state)


def test_refusals_say_why():
  r, state = make(KDA, K=64, V=32)
  with pytest.raises(NotImplementedError, match="need a Hopper GPU"):
    linear_recurrence_step(r, state, backend="gpu")
  with pytest.raises(NotImplementedError, match="float16"):
    step(r, state.astype(jnp.float16))
  for K, V in ((48, 32), (64, 48), (512, 32)):
    with pytest.raises(NotImplementedError, match=f"got {K} and {V}"):
      step(*make(KDA, K=K, V=V))
