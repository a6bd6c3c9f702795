"""What is particular to the softmax mixers; what every mixer must do is in test_mixers.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import Context, Layer, configure, mixer

D, B = 16, 2
PAIRS = dict(window=5, second_window=3)
MLA = dict(num_heads=2, kv_lora_rank=12, nope_dim=4, rope_dim=2, value_dim=6)
SOFTMAX = dict(num_heads=4, head_dim=8)


def make(name, d_model=D, **settings):
  cls = mixer(name)
  return cls(configure(cls, settings), Layer(d_model), jax.random.key(0))


def tokens(T, batch=B, seed=1):
  x = np.random.default_rng(seed).normal(size=(batch, T, D))
  return jnp.asarray(x, jnp.float32)


def context(start, T, batch=B, segment_ids=None):
  positions = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (batch, T))
  return Context(positions, segment_ids)


def whole(layer, x, start=0):
  return jax.jit(lambda layer, x: layer(x, context(start, x.shape[1], x.shape[0])).y)(layer, x)


def in_pieces(layer, x, pieces, max_len=None):
  """Reads x into a cache in pieces of these lengths: the outputs and the last cache."""
  step = jax.jit(lambda layer, x, ctx, cache: layer(x, ctx, cache))
  cache, start, out = layer.init_cache(x.shape[0], max_len or x.shape[1]), 0, []
  for n in pieces:
    got = step(layer, x[:, start : start + n], context(start, n, x.shape[0]), cache)
    cache, start = got.cache, start + n
    out.append(got.y)
  return jnp.concatenate(out, axis=1), cache


# The same sums in another order, in float32.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def test_grouped_heads_are_repeated_ones():
  """Grouped-query attention is multi-head attention whose key heads are copies, head h's of head h // group."""
  grouped, full = make("softmax", num_kv_heads=2, **SOFTMAX), make("softmax", **SOFTMAX)
  for name in ("q_proj", "out_proj"):
    getattr(full, name).kernel[...] = getattr(grouped, name).kernel[...]
  for name in ("k_proj", "v_proj"):
    kernel = getattr(grouped, name).kernel[...].reshape(D, 2, 8)
    getattr(full, name).kernel[...] = jnp.repeat(kernel, 2, axis=1).reshape(D, 32)
  x = tokens(9)
  close(whole(grouped, x), whole(full, x))


def test_without_position_the_order_of_the_past_is_not_seen():
  """And with RoPE it is."""
  x = tokens(9)
  order = np.r_[np.random.default_rng(2).permutation(8), 8]
  for fraction, same in ((0.0, True), (0.5, False), (1.0, False)):
    layer = make("softmax", rope_fraction=fraction, **SOFTMAX)
    difference = np.abs(whole(layer, x)[:, -1] - whole(layer, x[:, order])[:, -1]).max()
    assert (difference < 1e-5) == same


@pytest.mark.parametrize("name, settings", [("softmax", SOFTMAX), ("mla", MLA)])
def test_rope_sees_distances_only(name, settings):
  layer, x = make(name, **settings), tokens(9)
  np.testing.assert_allclose(whole(layer, x), whole(layer, x, start=1000), rtol=1e-3, atol=1e-4)


def test_a_window_of_everything_is_full_attention():
  x = tokens(9)
  full = make("softmax", **SOFTMAX)
  close(whole(make("swa", window=9, **SOFTMAX), x), whole(full, x))
  assert np.abs(whole(make("swa", window=8, **SOFTMAX), x) - whole(full, x)).max() > 1e-4


def test_a_window_forgets():
  """Bit for bit: token t does not see token t - window, and does see the one after it."""
  layer, x = make("swa", window=4, **SOFTMAX), tokens(9)
  y = whole(layer, x)
  np.testing.assert_array_equal(y[:, 4:], whole(layer, x.at[:, 0].set(5.0))[:, 4:])
  assert np.abs(y[:, 4] - whole(layer, x.at[:, 1].set(5.0))[:, 4]).max() > 1e-4


@pytest.mark.parametrize("pieces", [[1] * 23, [23], [3, 11, 1, 1, 4, 1, 2], [5, 5, 5, 5, 1, 1, 1]])
def test_ring_of_a_window(pieces):
  """Single tokens, and pieces shorter than the window, as long, and longer, wherever in the ring they begin."""
  layer, x = make("swa", window=5, num_kv_heads=2, sinks=True, **SOFTMAX), tokens(23)
  y, cache = in_pieces(layer, x, pieces)
  close(y, whole(layer, x))
  assert int(cache["length"]) == 23
  # Each of the last five tokens in its slot, the position modulo five.
  _, reference = in_pieces(make("softmax", num_kv_heads=2, sinks=True, **SOFTMAX), x, [23])
  for p in range(18, 23):
    close(cache["v"][:, p % 5], reference["v"][:, p])


def test_bytes_of_caches():
  """2 T Hkv d e for keys and values, w instead of T for a window, (512 + 64) T e for latents, and segment ids."""

  def size(layer, dtype=jnp.bfloat16):
    cache = jax.eval_shape(lambda: layer.init_cache(3, 1000, dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

  def bookkeeping(slots):
    return 3 * slots * 4 + 4

  gqa = dict(num_kv_heads=2, **SOFTMAX)
  assert size(make("softmax", **gqa)) == 3 * 2 * 1000 * 2 * 8 * 2 + bookkeeping(1000)
  assert size(make("swa", window=70, **gqa)) == 3 * 2 * 70 * 2 * 8 * 2 + bookkeeping(70)
  assert size(make("mla", num_heads=2)) == 3 * 1000 * 576 * 2 + bookkeeping(1000)


def test_sinks():
  """A sink of minus infinity is none; one like a lone token's logit leaves half; a large one nothing."""
  layer, plain = make("softmax", sinks=True, **SOFTMAX), make("softmax", **SOFTMAX)
  x = tokens(9)
  layer.sinks[...] = jnp.full(4, -1e9)
  close(whole(layer, x), whole(plain, x))
  layer.sinks[...] = jnp.full(4, 1e9)
  close(whole(layer, x), 0)
  # The first token's only logit, by hand.
  q, k = (p(x[:, 0]).reshape(B, 4, 8) for p in (plain.q_proj, plain.k_proj))
  logit = (q * k).sum(axis=-1) * 8**-0.5
  layer.sinks[...] = logit[0]
  close(whole(layer, x)[0, 0], whole(plain, x)[0, 0] / 2)


@pytest.mark.parametrize("gate", ["element", "head"])
def test_output_gate(gate):
  layer, x = make("softmax", output_gate=gate, **SOFTMAX), tokens(9)
  layer.gate_proj.kernel[...] = jnp.zeros_like(layer.gate_proj.kernel[...])
  close(whole(layer, x), whole(make("softmax", **SOFTMAX), x) / 2)


def test_qk_norm_forgets_the_scale_of_keys():
  layer, x = make("softmax", qk_norm=True, **SOFTMAX), tokens(9)
  y = whole(layer, x)
  layer.k_proj.kernel[...] *= 100
  layer.q_proj.kernel[...] *= 100
  np.testing.assert_allclose(y, whole(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra", [dict(), dict(q_lora_rank=5, rope_dim=0)])
def test_latent_space_gives_what_expanded_keys_give(extra):
  """The two forms of MLA, over a cache: outputs and gradients of queries and latents."""
  layer = make("mla", **MLA | extra)
  c = layer.config
  rng = np.random.default_rng(3)
  q = jnp.asarray(rng.normal(size=(B, 3, 2, c.nope_dim + c.rope_dim)), jnp.float32)
  latent = jnp.asarray(rng.normal(size=(B, 11, c.kv_lora_rank + c.rope_dim)), jnp.float32)
  ids = np.ones((B, 11), np.int32)
  ids[1, :4] = 0
  where = dict(
    query_positions=5 + jnp.arange(3),
    segment_ids=jnp.ones((B, 3), jnp.int32),
    key_segment_ids=jnp.asarray(ids),
  )

  def run(form):
    def loss(layer, q, latent):
      o = getattr(layer, form)(q, latent, where)
      return jnp.sum(jnp.sin(o)), o

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(layer, q, latent)

  jax.tree.map(close, run("absorbed"), run("expanded"))


def test_latent_space_is_for_few_tokens():
  """Counted: 576 multiply-adds a logit and 512 a value instead of 192 and 128, or 256 for each latent's expansion."""
  layer = make("mla", num_heads=2)
  cached = 10000
  for T in (1, 16, 170, 171, 4096):
    latent_space = T * cached * (576 + 512)
    expanded = T * cached * (192 + 128) + cached * 512 * 256
    assert layer.absorbs(T) == (latent_space <= expanded)


def test_mla_decodes_and_prefills_alike():
  """Sizes for which up to eight tokens attend in latent space, and more with expanded keys."""
  layer, x = make("mla", **MLA), tokens(17)
  assert [layer.absorbs(T) for T in (1, 8, 9, 10)] == [True, True, False, False]
  for pieces in ([17], [9, 8], [1] * 17, [3, 10, 1, 1, 2]):
    close(in_pieces(layer, x, pieces)[0], whole(layer, x))


def test_a_cache_may_be_longer_and_is_not_overrun():
  layer, x = make("softmax", **SOFTMAX), tokens(9)
  close(in_pieces(layer, x, [4, 5], max_len=40)[0], whole(layer, x))
  with pytest.raises(UserError, match="9 tokens do not fit a cache of 8"):
    in_pieces(layer, x, [9], max_len=8)


@pytest.mark.parametrize(
  "name, settings, sizes",
  [
    ("softmax", dict(num_kv_heads=4, **SOFTMAX), dict(data=2, model=4)),
    ("softmax", dict(num_kv_heads=2, sinks=True, **SOFTMAX), dict(data=2, model=4)),
    # Two query heads of three a key head on a device: they may need two key heads.
    ("softmax", dict(num_heads=6, num_kv_heads=3, head_dim=8), dict(data=4, model=2)),
    ("softmax", dict(num_heads=3, num_kv_heads=1, head_dim=8), dict(data=4, model=2)),
    ("swa", dict(num_kv_heads=1, window=5, **SOFTMAX), dict(data=2, model=4)),
    ("deltaformer", SOFTMAX, dict(data=2, model=4)),
    ("simplicial", dict(num_kv_heads=2, **PAIRS, **SOFTMAX), dict(data=2, model=4)),
    ("simplicial", dict(num_heads=6, num_kv_heads=3, head_dim=8, **PAIRS), dict(data=4, model=2)),
    ("mla", MLA, dict(data=4, model=2)),
    ("mla", MLA, dict(data=2, model=4)),
  ],
)
def test_sharded_caches(name, settings, sizes):
  """Prefill in two pieces and decoding on eight devices, keys split over them or too few for that, is as on one.

  Decoding is a scan: the cache must lie where it lay before.
  """
  layer, x = make(name, **settings), tokens(20, batch=4)
  want = whole(layer, x)

  def read(layer, x):
    cache, out = layer.init_cache(4, 24), []
    for start, n in ((0, 3), (3, 12)):
      got = layer(x[:, start : start + n], context(start, n, 4), cache)
      cache = got.cache
      out.append(got.y)

    def step(carry, token):
      position, cache = carry
      got = layer(token[:, None], Context(position[:, None]), cache)
      return (position + 1, got.cache), got.y[:, 0]

    rest = jnp.moveaxis(x[:, 15:], 1, 0)
    _, last = jax.lax.scan(step, (jnp.full(4, 15, jnp.int32), cache), rest)
    return jnp.concatenate([*out, jnp.moveaxis(last, 0, 1)], axis=1)

  mesh = sharding.make_mesh(sizes)
  with jax.set_mesh(mesh):
    layer = jax.device_put(layer, sharding.shardings(layer, mesh))
    got = jax.jit(read)(layer, sharding.put(x, "batch", None, None))
  close(got, want)


def test_flops():
  """Counted key by key: a multiply-add each for logit and sum, over the keys that tokens see."""

  def counted(layer, length, decode, width):
    window = getattr(layer, "window", None) or length
    seen = [min(t + 1, window) for t in range(length)]
    return 2 * layer.H * width * (min(window, length) if decode else np.mean(seen))

  for layer in (make("softmax", **SOFTMAX), make("swa", window=7, **SOFTMAX)):
    for length in (5, 7, 30):
      for decode in (False, True):
        np.testing.assert_allclose(
          layer.core_flops(length, decode), counted(layer, length, decode, 8 + 8)
        )
  layer = make("mla", **MLA)
  np.testing.assert_allclose(layer.core_flops(30, False), counted(layer, 30, False, 6 + 6))
  np.testing.assert_allclose(layer.core_flops(30, True), counted(layer, 30, True, 14 + 12))


@pytest.mark.parametrize(
  "name, settings, words",
  [
    ("softmax", dict(num_kv_heads=3, **SOFTMAX), "num_heads=4 is not a multiple of num_kv_heads=3"),
    ("window_linear", dict(num_kv_heads=2, **SOFTMAX), "num_kv_heads=2 must be num_heads=4"),
    ("window_linear", dict(sinks=True, **SOFTMAX), "sinks=False"),
    ("deltaformer", dict(num_kv_heads=2, **SOFTMAX), "num_kv_heads=2 must be num_heads=4"),
    ("deltaformer", dict(sinks=True, **SOFTMAX), "sinks=False"),
    ("simplicial", dict(sinks=True, **SOFTMAX), "has no sinks"),
    ("fox", dict(sinks=True, **SOFTMAX), "a sink forgets nothing"),
    ("comba", dict(negative_eigenvalues=True, head_dim=8), "would grow without bound"),
  ],
)
def test_bad_settings(name, settings, words):
  with pytest.raises(UserError, match=words):
    make(name, **settings)
