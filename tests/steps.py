"""One token of a recurrence of every kind, and its definition in float64: what tests of a step's kernels share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_recurrence import KeyErase
from pallas_kernels.linear_recurrence.shapes import Shape, inputs

# Decay, erase, the state an erase reads, bonus: all that a mechanism can be.
DECAYS = ("none", "constant", "scalar", "channel")
CASES = [
  *itertools.product(DECAYS, ("none", "key", "low_rank"), ("decayed",), (False,)),
  *itertools.product(("scalar", "channel"), ("key", "low_rank"), ("undecayed",), (False,)),
  *itertools.product(("none", "constant", "scalar", "channel"), ("none",), ("decayed",), (True,)),
]


def make(case, B=2, H=1, Hv=2, K=16, V=8, dtype=jnp.float32):
  decay, erase, reads, bonus = case
  shape = Shape(H, K, Hv, V, decay, erase, reads, bonus, batch=B, length=1)
  state = jax.random.normal(jax.random.key(1), (B, Hv, K, V))
  return inputs(shape, dtype=dtype), state


def exact(r, state):
  """The definition in numpy, float64: the output [B, 1, Hv, V] and the new state."""
  r, S = jax.tree.map(lambda x: np.asarray(x, np.float64), (r, state))
  q, k = (np.repeat(x[:, 0], S.shape[1] // r.k.shape[2], axis=1) for x in (r.q, r.k))
  v, before = r.v[:, 0], S
  if r.log_decay is not None:
    g = r.log_decay[None, :, None] if r.decay == "constant" else r.log_decay[:, 0]
    S = np.exp(g)[..., None] * S
  seen = S if r.reads == "decayed" else before
  if isinstance(r.erase, KeyErase):
    v = r.erase.beta[:, 0][..., None] * (v - np.einsum("bhk,bhkv->bhv", k, seen))
  elif r.erase is not None:
    a, b = r.erase.a[:, 0], r.erase.b[:, 0]
    S = S + np.einsum("bhk,bhj,bhjv->bhkv", a, b, seen)
  S = S + np.einsum("bhk,bhv->bhkv", k, v)
  o = np.einsum("bhk,bhkv->bhv", q, S)
  if r.bonus is not None:
    u = np.repeat(r.bonus, S.shape[1] // r.bonus.shape[0], axis=0)
    written = before + np.einsum("hk,bhk,bhv->bhkv", u, k, v)
    o = np.einsum("bhk,bhkv->bhv", q, written)
  return o[:, None], S


def assert_close(got, want, bound):
  for g, w in zip(got, want, strict=True):
    error = np.linalg.norm(np.asarray(g, np.float64) - w) / np.linalg.norm(w)
    assert error < bound, error
