"""Norms of heads that lie side by side, against their definitions with an axis of heads in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import sharding
from attnlab.nn import HeadNorm, RMSNorm, expand_heads, head_sums, l2norm_heads

H, SIZE, EPS = 6, 16, 1e-6


def rms(y, axes, scale):
  return y / jnp.sqrt(jnp.mean(y**2, axis=axes, keepdims=True) + EPS) * scale


def two_groups(y, scale):
  y = y.reshape(*y.shape[:2], 2, H // 2, SIZE)
  return rms(y, (-1, -2), scale.reshape(2, H // 2, SIZE)).reshape(*y.shape[:2], H, SIZE)


SCALE = np.linspace(0.5, 2, SIZE)
SCALES, BIASES = np.linspace(0.5, 2, H * SIZE).reshape(H, SIZE), np.linspace(-1, 1, H * SIZE)
BIASES = BIASES.reshape(H, SIZE)
DEFINITIONS = {
  "l2": lambda y: y / jnp.sqrt(jnp.sum(y**2, axis=-1, keepdims=True) + EPS),
  "rms": lambda y: rms(y, -1, SCALE),
  "each": lambda y: rms(y, -1, SCALES),
  "two groups": lambda y: two_groups(y, SCALES),
  "all": lambda y: rms(y, (-1, -2), SCALES),
  "all centered": lambda y: (
    rms(y - jnp.mean(y, axis=(-1, -2), keepdims=True), (-1, -2), SCALES) + BIASES
  ),
  "centered": lambda y: rms(y - jnp.mean(y, axis=-1, keepdims=True), -1, SCALES) + BIASES,
}


def side_by_side(name):
  """The layer under test, [B, T, H * SIZE] to the same."""
  if name == "l2":
    return lambda x: l2norm_heads(x, SIZE, EPS)
  if name == "rms":
    norm = RMSNorm(SIZE, EPS)
    norm.scale[...] = jnp.float32(SCALE)
    return norm.heads
  groups = {"two groups": 2, "all": 1, "all centered": 1}.get(name)
  norm = HeadNorm(H, SIZE, groups, EPS, center="centered" in name)
  norm.scale[...] = jnp.float32(SCALES)
  if norm.bias is not None:
    norm.bias[...] = jnp.float32(BIASES)
  return norm.heads


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3)])
def test_norms_of_heads(name, dtype, bound):
  """Values and gradients. bfloat16: results are rounded to 2^-9, sums of squares less."""
  x = (0.5 + jax.random.normal(jax.random.key(0), (2, 5, H * SIZE))).astype(dtype)
  dy = jax.random.normal(jax.random.key(1), x.shape).astype(dtype)
  got, vjp = jax.vjp(side_by_side(name), x)
  (dx,) = vjp(dy)
  with jax.enable_x64(True):
    heads = (jnp.asarray(np.float64(a)).reshape(2, 5, H, SIZE) for a in (x, dy))
    x64, dy64 = heads
    want, vjp = jax.vjp(DEFINITIONS[name], x64)
    pairs = ((got, want), (dx, *vjp(dy64)))
  for a, b in pairs:
    assert a.dtype == dtype
    a, b = np.float64(a), np.float64(b).reshape(a.shape)
    assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@pytest.mark.parametrize("name", ["l2", "centered", "two groups", "all"])
@pytest.mark.parametrize("model", [2, 4])
def test_on_devices_with_whole_heads_and_with_parts(model, name):
  mesh = sharding.make_mesh({"data": 2, "model": model}, jax.devices()[: 2 * model])
  x = jax.random.normal(jax.random.key(0), (2, 5, H * SIZE))
  norm = side_by_side(name)
  want = norm(x)
  with jax.set_mesh(mesh):
    got = jax.jit(lambda x: norm(sharding.put(x, "batch", None, "heads")))(x)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_sums_and_back():
  x = jax.random.normal(jax.random.key(0), (2, 5, H * SIZE))
  want = np.float64(x).reshape(2, 5, H, SIZE).sum(-1)
  np.testing.assert_allclose(head_sums(x, SIZE), want, rtol=1e-5, atol=1e-6)
  back = expand_heads(jnp.float32(want), SIZE).reshape(2, 5, H, SIZE)
  np.testing.assert_array_equal(back, np.repeat(np.float32(want)[..., None], SIZE, axis=-1))
