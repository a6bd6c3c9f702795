"""Projections, also to heads and from them, against sums written out in float64, also over devices."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import sharding
from attnlab.nn import Linear

B, T, D, H, SIZE = 4, 3, 10, 6, 8


def on_devices(model: int):
  """6 heads over 2 devices, or not over 4, which hold parts of them."""
  if model == 0:
    return contextlib.nullcontext()
  devices = jax.devices()[: 2 * model]
  return jax.set_mesh(sharding.make_mesh({"data": 2, "model": model}, devices))


def gradients(layer, name, x, dy):
  """Outputs, and the gradients of x and of the kernel."""
  graphdef, state = nnx.split(layer)
  arguments = [H] if name == "to_heads" else []

  @jax.jit
  def run(state, x, dy):
    call = lambda state, x: getattr(nnx.merge(graphdef, state), name)(x, *arguments)  # noqa: E731
    y, vjp = jax.vjp(call, state, sharding.put(x, "batch", *[None] * (x.ndim - 1)))
    dstate, dx = vjp(sharding.like(dy, y))
    return y, dx, dstate["kernel"][...]

  return run(state, x, dy)


@pytest.mark.parametrize("model", [0, 2, 4])
@pytest.mark.parametrize("name", ["__call__", "to_heads", "of_heads"])
def test_projections(name, model):
  inputs, outputs = (H * SIZE, D) if name == "of_heads" else (D, H * SIZE)
  axes = ("heads", "embed") if name == "of_heads" else ("embed", "heads")
  layer = Linear(jax.random.key(0), inputs, outputs, axes)
  flat, heads = (
    np.asarray(jax.random.normal(jax.random.key(i), (B, T, *shape)), np.float64)
    for i, shape in enumerate([(D,), (H, SIZE)], 1)
  )
  w = np.asarray(layer.kernel[...], np.float64)
  if name == "__call__":
    x, dy = flat, heads.reshape(B, T, H * SIZE)
    sums = "btd,dn->btn", "btn,dn->btd", "btd,btn->dn"
  elif name == "to_heads":
    x, dy, w = flat, heads, w.reshape(D, H, SIZE)
    sums = "btd,dhk->bthk", "bthk,dhk->btd", "btd,bthk->dhk"
  else:
    x, dy, w = heads, flat, w.reshape(H, SIZE, D)
    sums = "bthk,hkd->btd", "btd,hkd->bthk", "bthk,btd->hkd"
  want = [np.einsum(s, *of) for s, of in zip(sums, ((x, w), (dy, w), (x, dy)), strict=True)]
  with on_devices(model):
    got = gradients(layer, name, jnp.float32(x), jnp.float32(dy))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(np.asarray(a).reshape(b.shape), b, rtol=1e-4, atol=1e-4)
