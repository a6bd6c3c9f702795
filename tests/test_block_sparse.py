"""Block-sparse attention against a definition in numpy, float64, one query at a time; and the choice of blocks."""

import collections
import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_races import watch
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from pallas_kernels import dispatch
from pallas_kernels.block_sparse import (
  Layout,
  api,
  block_sparse_attention,
  gpu,
  gpu_backward,
  gpu_tables,
  gpu_tiles,
  merge_attention,
  over_queries,
  select_blocks,
  tpu,
  tpu_by_query,
  tpu_rows,
  tpu_tables,
  tpu_tiles,
)
from pallas_kernels.block_sparse.reference import Blocks
from pallas_kernels.cost.kernels import pallas_calls
from pallas_kernels.softmax_attention import softmax_attention, splash

B, H, HKV, D, V = 2, 4, 2, 6, 5
# Rows of different documents; one has one token alone.
SEGMENTS = np.stack([np.repeat([1, 2, 3], [5, 14, 4]), np.repeat([3, 1, 2], [12, 1, 10])])


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture
def small_chunks(monkeypatch):
  """A few queries at a time: a short sequence has several chunks, the last of them not whole."""
  monkeypatch.setattr(dispatch, "_CPU", 1 << 14)


def inputs(Tq, Tk=None, heads=(H, HKV), seed=0, dims=(D, V)):
  """q, k, v and sinks."""
  rng = np.random.default_rng(seed)
  Tk = Tk or Tq
  shapes = (B, Tq, heads[0], dims[0]), (B, Tk, heads[1], dims[0]), (B, Tk, heads[1], dims[1])
  return [rng.normal(size=s) for s in (*shapes, (heads[0],))]


def choices(groups, rows, blocks, slots, seed=1):
  """Distinct blocks in no order for each group and row, some slots empty, and some blocks later than the row."""
  rng = np.random.default_rng(seed)
  out = np.full((B, groups, rows, slots), -1, np.int32)
  for at in np.ndindex(B, groups, rows):
    n = min(rng.integers(0, slots + 1), blocks)
    out[at][:n] = rng.permutation(blocks)[:n]
  return out


def starts_of(segment_ids):
  starts = np.zeros_like(segment_ids)
  for t in range(1, segment_ids.shape[1]):
    same = segment_ids[:, t] == segment_ids[:, t - 1]
    starts[:, t] = np.where(same, starts[:, t - 1], t)
  return starts


def definition(
  q,
  k,
  v,
  indices,
  sinks=None,
  *,
  block_size,
  query_block=1,
  window=0,
  segment_ids=None,
  query_positions=None,
  starts=None,
):
  Tq, Tk = q.shape[1], k.shape[1]
  position = range(Tq) if query_positions is None else query_positions
  start = np.zeros((B, Tq), int) if segment_ids is None else starts_of(segment_ids)
  start = start if starts is None else np.repeat(starts[:, None], Tq, 1)
  o, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
  for b, t, h in np.ndindex(*q.shape[:3]):
    chosen = set(indices[b, h // (q.shape[2] // indices.shape[1]), t // query_block])

    def sees(s, b=b, t=t, chosen=chosen):
      if not start[b, t] <= s <= position[t]:
        return False
      return (s - start[b, t]) // block_size in chosen or position[t] - s < window

    g = h // (q.shape[2] // k.shape[2])
    seen = [s for s in range(Tk) if sees(s)]
    logits = [q.shape[-1] ** -0.5 * q[b, t, h] @ k[b, s, g] for s in seen]
    logits += [] if sinks is None else [sinks[h]]
    if logits:
      lse[b, t, h] = np.log(np.sum(np.exp(logits)))
      for s, logit in zip(seen, logits, strict=False):
        o[b, t, h] += np.exp(logit - lse[b, t, h]) * v[b, s, g]
  return o, lse


def attend(q, k, v, indices, sinks=None, **options):
  return block_sparse_attention(q, k, v, indices, sinks=sinks, **options)


def weighted(o, lse):
  """A number of both results; a query that sees nothing has no part in it."""
  rng = np.random.default_rng(4)
  a, b = rng.normal(size=o.shape), rng.normal(size=lse.shape)
  seen = lse > -jnp.inf
  return (o * a).sum() + jnp.where(seen, jnp.where(seen, lse, 0) * b, 0).sum()


def with_gradients(args, indices, **options):
  def run(args, indices):
    q, k, v, *sinks = args
    out = attend(q, k, v, indices, *sinks, **options)
    return weighted(*out), out

  gradients, out = jax.jit(jax.grad(run, has_aux=True))([jnp.asarray(x) for x in args], indices)
  return out, gradients


CASES = {
  "a group a key head": dict(block_size=4),
  "a group a query head": dict(block_size=4, groups=4),
  "one key head": dict(block_size=3, heads=(4, 1), groups=2),
  "blocks of queries": dict(block_size=4, query_block=5),
  "tokens": dict(block_size=1, slots=7),
  "more blocks than there are": dict(block_size=8, slots=9),
  "one block": dict(block_size=64, slots=1),
  "window": dict(block_size=4, window=6),
  "sinks": dict(block_size=4, sinks=True),
  "segments": dict(block_size=4, segment_ids=SEGMENTS),
  "all": dict(block_size=4, window=3, segment_ids=SEGMENTS, sinks=True),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(float64, small_chunks, name):
  """Outputs against the definition, and every gradient of both of them against JAX's derivative of the dense form."""
  case, T = dict(CASES[name]), 23
  heads = case.pop("heads", (H, HKV))
  args = inputs(T, heads=heads)[: 4 if case.pop("sinks", 0) else 3]
  rows = -(-T // case.get("query_block", 1))
  blocks = -(-T // case["block_size"])
  indices = choices(case.pop("groups", heads[1]), rows, blocks, case.pop("slots", 3))
  got, gradients = with_gradients(args, indices, **case)
  dense, dense_gradients = with_gradients(args, indices, **case, backend="reference")
  q, k, v, *sinks = args
  want = definition(q, k, v, indices, *sinks, **case)
  for g, d, w in zip(got, dense, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(d, w, rtol=1e-12, atol=1e-12)
  for g, d in zip(gradients, dense_gradients, strict=True):
    np.testing.assert_allclose(g, d, rtol=1e-9, atol=1e-12)


PALLAS = {
  "aligned": dict(block_size=16),
  "documents, a window, sinks": dict(block_size=16, segment_ids=SEGMENTS, window=5, sinks=True),
  "several groups of slots": dict(block_size=32, groups=4, query_block=5, slots=5),
  "a head a key head": dict(block_size=16, heads=(4, 4), groups=4),
  "several items a block": dict(block_size=16, heads=(16, 1), groups=1, segment_ids=SEGMENTS),
  "long blocks": dict(block_size=64, groups=4, length=150),
  "long blocks of documents": dict(
    block_size=48, groups=4, sinks=True,
    segment_ids=np.stack([np.repeat([1, 2, 3], [5, 104, 41]), np.repeat([3, 1, 2], [72, 1, 77])]),
  ),
  "3 heads a group": dict(block_size=16, heads=(3, 1), groups=1, segment_ids=SEGMENTS),
  "5 heads a group": dict(block_size=16, heads=(10, 1), groups=2),
  "6 heads a group": dict(block_size=64, heads=(6, 1), groups=1, length=80),
  "7 heads a group": dict(block_size=16, heads=(7, 1), groups=1, query_block=3),
  "tokens": dict(block_size=1, heads=(6, 1), groups=2, slots=256, length=40),
  "pairs of tokens": dict(block_size=2, slots=64, segment_ids=SEGMENTS, window=5, sinks=True),
}  # fmt: skip


@pytest.fixture
def small_pallas(monkeypatch):
  """Kernels with several steps, several matrices a query, and several items a block."""
  for name, value in dict(_KEYS=128, _QUERIES=2, TOGETHER=2).items():
    monkeypatch.setattr(tpu_by_query, name, value)
  for name, value in dict(_QUERIES=16, _WIDTH=128, _LONG=32).items():
    monkeypatch.setattr(tpu_tiles, name, value)
  monkeypatch.setattr(tpu_rows, "_KEYS", 128)


# What documents make harder is for the long run without them.
EASIER = ("aligned", "long blocks")


@pytest.mark.parametrize("heads", [1, 100])
@pytest.mark.parametrize(
  "name, ranges",
  [
    *(pytest.param(x, 1, marks=[pytest.mark.slow] * (x in EASIER)) for x in PALLAS),
    ("documents, a window, sinks", 2),
    ("long blocks of documents", 2),
  ],
)
def test_pallas_kernel(monkeypatch, small_pallas, name, ranges, heads):
  """In Pallas's interpreter against the dense form: float32 sums of some dozens of terms in another order."""
  monkeypatch.setattr(tpu, "_HEADS", heads)  # query by query, or block by block
  case = dict(PALLAS[name])
  ids = case.get("segment_ids")
  if ranges > 1 and len(ids[0]) < 32:
    ids = case["segment_ids"] = np.repeat(ids, 2, axis=1)
  length = case.pop("length", 23 if ids is None else len(ids[0]))
  if ranges > 1:  # keys of a range are a multiple of 128 otherwise
    keys = 32 * -(-length // 64)
    for module in (tpu_by_query, tpu_tiles):
      of = module.Plan.of
      shorter = lambda *a, of=of, **b: dataclasses.replace(of(*a, **b), keys=keys, ranges=2)  # noqa: E731
      monkeypatch.setattr(module.Plan, "of", shorter)
  args = inputs(length, heads=case.pop("heads", (H, HKV)))[: 4 if case.pop("sinks", 0) else 3]
  args = [x.astype(np.float32) for x in args]
  rows = -(-length // case.get("query_block", 1))
  blocks = max(2, -(-length // case["block_size"]))
  indices = choices(case.pop("groups", HKV), rows, blocks, case.pop("slots", 2))
  got = with_gradients(args, indices, **case, backend="interpret")
  want = with_gradients(args, indices, **case, backend="reference")
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size, slots", [(16, 2), (1, 128)])
def test_pallas_kernel_in_bfloat16(small_pallas, size, slots):
  """As ``test_bfloat16``."""
  args = [jnp.asarray(x, jnp.bfloat16) for x in inputs(40)[:3]]
  indices = choices(HKV, 40, -(-40 // size), slots)
  got = with_gradients(args, indices, block_size=size, backend="interpret")
  with jax.enable_x64(True):
    args = [x.astype(jnp.float64) for x in args]
    want = with_gradients(args, indices, block_size=size, backend="reference")
  for (g, w), bound in zip(
    ((got[0][0], want[0][0]), *zip(got[1], want[1], strict=True)),
    [2**-7, 1e-2, 1e-2, 1e-2],
    strict=True,
  ):
    g, w = np.asarray(g, np.float64), np.asarray(w)
    assert np.linalg.norm(g - w) < bound * np.linalg.norm(w)


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_items(unit, documents):
  """The table of what tiles of queries visit, against a walk through the choices."""
  T, tile, most, size = 23, 8, 3, 4
  layout = Layout.together(B, T, jnp.asarray(SEGMENTS) if documents else None)
  indices = choices(HKV, T, 6, 3)
  got = tpu_tables.items(Blocks(indices, layout, size), tile, unit, most, T)
  starts = np.asarray(layout.starts)
  for b, g, i in np.ndindex(B, HKV, 3):
    want = collections.defaultdict(dict)  # first key -> unit -> bits
    for t in range(i * tile, min(T, (i + 1) * tile)):
      for j in indices[b, g, t]:
        first = starts[b, t] + j * size
        if j >= 0 and first <= t:
          units = want[int(first)]
          units[t % tile // unit] = units.get(t % tile // unit, 0) | 1 << t % unit
    found = collections.defaultdict(dict)
    items = (np.asarray(x[b, g, i]) for x in (got.first, got.begin, got.count))
    firsts = []
    for first, begin, count in zip(*items, strict=True):
      if first == np.iinfo(np.int32).max:
        continue
      firsts.append(first)
      assert 0 < count <= most
      for visit in np.asarray(got.visits[b, g, i, begin : begin + count]).tolist():
        number, bits = (visit, 1) if unit == 1 else map(int, tpu_tables.split(visit))
        assert number not in found[int(first)]
        found[int(first)][number] = bits
    assert firsts == sorted(firsts) and found == want
    assert [int(got.below(key)[b, g, i]) for key in (0, 9, 99)] == [
      sum(f < key for f in firsts) for key in (0, 9, 99)
    ]


LONG_SEGMENTS = np.stack([np.repeat([1, 2, 3], [37, 50, 13]), np.repeat([3, 1, 2], [64, 1, 35])])
GPU = {
  "aligned": dict(),
  "documents, a window, sinks": dict(
    segment_ids=LONG_SEGMENTS, window=5, sinks=True, correlated=True, part=64
  ),
  "a group a query head": dict(block_size=128, groups=4, query_block=5, slots=1, dims=(64, 128)),
  "heads that lie together, padded": dict(
    heads=(12, 1), groups=1, segment_ids=LONG_SEGMENTS[:, 30:75], part=14
  ),
}


@pytest.mark.parametrize(
  "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in EASIER)) for x in GPU]
)
def test_gpu_kernels(monkeypatch, name):
  """In Pallas's interpreter, which finds no races, with walks in several parts; as ``test_bfloat16``.

  Neighbouring keys are nearly the same in one case: many weights of nearly one size.
  """
  detecting = functools.partial(gpu.forward, interpret=InterpretGPUParams(detect_races=True))
  monkeypatch.setitem(api._FORWARD, "interpret_gpu", detecting)
  case = dict(block_size=64, slots=2, part=2) | GPU[name]
  monkeypatch.setattr(gpu_backward, "_PART", case.pop("part"))
  T = case["segment_ids"].shape[1] if "segment_ids" in case else 100
  options = {k: case.pop(k) for k in ("dims", "heads") if k in case}
  args = inputs(T, **dict(dims=(64, 64)) | options)[: 4 if case.pop("sinks", 0) else 3]
  if case.pop("correlated", False):
    args[1] = np.sqrt(0.9) * args[1][:, :1] + np.sqrt(0.1) * args[1]
  args = [*(jnp.asarray(x, jnp.bfloat16) for x in args[:3]), *map(jnp.float32, args[3:])]
  rows = -(-T // case.get("query_block", 1))
  indices = choices(case.pop("groups", HKV), rows, 2, case.pop("slots"))
  with watch() as watched:
    got = with_gradients(args, indices, **case, backend="interpret_gpu")
  # Outputs; gradients of queries; of keys and values, in parts; their sums.
  assert watched.kernels == 4 and not watched.racy
  with jax.enable_x64(True):
    args = [x.astype(jnp.float64) for x in args]
    want = with_gradients(args, indices, **case, backend="reference")
  for i, (g, w) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
    g, w = np.asarray(g, np.float64), np.asarray(w)
    seen = np.isfinite(w)
    np.testing.assert_array_equal(np.isfinite(g), seen)
    g, w = g[seen], w[seen]
    # o and lse, then gradients.
    assert np.linalg.norm(g - w) < [2**-7, 1e-5, 1e-2][min(i, 2)] * np.linalg.norm(w)
    assert np.vdot(g, w) > (1 - 1e-4) * np.linalg.norm(g) * np.linalg.norm(w)


@pytest.mark.parametrize("documents", [False, True])
def test_parts_of_walks(documents):
  """The table of which parts are of which tile of keys, against the visits that reach each tile."""
  T, size, rows, part = 23, 4, 4, 2
  layout = Layout.together(B, T, jnp.asarray(SEGMENTS) if documents else None)
  blocks = Blocks(choices(HKV, T, 6, 3), layout, size)
  visits = gpu_tables.visits(blocks, 2, T)
  by = visits.first, visits.chosen, jnp.zeros((B, visits.first.shape[2]), jnp.int32)
  table = jax.tree.map(np.asarray, gpu_tables.visitors(*by, blocks, rows, T + rows, part))
  for b, g in np.ndindex(B, HKV):
    parts = table.parts[b, g]
    lengths = table.end[b, g] - table.begin[b, g]
    assert parts[0] == 0 and not lengths[parts[-1] :].any()
    for tile, (low, high) in enumerate(zip(parts, parts[1:], strict=False)):
      first = table.first[b, g]
      want = np.flatnonzero((first < (tile + 1) * rows) & (first + size > tile * rows))
      ranges = zip(table.begin[b, g, low:high], table.end[b, g, low:high], strict=True)
      got = [i for begin, end in ranges for i in range(begin, end)]
      assert got == want.tolist() and (table.keys[b, g, low:high] == tile).all()
      assert ((0 < lengths[low:high]) & (lengths[low:high] <= part)).all()
  assert {0, 1, 2} <= set(np.diff(table.parts).ravel())


def test_sums_of_parts():
  """Tiles of keys with several parts, one and none, for two groups of a head; nobody reads what is of no tile."""
  p = gpu_tiles.Plan(B, HKV, 4, 2, 32, 2, 192, 64, 128, 64, 1)
  rng = np.random.default_rng(0)
  parts = np.array([[[0, 3, 3, 4], [0, 0, 0, 2], [0, 1, 1, 5], [0, 1, 1, 2]]] * B, np.int32)
  sums = [rng.normal(size=(B, 4, 6, 64, d)).astype(np.float32) for d in (p.D, p.V)]
  for x, i in itertools.product(sums, range(4)):
    x[:, i, parts[0, i, -1] :] = np.nan
  with watch() as watched:
    got = gpu_backward.sum_parts(
      p, *sums, jnp.asarray(parts), InterpretGPUParams(detect_races=True)
    )
  assert watched.kernels == 1 and not watched.racy
  for g, x in zip(got, sums, strict=True):
    want = np.zeros((B, 3, 64, HKV, x.shape[-1]), np.float32)
    for b, i, tile in np.ndindex(B, 4, 3):
      want[b, tile, :, i // 2] += x[b, i, slice(*parts[b, i, tile : tile + 2])].sum(0)
    assert g.dtype == jnp.bfloat16 and not np.any(g[:, 64:128])
    g = np.asarray(g, np.float32).reshape(want.shape)
    np.testing.assert_allclose(g, want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
  "capability, words", [("8.0", "here it is 8.0"), ("9.0", "multiples of 64")]
)
def test_auto_becomes_xla_on_a_gpu_that_the_kernels_do_not_serve(monkeypatch, capability, words):
  """Another GPU, and a Hopper that is asked for blocks of 16; named, the backend says why."""
  monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  card = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, "local_devices", lambda: [card])
  args = [jnp.asarray(x, jnp.bfloat16) for x in inputs(16)[:3]]
  indices = choices(HKV, 16, 1, 1)
  with pytest.raises(NotImplementedError, match=words):
    attend(*args, indices, block_size=16, backend="gpu")
  got, want = (attend(*args, indices, block_size=16, backend=name) for name in ("auto", "xla"))
  for g, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(g, w)


def test_a_window_is_merged_with_what_has_its_lse(monkeypatch):
  """That is XLA's attention, and not a library's, beside which it would run for lse."""
  monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
  monkeypatch.setattr(splash, "forward", lambda *args: pytest.fail("a library's kernel"))
  args = [jnp.asarray(x, jnp.bfloat16) for x in inputs(32)[:3]]
  run = functools.partial(attend, indices=choices(HKV, 32, 2, 1), block_size=16, window=5)
  assert pallas_calls(jax.make_jaxpr(run)(*args).jaxpr)


def test_a_sink_of_nothing_where_nothing_is_seen():
  """Its softmax has no part at all: zero, and gradients that are numbers."""
  q, k, v, sinks = (jnp.asarray(x, jnp.float32) for x in inputs(16))
  sinks = sinks.at[0].set(-jnp.inf)
  indices = choices(HKV, 16, 4, 2)
  indices[:, :, :5] = -1
  (o, lse), gradients = with_gradients([q, k, v, sinks], indices, block_size=4)
  assert not np.any(o[:, :5]) and np.all(lse[:, :5, 0] == -np.inf)
  np.testing.assert_array_equal(lse[:, :5, 1:], np.broadcast_to(sinks[1:], lse[:, :5, 1:].shape))
  assert all(np.all(np.isfinite(g)) for g in gradients)


def test_selections_have_no_gradient_however_many_pieces():
  def total(y, rows):
    return jnp.sum(over_queries(jnp.square, rows, y, checkpoint=False))

  for rows in (2, 4):
    assert not np.any(jax.grad(total)(jnp.ones((1, 4, 1)), rows))


def test_a_gpu_does_not_copy_a_cache_for_a_token(monkeypatch):
  """The kernel takes keys that are padded, all of them."""
  monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
  monkeypatch.setattr(dispatch, "needs_hopper", lambda: None)
  q, k, v = (jnp.zeros((1, T, 2, 64), jnp.bfloat16) for T in (1, 4096, 4096))

  def decode(q, k, v):
    indices = jnp.zeros((1, 2, 1, 4), jnp.int32)
    return block_sparse_attention(q, k, v, indices, block_size=64, query_positions=jnp.array([9]))

  assert not pallas_calls(jax.make_jaxpr(decode)(q, k, v).jaxpr)


def test_gpu_kernels_meet_a_cache():
  """As ``test_caches``, in bfloat16."""
  q, k, v, sinks = inputs(5, 120, dims=(64, 64))
  k[:, 100:], v[:, 100:] = 1e30, -1e30
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
  options = dict(block_size=64, starts=np.array([0, 40]), query_positions=np.arange(95, 100))
  run = functools.partial(attend, backend="interpret_gpu", **options)
  indices = choices(HKV, 5, 2, 2)
  got = jax.jit(run)(q, k, v, indices)
  want = definition(*(np.asarray(x, np.float64) for x in (q, k, v)), indices, **options)
  for g, w, bound in zip(got, want, (1e-2, 1e-5), strict=True):
    np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=bound, atol=bound)


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(block_size=1), "multiples of 64"),
    (dict(dim=96), "64, 128 or 192"),
    (dict(heads=128), "128 heads"),
    (dict(dtype=jnp.float32), "float32"),
  ],
)
def test_what_the_gpu_kernels_refuse(change, words):
  c = dict(block_size=64, dim=64, heads=4, dtype=jnp.bfloat16) | change
  q = jax.ShapeDtypeStruct((1, 64, c["heads"], c["dim"]), c["dtype"])
  k = jax.ShapeDtypeStruct((1, 64, 1, c["dim"]), c["dtype"])
  indices = jax.ShapeDtypeStruct((1, 1, 64, 2), jnp.int32)
  run = functools.partial(attend, block_size=c["block_size"], backend="interpret_gpu")
  with pytest.raises(NotImplementedError, match=words):
    jax.eval_shape(run, q, k, k, indices)


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(block_size=8), "multiples of 16"),
    (dict(block_size=1 << 16, length=1 << 20), "VMEM"),
    (dict(dtype=jnp.float64), "float64"),
  ],
)
def test_what_the_pallas_kernel_refuses(change, words):
  c = dict(block_size=16, length=64, dtype=jnp.float32) | change
  with jax.enable_x64(True):
    x = jax.ShapeDtypeStruct((1, c["length"], 2, 64), c["dtype"])
    indices = jax.ShapeDtypeStruct((1, 2, c["length"], 2), jnp.int32)
    run = functools.partial(attend, block_size=c["block_size"], backend="interpret")
    with pytest.raises(NotImplementedError, match=words):
      jax.eval_shape(run, x, x, x, indices)


def test_a_named_backend_serves_or_says_why():
  for name, words in (("tpu", "needs a TPU"), ("gpu", "need a Hopper GPU")):
    with pytest.raises(NotImplementedError, match=words):
      attend(*inputs(16)[:3], choices(HKV, 16, 1, 1), block_size=16, backend=name)


@pytest.mark.parametrize("window", [0, 4])
def test_caches(float64, small_chunks, window):
  """A cache whose slots are not all filled, with a row that has padding on the left, and one that has nothing else."""
  q, k, v, sinks = inputs(5, 29)
  k[:, 20:], v[:, 20:] = 1e30, -1e30
  for starts in (np.array([0, 7]), np.array([17, 22])):
    options = dict(block_size=4, window=window, starts=starts)
    options["query_positions"] = np.arange(15, 20)
    indices = choices(HKV, 5, 8, 3)
    got = jax.jit(functools.partial(attend, **options))(q, k, v, indices, sinks)
    for g, w in zip(got, definition(q, k, v, indices, sinks, **options), strict=True):
      np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


def test_few_queries_read_a_cache_where_it_lies(float64):
  """The chosen rows, right to its end, and no copy of the rest."""
  q, k, v, sinks = inputs(1, 70)
  options = dict(block_size=4, starts=np.array([0, 7]), query_positions=np.array([69]))
  indices = np.stack([[[[17, 2, -1]], [[0, 16, 5]]], [[[15, 3, 1]], [[14, -1, -1]]]])
  got = jax.jit(functools.partial(attend, **options))(q, k, v, indices, sinks)
  for g, w in zip(got, definition(q, k, v, indices, sinks, **options), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)
  k = jax.ShapeDtypeStruct((B, 1 << 16, HKV, D), jnp.float32)
  run = jax.jit(functools.partial(attend, block_size=4, query_positions=np.array([69])))
  compiled = run.lower(jnp.asarray(q, jnp.float32), k, k, indices).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < k.size / 10


@pytest.mark.parametrize(
  "backend, size, slots",
  [
    ("auto", 4, 3),
    ("auto", 1, 128),
    ("reference", 4, 3),
    ("interpret", 16, 2),
    ("interpret", 1, 128),
  ],
)
def test_values_that_are_channels_of_the_keys(small_chunks, backend, size, slots):
  """Outputs and gradients: k has those of its part as values too. Kernels in float32, all else in float64."""
  kernels = backend == "interpret"
  dtype = np.float32 if kernels else np.float64
  bounds = dict(rtol=1e-5, atol=1e-5) if kernels else dict(rtol=1e-9, atol=1e-12)
  indices = choices(HKV, 23, -(-23 // size), slots)

  def run(values, backend, q, k):
    options = dict(block_size=size, window=2, segment_ids=SEGMENTS, backend=backend)
    out = attend(q, k, values(k), indices, **options)
    return weighted(*out), out

  def results(*args):
    return jax.jit(jax.grad(functools.partial(run, *args), (0, 1), has_aux=True))(q, k)

  with jax.enable_x64(not kernels):
    q, k = (jnp.asarray(x, dtype) for x in inputs(23)[:2])
    got = results(lambda k: V, backend)
    want = results(lambda k: k[..., :V], "reference")
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, **bounds)


def test_all_blocks_are_full_attention(float64, small_chunks):
  """Outputs and gradients."""
  args = inputs(23)[:3]
  indices = np.broadcast_to(np.arange(6), (B, HKV, 23, 6))
  got = with_gradients(args, indices, block_size=4, segment_ids=SEGMENTS)

  def full(args):
    out = softmax_attention(*args, segment_ids=SEGMENTS)
    return weighted(*out), out

  gradients, out = jax.jit(jax.grad(full, has_aux=True))([jnp.asarray(x) for x in args])
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves((out, gradients)), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-12)


def test_bitwise_causal(small_chunks):
  q, k, v, sinks = (x.astype(np.float32) for x in inputs(23))
  indices = choices(HKV, 23, 6, 3)
  run = jax.jit(lambda *a: attend(*a, block_size=4, window=3, segment_ids=SEGMENTS))
  before = run(q, k, v, indices, sinks)
  for x in (q, k, v):
    x[:, 13:] = 1e6
  after = run(q, k, v, indices, sinks)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, :13], b[:, :13]), before, after)


def test_bfloat16():
  """Against float64 on the same rounded inputs: p and o are rounded once (2^-9 each); dlogits is a difference, 1 %."""
  rounded = [jnp.asarray(x, jnp.bfloat16) for x in inputs(60)[:3]]
  indices = choices(HKV, 60, 8, 4)

  def run(dtype, backend):
    args = [x.astype(dtype) for x in rounded]
    (o, lse), gradients = with_gradients(args, indices, block_size=8, backend=backend)
    assert o.dtype == dtype and lse.dtype == jnp.promote_types(dtype, jnp.float32)
    return [np.asarray(x, np.float64) for x in (o, *gradients)]

  got = run(jnp.bfloat16, "xla")
  with jax.enable_x64(True):
    want = run(jnp.float64, "reference")
  for g, w, bound in zip(got, want, [2**-8, 1e-2, 1e-2, 1e-2], strict=True):
    assert np.linalg.norm(g - w) < bound * np.linalg.norm(w)


def test_merging_is_attention_over_the_union(float64):
  """The window and what lies before it, some of which some queries do not have."""
  q, k, v, _ = inputs(23)
  halves = [np.full((B, HKV, 23, 3), -1), np.full((B, HKV, 23, 3), -1)]
  halves[0][...], halves[1][:, :, 5:] = [0, 1, 2], [3, 4, 5]

  def merged(q, k, v):
    out = merge_attention(*(attend(q, k, v, i, block_size=4) for i in halves))
    return weighted(*out), out

  got = jax.jit(jax.grad(merged, (0, 1, 2), has_aux=True))(q, k, v)
  indices = np.concatenate(halves, axis=-1)
  out, gradients = with_gradients([q, k, v], indices, block_size=4)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves((gradients, out)), strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-12)


def test_memory_is_linear_in_length():
  """Of forward and backward: at twice the length at most 2.1 times the bytes."""

  def temporary(T):
    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    indices = jax.ShapeDtypeStruct((1, 2, T, 4), jnp.int32)

    def loss(q, k, v, indices):
      return jnp.sum(attend(q, k, v, indices, block_size=64)[0])

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, indices).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  sizes = [temporary(T) for T in (8192, 16384, 32768)]
  assert sizes[1] <= 2.1 * sizes[0] and sizes[2] <= 2.1 * sizes[1]


def test_residuals_are_inputs_and_outputs():
  q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in inputs(64))
  indices = jnp.asarray(choices(HKV, 64, 8, 4))
  run = lambda *a: jax.vjp(lambda *a: attend(*a, indices, block_size=8), *a)  # noqa: E731
  (o, lse), vjp = jax.jit(run)(q, k, v)
  kept = sum(x.size for x in jax.tree.leaves(vjp))
  layout = 64 + B * 64
  assert kept <= sum(x.size for x in (q, k, v, o, lse, indices)) + layout


@pytest.mark.parametrize("size, stride", [(4, 4), (4, 2), (5, 3), (1, 1)])
@pytest.mark.parametrize("documents", [False, True])
def test_layout(size, stride, documents):
  """The table of complete blocks against a walk through each document."""
  layout = Layout.together(B, 23, jnp.asarray(SEGMENTS) if documents else None)
  ids = SEGMENTS if documents else np.ones_like(SEGMENTS)
  starts = starts_of(ids)
  np.testing.assert_array_equal(layout.within, np.arange(23) - starts)
  columns, first = layout.table(size, stride)
  complete = layout.complete(size, stride)
  for b in range(B):
    want = []
    for start in np.unique(starts[b]):
      end = np.flatnonzero(starts[b] == start)[-1] + 1
      assert np.all(first[b, start:end] == len(want))
      want += range(start, end - size + 1, stride)
    assert columns[b].tolist() == want + [-1] * (columns.shape[1] - len(want))
    for t in range(23):
      blocks = range(starts[b, t], t - size + 2, stride)
      assert complete[b, t] == len(blocks)


def by_hand(scores, first, complete, current, top_k, initial, local):
  """One query: the forced blocks, then the best of the others by score and number."""
  forced = {j for j in range(initial) if j <= current}
  forced |= {current - i for i in range(local) if current - i >= 0}
  others = [j for j in range(min(complete, current + 1)) if j not in forced and j >= initial]
  others = [j for j in others if j <= current - local]
  others.sort(key=lambda j: (-scores[first + j], j))
  chosen = sorted([*forced, *others[: top_k - initial - local]])
  return chosen


@pytest.mark.parametrize("top_k, initial, local", [(1, 0, 0), (3, 0, 1), (5, 1, 2), (20, 2, 3)])
def test_selection(top_k, initial, local):
  """Against a sort by hand, with ties (scores of few values), documents, and forced blocks that meet."""
  size, T = 3, 23
  layout = Layout.together(B, T, jnp.asarray(SEGMENTS))
  columns, first = layout.table(size, size)
  N = columns.shape[1]
  scores = np.random.default_rng(3).integers(0, 3, (B, 2, T, N)).astype(np.float32)
  current, complete = layout.within // size, layout.complete(size, size)
  first, complete, current = (np.asarray(x) for x in (first, complete, current))
  got = select_blocks(scores, first, complete, current, top_k=top_k, initial=initial, local=local)
  for b, g, t in np.ndindex(B, 2, T):
    args = scores[b, g, t], first[b, t], complete[b, t], current[b, t]
    want = by_hand(*args, top_k, initial, local)
    assert got[b, g, t].tolist() == want + [-1] * (got.shape[-1] - len(want))


def test_nothing_to_choose_where_there_is_only_padding():
  nothing = -jnp.ones((1, 1), jnp.int32)
  got = select_blocks(
    jnp.ones((1, 1, 1, 4)), 0 * nothing, 0 * nothing, nothing, top_k=3, initial=1, local=1
  )
  assert np.all(got == -1)


def test_queries_in_parts_are_all_queries():
  x = {"a": jnp.arange(14.0).reshape(2, 7), "b": jnp.ones((2, 7, 3))}
  fn = lambda x, y: (x["a"] * 2, x["b"] + y[..., None])  # noqa: E731
  for rows in (1, 3, 7, 100):
    got = over_queries(fn, rows, x, x["a"])
    jax.tree.map(np.testing.assert_array_equal, got, fn(x, x["a"]))


@pytest.mark.parametrize(
  "name, change",
  [
    ("q", dict(q=np.zeros((B, 6, H)))),
    ("k", dict(k=np.zeros((B, 6, HKV, D + 1)))),
    ("v", dict(v=np.zeros((B, 7, HKV, V)))),
    ("block_indices", dict(block_indices=np.zeros((B, 3, 6, 2), int))),
    ("block_indices", dict(block_indices=np.zeros((B, HKV, 5, 2), int))),
    ("block_indices", dict(query_block=2)),
    ("block_size", dict(block_size=0)),
    ("window", dict(window=-1)),
    ("sinks", dict(sinks=np.zeros(HKV))),
    ("starts", dict(starts=np.zeros(B, int))),
    ("segment_ids", dict(segment_ids=np.zeros((B, 5), int))),
    ("segment_ids", dict(query_positions=np.arange(6), segment_ids=np.zeros((B, 6), int))),
    ("query_positions", dict(k=np.zeros((B, 7, HKV, D)), v=np.zeros((B, 7, HKV, V)))),
  ],
)
def test_bad_arguments_are_named(name, change):
  q, k, v, _ = inputs(6)
  args = dict(q=q, k=k, v=v, block_indices=np.zeros((B, HKV, 6, 2), int), block_size=2)
  with pytest.raises(ValueError, match=rf"^{name}\b"):
    block_sparse_attention(**args | change)


def test_more_forced_blocks_than_may_be_chosen():
  zeros = jnp.zeros((1, 1), jnp.int32)
  with pytest.raises(ValueError, match="top_k = 2"):
    select_blocks(jnp.ones((1, 1, 1, 4)), zeros, zeros, zeros, top_k=2, initial=1, local=2)
