"""Heads before tokens, and back: numbers are moved and nothing else, so that everything is equal to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_races

from pallas_kernels import heads_first as module
from pallas_kernels.heads_first import heads_first, heads_last


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
# Tokens of several steps of the kernel with some left, fewer than a step, and one; several registers a head.
@pytest.mark.parametrize("T, H, D", [(530, 2, 128), (35, 3, 128), (1, 2, 128), (20, 2, 256)])
def test_moves_heads(T, H, D, dtype, backend):
  """Both ways, outputs and gradients."""
  x = jax.random.normal(jax.random.key(0), (2, T, H, D), dtype)
  moved = np.swapaxes(np.asarray(x), 1, 2)
  y, vjp = jax.vjp(lambda x: heads_first(x, backend=backend), x)
  np.testing.assert_array_equal(y, moved)
  np.testing.assert_array_equal(vjp(y)[0], x)
  y, vjp = jax.vjp(lambda y: heads_last(y, backend=backend), y)
  np.testing.assert_array_equal(y, x)
  np.testing.assert_array_equal(vjp(y)[0], moved)


def test_the_kernels_have_no_races():
  x = jax.random.normal(jax.random.key(0), (2, 40, 2, 128), jnp.bfloat16)
  with tpu_races.none(kernels=2):
    y = module._call(x, True, tpu_races.STRICT)
    jax.block_until_ready((y, z := module._call(y, False, tpu_races.STRICT)))
  np.testing.assert_array_equal(z, x)


def test_parts_of_registers_are_xla_s():
  x = jnp.zeros((1, 4, 2, 64))
  with pytest.raises(NotImplementedError, match="whole 128 lanes; got 64 channels"):
    heads_first(x, backend="interpret")
  assert heads_first(x).shape == (1, 2, 4, 64)
