"""The helper that the kernels' tests look for races with, on kernels with one and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_races
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def copied(x, waits):
  """A copy by DMA, which is waited for before it is read, or after."""

  def kernel(x, o, buffer, done):
    copy = pltpu.make_async_copy(x, buffer, done)
    copy.start()
    if waits:
      copy.wait()
    o[...] = buffer[...]
    if not waits:
      copy.wait()

  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
    scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    interpret=tpu_races.STRICT,
  )(x)


def test_a_race_is_found_in_whichever_kernel_it_is():
  x = jnp.arange(1024.0).reshape(8, 128)
  with tpu_races.found() as answers:
    jax.block_until_ready(jax.jit(lambda x: copied(copied(x, False) * 0 + x, True))(x))
  assert answers == [True, False]
  with pytest.raises(AssertionError), tpu_races.none(2):
    jax.block_until_ready(jax.jit(lambda x: copied(copied(x, False) * 0 + x, True))(x))


def test_no_race_where_there_is_none():
  x = jnp.arange(1024.0).reshape(8, 128)
  with tpu_races.none(2):
    y = jax.jit(lambda x: copied(copied(x, True) + 1, True))(x)
    np.testing.assert_array_equal(y, x + 1)
  with pytest.raises(AssertionError), tpu_races.none(1):  # nothing ran
    pass
