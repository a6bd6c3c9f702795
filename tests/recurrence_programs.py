"""Programs of a recurrence for compilers that run in processes of their own."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.linear_recurrence import linear_recurrence, linear_recurrence_step
from pallas_kernels.linear_recurrence.shapes import SHAPES, Shape, inputs

# Decay, erase, the state an erase reads, bonus: all that a mechanism can be.
DECAYS = ("none", "constant", "scalar", "channel")
SPECIALISATIONS = [
  *itertools.product(DECAYS, ("none", "key", "low_rank"), ("decayed",), ("",)),
  *itertools.product(("constant", "scalar", "channel"), ("key", "low_rank"), ("undecayed",), ("",)),
  *itertools.product(DECAYS, ("none",), ("decayed",), ("bonus",)),
]


def with_gradients(backend, shape, dtype, T, packed):
  """Outputs, final state and every gradient, from an initial state."""
  r = jax.eval_shape(lambda: inputs(shape, length=T, dtype=jnp.dtype(dtype)))
  B, _, Hv, V = r.v.shape
  state = jax.ShapeDtypeStruct((B, Hv, shape.key_dim, V), jnp.float32)
  ids = jax.ShapeDtypeStruct((B, T), jnp.int32) if packed else None

  def run(r, state, ids, do, dstate):
    def forward(r, state):
      return linear_recurrence(r, state, segment_ids=ids, return_state=True, backend=backend)

    out, vjp = jax.vjp(forward, r, state)
    return out, vjp((do, dstate))

  return run, (r, state, ids, r.v, state)


def flat(tree):
  """[B, T, heads, D] as [B, T, heads D], which projections write."""
  return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x, tree)


def gradients(argument: str):
  """ "backend:shape:T:dtype:layout:packed" of a real shape, of every gradient; layout "flat", or "heads": four axes."""
  backend, name, T, dtype, layout, packed = argument.split(":")
  r = jax.eval_shape(lambda: inputs(SHAPES[name], length=int(T), dtype=jnp.dtype(dtype)))
  ids = jax.ShapeDtypeStruct(r.v.shape[:2], jnp.int32) if packed == "packed" else None
  laid = flat if layout == "flat" else lambda tree: tree

  def run(args, ids, do):
    def forward(args):
      own = jax.tree.map(lambda x, of: x.reshape(of.shape), args, r)
      return laid(linear_recurrence(own, segment_ids=ids, backend=backend)[0])

    _, vjp = jax.vjp(forward, args)
    return vjp(do)

  args = jax.eval_shape(laid, r)
  return run, (args, ids, args.v)


def temporary_bound(argument: str, chunk: int) -> float:
  """Bytes that such a program may take: states at chunk boundaries and 1.2 times the gradients.

  Of four axes it copies inputs and the outputs' gradient as well, and holds all of them when the backward kernel runs
  (on v6e the compiler finds room for one of them in VMEM).
  """
  _, name, T, dtype, layout, _ = argument.split(":")
  shape = SHAPES[name]
  r = jax.eval_shape(lambda: inputs(shape, length=int(T), dtype=jnp.dtype(dtype)))
  like_inputs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(r))
  states = 4 * shape.batch * shape.value_heads * shape.key_dim * shape.value_dim * int(T) / chunk
  copies = 0 if layout == "flat" else like_inputs + r.v.size * r.v.dtype.itemsize
  return states + 1.2 * like_inputs + copies


def real(argument: str):
  """ "backend:shape:T:dtype[:devices]" of a real shape, or of one device's heads of it."""
  backend, name, T, dtype, devices = (argument + ":1").split(":")[:5]
  shape, n = SHAPES[name], int(devices)
  heads = dict(heads=max(shape.heads // n, 1), value_heads=max(shape.value_heads // n, 1))
  return with_gradients(backend, dataclasses.replace(shape, **heads), dtype, int(T), packed=False)


def heads(argument: str):
  """ "backend:heads-K-value heads-V:decay-erase-reads:T:dtype" of any heads, with packed segments."""
  backend, sizes, case, T, dtype = argument.split(":")
  shape = Shape(*map(int, sizes.split("-")), *case.split("-"))
  return with_gradients(backend, shape, dtype, int(T), packed=True)


def one_token(argument: str):
  """ "backend:K-V:dtype of the state": a token of what has most operands, with the largest of states."""
  backend, sizes, dtype = argument.split(":")
  K, V = map(int, sizes.split("-"))
  r = jax.eval_shape(lambda: inputs(Shape(2, K, 2, V, "channel", "low_rank"), length=1))
  state = jax.ShapeDtypeStruct((1, 2, K, V), jnp.dtype(dtype))
  return (lambda r, S: linear_recurrence_step(r, S, backend=backend)), (r, state)


def specialisation(argument: str):
  """ "backend:decay-erase-reads-bonus-dtype": two rows of packed segments, a length that is no multiple of a chunk."""
  backend, case = argument.split(":")
  decay, erase, reads, bonus, dtype = case.split("-")
  shape = Shape(2, 64, 4, 128, decay, erase, reads, bonus == "bonus", batch=2)
  return with_gradients(backend, shape, dtype, 300, packed=True)
