"""RoPE against rotations of complex numbers in numpy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_races

from attnlab.mixers.references import frequency
from pallas_kernels.rope import rope, rope_heads, tpu
from pallas_kernels.rope.frequencies import scaled

THETA = 100.0


def turned(x, positions, fraction, sign=1, frequencies=None):
  """Section 3.4.2: a pair of channels as a complex number times e^(i position theta^(-2 j / n)). [B, T, H, D]"""
  x = np.asarray(x, np.float64).copy()
  n = int(x.shape[-1] * fraction) // 2 * 2
  for j in range(n // 2):
    frequency = THETA ** (-2 * j / n) if frequencies is None else frequencies[j]
    angle = sign * np.asarray(positions, np.float64) * frequency
    z = (x[..., j] + 1j * x[..., j + n // 2]) * np.exp(1j * angle)[..., None]
    x[..., j], x[..., j + n // 2] = z.real, z.imag
  return x


def inputs(T, heads, size, dtype):
  x, dy = (jax.random.normal(jax.random.key(i), (2, T, heads * size), dtype) for i in range(2))
  # As packed documents have them: from 0 again, and the other row somewhere within one.
  return x, dy, jnp.stack([jnp.arange(T) % 29, 7 + jnp.arange(T)])


def close(got, want, positions):
  """Frequencies are powers in float32, right to two units in the last place; bfloat16 results are rounded to 2^-9."""
  angle = float(jnp.max(positions)) * 2**-22
  rtol = 2**-8 if got.dtype == jnp.bfloat16 else 0
  got = np.asarray(got, np.float64).reshape(want.shape)
  np.testing.assert_allclose(got, want, rtol=rtol, atol=angle * np.abs(want).max() + 1e-6)


def turns(run, x, dy, positions, fraction, heads, frequencies=None):
  """That ``run`` rotates x, and its gradient back; ``heads`` is the shape with an axis of heads."""
  y, vjp = jax.vjp(run, x)
  assert y.dtype == x.dtype
  x64, dy64 = (np.asarray(a, np.float64).reshape(heads) for a in (x, dy))
  close(y, turned(x64, positions, fraction, 1, frequencies), positions)
  close(vjp(dy)[0], turned(dy64, positions, fraction, -1, frequencies), positions)


def in_both(cases):
  """Each case in float32, and in bfloat16: two of three of those, the dtype being what differs, for the long run."""
  return [
    pytest.param(*case, dtype, marks=[pytest.mark.slow] if dtype == jnp.bfloat16 and i % 3 else [])
    for i, case in enumerate(cases)
    for dtype in (jnp.float32, jnp.bfloat16)
  ]


# One head a register of 128 lanes, several, and several registers a head; heads that turn in part; with tokens that
# fill a step of the kernel, and that leave some.
CASES = [
  (64, 2, 128, 1.0),
  (33, 2, 128, 0.25),
  (40, 4, 64, 1.0),
  (32, 4, 64, 0.5),
  (50, 8, 32, 1.0),
  (640, 1, 256, 1.0),
  (35, 2, 256, 0.5),
  (35, 3, 256, 0.25),
]


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("T, heads, size, fraction, dtype", in_both(CASES))
def test_heads_side_by_side(T, heads, size, fraction, dtype, backend):
  """Outputs, and the gradient, which is the rotation back."""
  x, dy, positions = inputs(T, heads, size, dtype)
  run = lambda x: rope_heads(x, positions, size, THETA, fraction, backend=backend)  # noqa: E731
  turns(run, x, dy, positions, fraction, (2, T, heads, size))


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
def test_heads_with_an_axis(fraction):
  x, _, positions = inputs(5, 3, 6, jnp.float32)
  x = x.reshape(2, 5, 3, 6)
  close(rope(x, positions, THETA, fraction), turned(x, positions, fraction), positions)


# Steps of several heads, and, of so many tokens, of one; heads of less than a register's lanes, which turn in part.
@pytest.mark.parametrize(
  "T, heads, size, fraction, dtype",
  in_both(
    [
      (64, 3, 128, 1.0),
      (520, 11, 128, 1.0),
      (33, 4, 128, 0.5),
      (35, 2, 256, 1.0),
      (40, 3, 64, 1.0),
      (33, 2, 64, 0.5),
      (33, 2, 32, 1.0),
    ]
  ),
)
def test_heads_that_come_first_in_the_kernel(T, heads, size, fraction, dtype):
  x, dy, positions = inputs(T, heads, size, dtype)
  shape = 2, T, heads, size
  run = lambda x: rope(x, positions, THETA, fraction, backend="interpret")  # noqa: E731
  turns(run, x.reshape(shape), dy.reshape(shape), positions, fraction, shape)


# Llama 3.1's, and DeepSeek-V3's.
@pytest.mark.parametrize(
  "theta, size, scaling, kept, changed",
  [
    (5e5, 128, ("llama3", 8.0, 8192, 1.0, 4.0), 29, 35),
    (1e4, 64, ("yarn", 40.0, 4096, 1.0, 32.0), 11, 23),
  ],
)
def test_frequencies_for_longer_texts(theta, size, scaling, kept, changed):
  """The first pairs turn as they did, the last ``factor`` times as slowly, and each of the others a little slower in
  proportion than that before it; all as in the mixers' reference, which has the papers' formulas for one pair."""
  plain = theta ** (-np.arange(0, size, 2) / size)
  ratio = scaled(theta, size, scaling) / plain
  np.testing.assert_allclose(ratio[:kept], 1, rtol=1e-6)
  np.testing.assert_allclose(ratio[changed:], 1 / scaling[1], rtol=1e-6)
  assert (np.diff(ratio[kept - 1 : changed + 1]) < 0).all()
  want = [frequency(i, size, theta, scaling) for i in range(size // 2)]
  np.testing.assert_allclose(scaled(theta, size, scaling), want, rtol=1e-6)
  x, dy, positions = inputs(40, 2, size, jnp.float32)
  run = lambda x: rope_heads(x, positions, size, theta, 1.0, scaling, backend="interpret")  # noqa: E731
  turns(run, x, dy, positions, 1.0, (2, 40, 2, size), np.array(want))


def test_a_scaling_that_is_not_known():
  with pytest.raises(ValueError, match="'llama3' or 'yarn', not 'ntk'"):
    scaled(1e4, 64, ("ntk", 8.0, 8192, 1.0, 4.0))


def test_products_depend_on_distances():
  """What RoPE is for: q . k is the same wherever both are moved to."""
  x = jax.random.normal(jax.random.key(0), (1, 2, 1, 64))
  products = []
  for start in (0, 1000):
    q, k = rope(x, start + jnp.array([[0, 5]]))[0, :, 0]
    products.append(q @ k)
  np.testing.assert_allclose(*products, rtol=1e-3)
  q, k = rope(x, jnp.array([[0, 6]]))[0, :, 0]
  assert abs(q @ k - products[0]) > 0.1  # and another at another distance


def test_the_kernel_has_no_races():
  for T, heads, size in ((70, 2, 128), (40, 4, 64)):
    x, _, positions = inputs(T, heads, size, jnp.bfloat16)
    with tpu_races.none(kernels=1):
      y = tpu.rotate(x[:, None], positions, size, THETA, size, None, tpu_races.STRICT)
      jax.block_until_ready(y)
    want = turned(np.asarray(x, np.float64).reshape(2, T, heads, size), positions, 1)
    close(y, want, positions)


@pytest.mark.parametrize(
  "T, heads, size, fraction, message",
  [
    (8, 2, 128, 1.0, "needs 32 tokens or more; got 8"),
    (64, 3, 64, 1.0, "got 3 of 64 channels"),
    (64, 4, 96, 1.0, "got 4 of 96 channels"),
    (64, 2, 256, 0.75, "half of 192 channels"),
  ],
)
def test_what_the_kernel_does_not_serve(T, heads, size, fraction, message):
  """A backend that is named says why; "auto" takes XLA."""
  x, _, positions = inputs(T, heads, size, jnp.float32)
  with pytest.raises(NotImplementedError, match=message):
    rope_heads(x, positions, size, THETA, fraction, backend="interpret")
  assert rope_heads(x, positions, size, THETA, fraction).shape == x.shape


def test_heads_that_do_not_fit():
  with pytest.raises(ValueError, match="100 channels are no whole number of heads of 64"):
    rope_heads(jnp.zeros((1, 4, 100)), jnp.zeros((1, 4), jnp.int32), 64)
