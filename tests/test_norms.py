"""Norms of heads that lie side by side, against the same norms with an axis of heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import sharding
from attnlab.nn import RMSNorm, l2norm, l2norm_heads

H, SIZE = 6, 16


def both(name):
  if name == "l2":
    return l2norm, lambda x: l2norm_heads(x, SIZE)
  norm = RMSNorm(SIZE)
  norm.scale[...] = jnp.linspace(0.5, 2, SIZE)
  return norm, norm.heads


@pytest.mark.parametrize("name", ["l2", "rms"])
@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
def test_norms_of_heads(name, dtype, bound):
  """Values and gradients. bfloat16: results are rounded to 2^-9, sums of squares less."""
  with_axis, side_by_side = both(name)
  x = jax.random.normal(jax.random.key(0), (2, 5, H, SIZE)).astype(dtype)
  dy = jax.random.normal(jax.random.key(1), x.shape).astype(dtype)
  flat = lambda x: x.reshape(2, 5, -1)  # noqa: E731
  want, vjp = jax.vjp(with_axis, x)
  got, flat_vjp = jax.vjp(side_by_side, flat(x))
  for a, b in ((got, flat(want)), (*flat_vjp(flat(dy)), flat(*vjp(dy)))):
    assert a.dtype == dtype
    a, b = np.float64(a), np.float64(b)
    assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@pytest.mark.parametrize("model", [2, 4])
def test_on_devices_with_whole_heads_and_with_parts(model):
  mesh = sharding.make_mesh({"replica": 1, "data": 2, "model": model}, jax.devices()[: 2 * model])
  x = jax.random.normal(jax.random.key(0), (2, 5, H * SIZE))
  want = l2norm_heads(x, SIZE)
  with jax.set_mesh(mesh):
    got = jax.jit(lambda x: l2norm_heads(sharding.put(x, "batch", None, "heads"), SIZE))(x)
  np.testing.assert_allclose(got, want, rtol=1e-6)
