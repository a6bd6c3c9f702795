"""Recurrences of every kind with random inputs, and comparisons of backends: what tests of kernels share."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_recurrence import KeyErase, LowRankErase, Recurrence, linear_recurrence

# What a mechanism can be: decay, erase, the state an erase reads, bonus.
CASES = [
  *itertools.product(
    ("none", "constant", "scalar", "channel"), (None, "key", "low"), ("decayed",), (False,)
  ),
  ("constant", "low", "undecayed", False),
  ("scalar", "key", "undecayed", False),
  ("channel", "key", "undecayed", False),
  ("channel", "low", "undecayed", False),
  *itertools.product(("none", "scalar", "channel"), (None,), ("decayed",), (True,)),
]
# The same with fewer compilations: every decay, erase, kind of read and bonus once or twice.
FEW = [
  ("none", "key", "decayed", False),
  ("constant", "low", "undecayed", False),
  ("scalar", None, "decayed", True),
  ("scalar", "key", "undecayed", False),
  ("channel", "key", "decayed", False),
  ("channel", "low", "undecayed", False),
]
# Two rows of 37 tokens: a segment of one token, an id that comes back (a new segment all the same),
# changes at a chunk's edge and within a chunk of 8.
SEGMENTS = np.stack([np.repeat([1, 2, 3], [5, 20, 12]), np.repeat([4, 2, 4, 9], [1, 7, 8, 21])])


def ids(case):
  return "-".join(str(c) for c in case if c)


def some(cases, often):
  """The cases in ``often`` every time, the others with -m slow: compiling one takes seconds."""
  assert set(often) <= set(cases), "what is not a case is never run"
  return [pytest.param(c, id=ids(c), marks=[] if c in often else pytest.mark.slow) for c in cases]


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(decay, erase, reads, bonus, *, B=2, T=37, H=2, Hv=4, K=8, V=6, rho=0.5, beta=None, seed=0):
  """A recurrence and an initial state in float64; keys of one head have correlation rho."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)  # noqa: E731
  k = unit(np.sqrt(1 - rho) * normal(B, T, H, K) + np.sqrt(rho) * normal(B, 1, H, K))
  g = {
    "none": None,
    "constant": -rng.exponential(0.5, size=Hv),
    "scalar": -rng.exponential(0.5, size=(B, T, Hv, 1)),
    "channel": -rng.exponential(0.5, size=(B, T, Hv, K)),
  }[decay]
  step = rng.uniform(0, 1.9, size=(B, T, Hv)) if beta is None else np.full((B, T, Hv), beta)
  wide = np.repeat(k, Hv // H, axis=2)
  erases = {
    None: None,
    "key": KeyErase(step),
    "low": LowRankErase(-step[..., None] * wide, unit(wide + 0.3 * unit(normal(B, T, Hv, K)))),
  }
  u = normal(H, K) if bonus else None
  q, v = unit(normal(B, T, H, K)), normal(B, T, Hv, V)
  r = Recurrence(q, k, v, g, erases[erase], u, reads)
  return jax.tree.map(jnp.asarray, (r, normal(B, Hv, K, V)))


jit = functools.partial(jax.jit, static_argnames=("backend", "chunk"))


def call(r, S, segment_ids=None, *, backend="xla", chunk=8):
  options = dict(segment_ids=segment_ids, return_state=True, chunk_size=chunk, backend=backend)
  return linear_recurrence(r, S, **options)


outputs = jit(call)


@jit
def run_jit(r, S, segment_ids, do, dS, *, backend, chunk):
  forward = functools.partial(call, segment_ids=segment_ids, backend=backend, chunk=chunk)
  (o, final), vjp = jax.vjp(forward, r, S)
  dr, dinitial = vjp((do.astype(o.dtype), dS.astype(final.dtype)))
  return {"o": o, "final": final, "d": dr, "dinitial": dinitial}


def cotangents(r, S):
  """Random gradients of outputs and final state."""
  rng = np.random.default_rng(7)
  return tuple(rng.normal(size=x.shape).astype(np.float32) for x in (r.v, S))


def run(r, S, segment_ids=None, do=None, dS=None, *, backend="xla", chunk=8):
  """Outputs and final state, then the gradients of everything for these cotangents (or random)."""
  drawn = cotangents(r, S)
  do, dS = (x if given is None else given for x, given in zip(drawn, (do, dS), strict=True))
  return run_jit(r, S, segment_ids, do, dS, backend=backend, chunk=chunk)


def reference(*args):
  return run(*args, backend="reference", chunk=None)


def reference_in_pieces(r, S, size):
  """``reference``, ``size`` tokens at a time: each piece from the state before it, and back from the gradient after it.

  The tests' compiler copies an array that a loop writes to at each step: one loop would take a square of the time.
  """
  pieces = [slice(i, i + size) for i in range(0, r.v.shape[1], size)]
  cut = lambda piece: jax.tree.map(lambda x: x[:, piece], r)  # noqa: E731
  do, dS = cotangents(r, S)
  states, got = [S], []
  for piece in pieces:
    states.append(outputs(cut(piece), states[-1], backend="reference", chunk=None)[1])
  for piece, state in zip(reversed(pieces), reversed(states[:-1]), strict=True):
    got.insert(0, reference(cut(piece), state, None, do[:, piece], dS))
    dS = got[0]["dinitial"]
  in_time = [{k: x[k] for k in ("o", "d")} for x in got]
  whole = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *in_time)
  return whole | {"final": states[-1], "dinitial": dS}


def cast(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def rounded(r, dtype):
  """Vectors in dtype, gates in float32."""
  vectors = {name: getattr(r, name).astype(dtype) for name in ("q", "k", "v")}
  r = cast(r, jnp.float32)
  if isinstance(r.erase, LowRankErase):
    vectors["erase"] = cast(r.erase, dtype)
  return dataclasses.replace(r, **vectors)


def named(tree):
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in paths}


def assert_close(got, want, bound, floor=0.0):
  """Relative error (2-norm of the array) and cosine of every array.

  ``floor``: arrays of a smaller norm than this are compared to it instead: they are differences of
  larger numbers, and their last bits are those numbers' rounding.
  """
  got, want = named(got), named(want)
  assert got.keys() == want.keys()
  for name, w in want.items():
    g = got[name]
    assert g.shape == w.shape and np.isfinite(g).all(), name
    size = max(np.linalg.norm(w), floor)
    error = np.linalg.norm(g - w) / size if size else np.linalg.norm(g)
    assert error <= bound, f"{name}: relative error {error:.1e} > {bound:.1e}"
    if np.linalg.norm(w) > floor:
      cosine = np.vdot(g, w) / (np.linalg.norm(g) * np.linalg.norm(w))
      assert cosine >= 1 - bound, f"{name}: cosine 1 - {1 - cosine:.1e}"


def assert_cosines(got, want, least):
  """Directions, of which gradients are made: every array's cosine to the truth."""
  want = named(want)
  for name, g in named(got).items():
    w = want[name]
    cosine = np.vdot(g, w) / (np.linalg.norm(g) * np.linalg.norm(w))
    assert cosine >= least, f"{name}: cosine 1 - {1 - cosine:.1e}"
