"""Single mechanisms: constants, closed forms and properties that the contract of all mixers does not hold."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from attnlab.mixers import Context, Layer, configure, mixer
from attnlab.mixers.lightning import alibi_slopes
from attnlab.mixers.linear import Recent
from attnlab.mixers.mamba3 import Mamba3
from pallas_kernels.rotation import cumulative_angle

B, T, D = 2, 6, 16


def normal(seed, *shape, dtype=np.float64):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def build(name, index=0, count=4, **settings):
  cls = mixer(name)
  return cls(configure(cls, settings), Layer(D, index, count), jax.random.key(index))


# Constants.


def test_retnet_gammas():
  """Section 2.1, eq. 8: gamma = 1 - 2^(-5 - arange(h))."""
  layer = build("retnet", num_heads=4)
  ctx = Context(jnp.zeros((1, 1), jnp.int32))
  g = layer.signals(jnp.ones((1, 1, D)), Recent(layer, ctx, None), ctx)["g"]
  np.testing.assert_allclose(np.exp(g), [31 / 32, 63 / 64, 127 / 128, 255 / 256], rtol=1e-6)


def test_alibi_slopes():
  """The table of "Train Short, Test Long" (arXiv:2108.12409) and its authors' rule for other numbers of heads."""
  assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
  assert alibi_slopes(16)[:3] == [2**-0.5, 2**-1.0, 2**-1.5]
  assert alibi_slopes(12) == alibi_slopes(8) + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
  assert alibi_slopes(1) == [2.0**-8]


@pytest.mark.parametrize(
  ("name", "first", "last"),
  [
    ("lightning", [0.25, 0.0625, 0.015625, 0.00390625], 1e-5),
    ("lightning_fla", [0.0, 2.0, 4.0, 6.0], 1 / 4),
  ],
)
def test_lightning_slopes(name, first, last):
  """MiniMax-01's: ALiBi's, times 1 - l / (L - 1) + 1e-5. fla's: 8 h / H (1 - l / L), so that head 0 has no decay."""
  slopes = [np.asarray(build(name, l, num_heads=4, head_dim=4).slope[...]) for l in (0, 3)]
  np.testing.assert_allclose(slopes[0], np.array(first), rtol=2e-5)
  np.testing.assert_allclose(slopes[1], np.array(first) * last, rtol=1e-5)


# RWKV-7.


def test_rwkv7_values_lean_on_the_first_layer():
  """Eq. 8 and 9: the first layer has its own values and hands them on; a later one moves towards those by its gate."""
  first, second = (build("rwkv7", i, num_heads=2, head_dim=8) for i in (0, 1))
  x = jnp.asarray(normal(0, B, T, D, dtype=np.float32))
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  nothing = {"rwkv7_v": jnp.zeros((B, T, 2, 8)), "rwkv7_has_v": jnp.zeros((B, T))}

  def signals(layer, shared):
    return layer.signals(x, lambda name, y: jnp.zeros_like(y), Context(positions, None, shared))

  own = signals(first, nothing)
  np.testing.assert_array_equal(own["v"], own["own_v"])
  handed = first(x, Context(positions, None, nothing)).shared
  assert (handed["rwkv7_has_v"] == 1).all()
  before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  mixed = x + (before - x) * first.mix[...][3]
  want = first.v_proj(mixed).reshape(B, T, 2, 8)
  np.testing.assert_allclose(handed["rwkv7_v"], want, rtol=1e-5, atol=1e-6)

  later = signals(second, handed)
  gate = jax.nn.sigmoid(second.v0[...])  # its low-rank map starts at zero
  lean = later["own_v"] + (handed["rwkv7_v"] - later["own_v"]) * gate
  np.testing.assert_allclose(later["v"], lean, rtol=1e-5, atol=1e-6)
  assert 0.5 < float(gate.min()) and float(gate.max()) < 0.9
  kept = second(x, Context(positions, None, handed)).shared
  np.testing.assert_array_equal(kept["rwkv7_v"], handed["rwkv7_v"])


# Mamba-3.


def test_mamba3_closed_form():
  """The quadratic form: token s reaches t > s by exp(sum g) (lambda_s dt_s + (1 - lambda_{s+1}) dt_{s+1}), its own
  output by lambda_t dt_t, and C_t B_s is turned by the angle between them. float64: rounding alone."""
  H, N, P, A = 2, 6, 3, 2
  with jax.enable_x64(True):
    C, X = normal(0, B, T, H, 1, N), normal(1, B, T, H, 1, N)
    x, theta = normal(2, B, T, H, 1, P), normal(3, B, T, H, A)
    dt, trap = (np.log1p(np.exp(normal(i, B, T, H))) for i in (4, 5))
    trap, g = trap / (1 + trap), -dt * np.exp(normal(6, B, T, H))
    y, _ = jax.jit(Mamba3.core)(C, X, x, g, dt, trap, theta)
    phi = np.cumsum(np.pi * np.tanh(theta) * dt[..., None], axis=1)
    want = np.zeros_like(x)
    for t in range(T):
      for s in range(t + 1):
        weight = trap[:, s] * dt[:, s]
        if s < t:
          weight = weight + (1 - trap[:, s + 1]) * dt[:, s + 1]
        weight = weight * np.exp(g[:, s + 1 : t + 1].sum(1))
        pairs = C[:, t, :, 0].reshape(B, H, N // 2, 2) @ np.array([1, 1j])
        other = X[:, s, :, 0].reshape(B, H, N // 2, 2) @ np.array([1, 1j])
        turn = np.pad(phi[:, t] - phi[:, s], ((0, 0), (0, 0), (0, N // 2 - A)))
        score = (pairs.conj() * other * np.exp(-1j * turn)).real.sum(-1)
        want[:, t, :, 0] += (weight * score)[..., None] * x[:, s, :, 0]
  np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [0.3, 3.0, 30.0])
def test_angles_do_not_drift(size):
  """float32 angles after 65536 turns that mostly go one way, against float64.

  A rounding is 2^-23 at most, and those of 65536 tokens, of random sign, add up to 256 of them, 3e-5; single turns of
  30 radians are themselves rounded by 2e-6, but alike in both. 1e-3 leaves room for their not being random. Taking
  away float32's 2 pi, 1.7e-7 too large, is off by 0.05 at 30 radians.
  """
  turn = (size * (1 + normal(0, 1, 65536, 1, 2))).astype(np.float32)
  starts = np.zeros((1, 65536), bool)
  starts[0, [0, 5, 30_000]] = True
  whole = np.cumsum(turn.astype(np.float64), axis=1)
  before = np.repeat(whole[:, [4, 29_999]], [29_995, 35_536], axis=1)
  since = np.concatenate([whole[:, :5], whole[:, 5:] - before], axis=1)
  for got, want in (
    (jax.jit(cumulative_angle)(turn), whole),
    (jax.jit(cumulative_angle)(turn, starts), since),
  ):
    got = np.asarray(got, np.float64)
    assert np.abs(got).max() <= math.pi + 1e-6
    off = (got - want + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(off).max() < 1e-3


# The delta rule.


def test_delta_rule_recalls_what_it_wrote_last():
  """With beta = 1, a key that has just been written reads its value, whatever the state held."""
  with jax.enable_x64(True):
    k, v, S = unit(normal(0, B, T, 2, 4)), normal(1, B, T, 2, 3), normal(2, B, 2, 4, 3)
    o, _ = jax.jit(pk.delta_rule)(k * 4**0.5, k, v, np.ones((B, T, 2)), initial_state=S)
  np.testing.assert_allclose(o, v, rtol=1e-10, atol=1e-10)


def test_delta_rule_of_orthogonal_keys_is_linear_attention():
  """Nothing lies under a new key that would have to be erased."""
  with jax.enable_x64(True):
    k = np.broadcast_to(np.eye(T)[None, :, None], (B, T, 2, T))
    q, v = normal(0, B, T, 2, T), normal(1, B, T, 2, 3)
    o, _ = jax.jit(pk.delta_rule)(q, k, v, np.ones((B, T, 2)))
    want, _ = jax.jit(pk.linear_attention)(q, k, v)
  np.testing.assert_allclose(o, want, rtol=1e-10, atol=1e-10)


def test_negative_eigenvalues_reflect():
  """beta = 2 is a reflection, which twice is nothing (parity), and two of them are a rotation by twice their angle,
  of which one token of DeltaProduct makes one (S3, modular addition)."""
  angle = 2 * np.pi / 3
  with jax.enable_x64(True):
    S, zero, two = normal(0, B, 1, 2, 3), np.zeros((B, T, 1, 3)), np.full((B, T, 1), 2.0)
    k = np.broadcast_to(unit(normal(1, 2)), (B, T, 1, 2))
    keep = dict(initial_state=S, return_state=True)
    _, after = jax.jit(lambda: pk.delta_rule(k, k, zero, two, **keep))()
    _, odd = jax.jit(lambda: pk.delta_rule(k[:, 1:], k[:, 1:], zero[:, 1:], two[:, 1:], **keep))()
    np.testing.assert_allclose(after, S, rtol=1e-10, atol=1e-10)  # T is even
    assert np.abs(odd - S).max() > 0.1

    half = np.array([[1.0, 0.0], [np.cos(angle / 2), np.sin(angle / 2)]])
    keys = np.broadcast_to(half, (B, 1, 1, 2, 2))
    step = (keys[:, :, :, 0], keys, np.zeros((B, 1, 1, 2, 3)), np.full((B, 1, 1, 2), 2.0))
    _, turned = jax.jit(lambda: pk.gated_delta_product(*step, **keep))()
  rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  np.testing.assert_allclose(turned, rotation @ S, rtol=1e-10, atol=1e-10)
