"""Rows that are checked and not timed: every specialisation of the GPU kernels, on small shapes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.block_sparse import shapes as sparse_shapes
from pallas_kernels.linear_recurrence import linear_recurrence
from pallas_kernels.linear_recurrence.shapes import Shape, inputs

# Two value heads to a key head, 100 tokens more than chunks hold.
_LENGTH = 612
RECURRENCES = {
  "no_decay": Shape(1, 128, 2, 128, "none"),
  "no_decay_key": Shape(1, 128, 2, 128, "none", "key"),
  "no_decay_low_rank": Shape(1, 64, 2, 64, "none", "low_rank"),
  "no_decay_bonus": Shape(1, 64, 2, 64, "none", bonus=True),
  "constant": Shape(1, 128, 2, 128, "constant"),
  "constant_key": Shape(1, 128, 2, 128, "constant", "key"),
  "constant_low_rank": Shape(1, 64, 2, 64, "constant", "low_rank"),
  "scalar": Shape(1, 128, 2, 64, "scalar"),
  "scalar_key": Shape(1, 128, 2, 128, "scalar", "key"),
  "scalar_key_undecayed": Shape(1, 128, 2, 128, "scalar", "key", "undecayed"),
  "scalar_low_rank": Shape(1, 64, 2, 64, "scalar", "low_rank"),
  "channel": Shape(1, 128, 2, 128, "channel"),
  "channel_bonus": Shape(1, 64, 2, 64, "channel", bonus=True),
  "channel_key": Shape(1, 128, 2, 128, "channel", "key"),
  "channel_low_rank": Shape(1, 64, 2, 64, "channel", "low_rank", "undecayed"),
  "k64_v64": Shape(1, 64, 2, 64, "channel", "key"),
  "k256_v256": Shape(1, 256, 2, 256, "channel", "key"),
  "k256_v512": Shape(1, 256, 2, 512, "scalar"),
  "k128_low_rank": Shape(1, 128, 2, 128, "channel", "low_rank", "undecayed"),
  "k256_low_rank": Shape(1, 256, 2, 256, "channel", "low_rank", "undecayed"),
}
_BOUNDS = {"bfloat16": 2e-2, "float32": 1e-3}

_SMALL = dict(heads=8, kv_heads=1, groups=1)
SPARSE = {
  name: (dataclasses.replace(sparse_shapes.SHAPES[shape], **change), length, options)
  for name, shape, change, length, options in (
    ("nsa", "nsa", dict(heads=16, kv_heads=1, groups=1), 1500, {}),
    # MoBA's blocks are of 4096; the reference's masks and logits are of all keys, and these fit five blocks.
    ("moba", "moba", dict(heads=4, kv_heads=1, groups=4, block_size=1024, top_k=4), 4400, {}),
    ("infllm_v2", "infllm_v2", _SMALL | dict(top_k=8), 1000, {}),
    ("minimax_m3", "minimax_m3", _SMALL | dict(top_k=4), 1000, {}),
    ("window", "minimax_m3", _SMALL | dict(top_k=4), 1000, dict(window=100)),
    ("sinks", "minimax_m3", _SMALL | dict(top_k=4), 1000, dict(sinks=True)),
    ("segments", "minimax_m3", _SMALL | dict(top_k=4), 1000, dict(packed=True)),
  )
}


def _documents(length: int):
  """Ids of documents, one of them a single token."""
  return jnp.searchsorted(
    jnp.array([length // 3, length // 3 + 1]), jnp.arange(length), side="right"
  )[None]


def _row(kernel, shape, error, backend, bound):
  from pallas_kernels import bench_gpu

  return bench_gpu.Row(
    *(kernel, shape, "check"),
    make=tuple,
    contestants={backend: lambda: None},
    error=error,
    bound=bound,
    bytes=0,
    flops=0,
    timed=False,
  )


def recurrence_case(s: Shape, dtype: str, packed: bool, length: int) -> tuple[Callable, tuple]:
  """From a backend to outputs, final state and every gradient, and arguments; of packed segments, or from a state."""
  from pallas_kernels import bench_gpu

  r = inputs(s, length=length, dtype=jnp.dtype(dtype), seed=bench_gpu._seed(), correlation=0.5)
  key = jax.random.key(bench_gpu._seed())
  state = jax.random.normal(key, (1, s.value_heads, s.key_dim, s.value_dim))
  ids = _documents(length) if packed else None

  def run(name):
    options = dict(segment_ids=ids, return_state=True, backend=name)
    return bench_gpu.with_gradients(functools.partial(linear_recurrence, **options), 2)

  return run, (r, state)


def recurrence_error(
  s: Shape, dtype: str, backend: str, packed: bool, length: int = _LENGTH
) -> float:
  """Of a ``recurrence_case``."""
  from pallas_kernels import bench_gpu

  run, args = recurrence_case(s, dtype, packed, length)
  return bench_gpu.against_reference(run, backend, args)


def sparse_case(s: sparse_shapes.Shape, length: int, options: dict) -> tuple[Callable, tuple]:
  """From a backend to outputs, lse and every gradient, and arguments."""
  from pallas_kernels import bench_gpu

  options = dict(options)
  keys = jax.random.split(jax.random.key(bench_gpu._seed()), 4)
  heads = (s.heads, s.key_dim), (s.kv_heads, s.key_dim), (s.kv_heads, s.value_dim)
  args = [
    jax.random.normal(k, (1, length, *h)).astype(jnp.bfloat16)
    for k, h in zip(keys, heads, strict=False)
  ]
  if options.pop("sinks", False):
    args.append(jax.random.normal(keys[3], (s.heads,)))
  ids = _documents(length) if options.pop("packed", False) else None
  blocks = bench_gpu.blocks_of(s, -(-length // s.block_size) * s.block_size, 1)[:, :, :length]

  def run(name):
    options_ = dict(block_size=s.block_size, segment_ids=ids, backend=name) | options

    def attend(q, k, v, *sinks):
      return block_sparse_attention(q, k, v, blocks, sinks=sinks[0] if sinks else None, **options_)

    return bench_gpu.with_gradients(attend, len(args))

  return run, tuple(args)


def sparse_error(s: sparse_shapes.Shape, length: int, options: dict, backend: str) -> float:
  """Of a ``sparse_case``."""
  from pallas_kernels import bench_gpu

  run, args = sparse_case(s, length, options)
  return bench_gpu.against_reference(run, backend, args)


def rows(kernel: str = "gpu") -> Iterator:
  """All of them."""
  for name, s in RECURRENCES.items():
    for dtype, bound in _BOUNDS.items():
      for packed in (False, True):
        error = functools.partial(recurrence_error, s, dtype, kernel, packed)
        suffix = f"{dtype}_packed" if packed else dtype
        yield _row("linear_recurrence", f"{name}_{suffix}", error, kernel, bound)
  for name, (s, length, options) in SPARSE.items():
    error = functools.partial(sparse_error, s, length, options, kernel)
    yield _row("block_sparse", name, error, kernel, 2e-2)
