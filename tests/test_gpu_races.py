"""The collector of races, on a race that was planted in the first of two kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_races import watch
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


def kernel(racy: bool):
  """Two warpgroups write one tile of shared memory each; the racy ones write the same."""

  def body(x, y, buffer):
    own = lax.axis_index("warpgroup")
    tile = buffer.at[0 if racy else own]
    tile[...] = x[own]
    plgpu.commit_smem()
    y[own] = tile[...]

  return plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((2, 64, 64), jnp.float32),
    num_threads=2,
    thread_name="warpgroup",
    scratch_types=dict(buffer=plgpu.SMEM((2, 64, 64), jnp.float32)),
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )


@pytest.mark.parametrize("racy", [True, False])
def test_a_race_of_an_earlier_kernel_is_found(racy):
  x = jnp.ones((2, 64, 64))
  with watch() as watched:
    y = jax.jit(lambda x: kernel(False)(kernel(racy)(x)))(x)
    np.testing.assert_array_equal(y, x)
  assert watched.kernels == 2 and watched.racy == [0] * racy
  # What jax itself remembers is of the last kernel alone.
  assert not gpu_callbacks.get_races().races_found


def test_jax_is_as_it_was():
  before = gpu_callbacks.GPURaceDetectionState
  with pytest.raises(ZeroDivisionError), watch():
    _ = 1 / 0
  assert gpu_callbacks.GPURaceDetectionState is before
