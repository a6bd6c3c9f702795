"""Programs of a recurrence for compilers that run in processes of their own."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.linear_recurrence.shapes import SHAPES, Shape, inputs


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


def specialisation(argument: str):
  """ "backend:decay-erase-reads-bonus-dtype": two rows of packed segments, a length that is no multiple of a chunk."""
  backend, case = argument.split(":")
  decay, erase, reads, bonus, dtype = case.split("-")
  shape = Shape(2, 64, 4, 128, decay, erase, reads, bonus == "bonus", batch=2)
  return with_gradients(backend, shape, dtype, 300, packed=True)
