"""Rows of which each device has a part of the tokens, against the same rows whole, token by token."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import (
  CASES,
  FEW,
  assert_close,
  cast,
  cotangents,
  make,
  named,
  reference,
  rounded,
  some,
)
from recurrences import run as run_whole

from pallas_kernels import gated_delta_rule, mesa
from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.short_conv import short_conv

PARTS, T = 4, 32
# Parts of 8 tokens: documents that begin and end within parts, go over several, and end with one; in the second row an
# id comes back (a new document all the same) just before a part ends.
SEGMENTS = np.stack([np.repeat([1, 2, 3], [5, 20, 7]), np.repeat([4, 2, 4, 9], [8, 7, 2, 15])])


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def over_parts(run, *in_time):
  """``run`` on parts, of arguments that have the tokens along axis 1 or are whole; its second result is whole."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((PARTS,), ("context",), auto, devices=jax.devices()[:PARTS])
  part, whole = jax.P(None, "context"), jax.P()
  specs = tuple(jax.tree.map(lambda t: part if t else whole, in_time))
  return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(part, whole), check_vma=False)


def recurrence(r, S, ids, do, dS, backend="xla"):
  """Of parts: outputs and final state, and every gradient, as ``recurrences.run``."""
  in_time = jax.tree.map(lambda x: x.ndim > 2, r)  # not constants and the bonus

  def forward(r, S):
    def call(r, S, ids):
      options = dict(chunk_size=4, return_state=True, axis_name="context", backend=backend)
      return linear_recurrence(r, S, segment_ids=ids, **options)

    return over_parts(call, in_time, False, ids is not None)(r, S, ids)

  (o, final), vjp = jax.vjp(forward, r, S)
  dr, dinitial = vjp((do.astype(o.dtype), dS.astype(final.dtype)))
  return {"o": o, "final": final, "d": dr, "dinitial": dinitial}


run = jax.jit(recurrence, static_argnames="backend")


@pytest.mark.parametrize("ids", [None, SEGMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("case", some(CASES, FEW))
def test_recurrence(case, ids):
  """From a state, to a gradient of the last state: rounding in float64 is all the difference."""
  r, S = make(*case, T=T)
  do, dS = cotangents(r, S)
  assert_close(run(r, S, ids, do, dS), reference(r, S, ids, do, dS), 1e-11)


def test_decay_that_leaves_nothing():
  """With a bonus, what is read before a token of such a decay is not what its decay can be taken from again."""
  r, S = make("scalar", None, "decayed", True, T=T)
  g = r.log_decay.at[0, 12].set(-1e6).at[1, 19].set(-jnp.inf).at[:, 5, 1:].set(-1e4)
  r = dataclasses.replace(r, log_decay=g)
  do, dS = cotangents(r, S)
  assert_close(run(r, S, None, do, dS), reference(r, S, None, do, dS), 1e-11)


@pytest.mark.parametrize("case", FEW[-2:], ids=["key", "low"])
def test_bfloat16(case):
  """No further from the truth than whole rows are, but for what their rounding happens to be."""
  r, S = cast(make(*case, T=T), jnp.float32)
  do, dS = cotangents(r, S)
  want = named(reference(r, S, SEGMENTS, do, dS))
  args = rounded(r, jnp.bfloat16), S, SEGMENTS, do, dS
  got, whole = named(run(*args)), named(run_whole(*args, chunk=4))
  for name, w in want.items():
    error, usual = (np.linalg.norm(x[name] - w) / np.linalg.norm(w) for x in (got, whole))
    assert error < 1.5 * usual + 1e-3, f"{name}: {error:.1e}, whole rows {usual:.1e}"


def collectives(jaxpr, out):
  """Bytes of what each collective of a program gives, its loops' included."""
  for e in jaxpr.eqns:
    if e.primitive.name in ("all_gather", "all_to_all", "ppermute", "psum", "reduce_scatter"):
      size = sum(v.aval.size * v.aval.dtype.itemsize for v in e.outvars)
      out[e.primitive.name] = out.get(e.primitive.name, 0) + size
    for inner in jax.extend.core.jaxprs_in_params(e.params):
      collectives(inner, out)
  return out


def test_what_parts_tell_each_other():
  """Forward and backward: an M and twice a state of each part, whatever the length, in float32."""
  B, H, K = 2, 4, 8

  def sent(T):
    x = jax.ShapeDtypeStruct((B, T, H, K), jnp.float32)
    g = jax.ShapeDtypeStruct((B, T, H), jnp.float32)

    def loss(q, k, v, g, beta):
      run = functools.partial(gated_delta_rule, axis_name="context", return_state=True)
      return jnp.sum(over_parts(run, *[True] * 5)(q, k, v, g, beta)[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=range(5)))(x, x, x, g, g)
    return collectives(jaxpr.jaxpr, {})

  assert sent(64) == sent(4096)
  state = 4 * B * H * K * K
  assert sent(64)["all_gather"] == PARTS * (
    4 * state + 2 * B
  )  # twice M, and which parts are joined


def test_mesa_of_a_token_a_part():
  """A part of one token is no step of decoding: what its queries are solved for begins with the first part."""
  B, H, K, V = 2, 2, 3, 2
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(B, PARTS, H, n)) for n in (K, K, V))
  g, beta = -rng.uniform(0.1, 1, (B, PARTS, H)), rng.uniform(0.5, 1, (B, PARTS, H))
  half = rng.normal(size=(B, H, K, K))
  S = half @ half.swapaxes(2, 3), rng.normal(size=(B, H, K, V))
  lam, ids = np.ones((H, K)), np.array([[1] * PARTS, [1, 1, 2, 2]])
  do = rng.normal(size=v.shape)

  def call(*args, **options):
    *args, S, ids = args
    return mesa(*args, initial_state=S, segment_ids=ids, return_state=True, **options)

  def results(run):
    (o, final), vjp = jax.vjp(lambda *args: run(*args, ids), q, k, v, g, beta, lam, S)
    return {"o": o, "final": final, "d": vjp((do, jax.tree.map(jnp.ones_like, final)))}

  parts = over_parts(functools.partial(call, axis_name="context"), *[True] * 5, False, (False,) * 2, True)  # fmt: skip
  got, want = (jax.jit(functools.partial(results, run))() for run in (parts, call))
  assert_close(got, want, 1e-9)


@pytest.mark.parametrize("ids", [None, SEGMENTS], ids=["one document", "packed"])
def test_short_convolution(ids):
  """Outputs, the last inputs, and every gradient; in float64."""
  rng = np.random.default_rng(0)
  x, w, b, S = (rng.normal(size=s) for s in ((2, T, 5), (4, 5), (5,), (2, 3, 5)))
  do, dS = rng.normal(size=x.shape), rng.normal(size=S.shape)

  def results(run):
    out, vjp = jax.vjp(lambda *args: run(*args, ids), x, w, b, S)
    return dict(zip(("y", "state", "d"), (*out, vjp((do, dS))), strict=True))

  def split(x, w, b, S, ids):
    return short_conv(x, w, b, S, segment_ids=ids, axis_name="context")

  parts = over_parts(split, True, False, False, False, ids is not None)
  whole = lambda x, w, b, S, ids: short_conv(x, w, b, S, segment_ids=ids)  # noqa: E731
  assert_close(jax.jit(lambda: results(parts))(), jax.jit(lambda: results(whole))(), 1e-12)


def test_what_cannot_be_in_parts():
  r, S = make(*FEW[0], T=T)
  with pytest.raises(NotImplementedError, match="reference"):
    run(r, S, None, *cotangents(r, S), backend="reference")
  x, w = np.zeros((1, 8, 2)), np.zeros((4, 2))
  short = over_parts(lambda x: short_conv(x, w, axis_name="context"), True)
  with pytest.raises(ValueError, match="a part of 2 tokens has no 3"):
    short(x)
