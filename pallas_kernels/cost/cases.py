"""The programs whose cost is told. To add a kernel, add a function that yields its cases to ``cases``."""

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse import block_sparse_attention
from pallas_kernels.block_sparse.shapes import SHAPES as BLOCK_SPARSE
from pallas_kernels.cost import loops
from pallas_kernels.index_scores import index_scores
from pallas_kernels.linear_recurrence import linear_recurrence, linear_recurrence_step
from pallas_kernels.linear_recurrence.shapes import SHAPES, inputs
from pallas_kernels.pool_attention import pool_attention, pool_weights
from pallas_kernels.rope import rope, rope_heads
from pallas_kernels.short_conv import short_conv


@dataclasses.dataclass(frozen=True)
class Case:
  """One program to compile.

  Attributes:
    kernel, phase, shape: its name, in three parts.
    unit: the work that costs are told for, in words.
    units: how many of them the program does.
    build: returns the function and its arguments, which may be ShapeDtypeStructs.
    donate: positions of the arguments that the results may overwrite.
    chips: those that it is compiled for; empty: all.
    trips: of a kernel's name, how often a loop of it runs in a grid step where its program does not say, on the chip
      that is traced for.
  """

  kernel: str
  phase: str
  shape: str
  unit: str
  units: float
  build: Callable[[], tuple[Callable, tuple]]
  donate: tuple[int, ...] = ()
  chips: tuple[str, ...] = ()
  trips: Callable[[], dict[str, float]] = dict

  @property
  def name(self) -> str:
    return f"{self.kernel}/{self.phase}/{self.shape}"

  def on(self, chip: str) -> bool:
    """Whether it is compiled for a chip."""
    return not self.chips or chip in self.chips


def _projected(tree):
  """[B, T, heads, D] as a projection gives it, [B, T, heads D]: tiled otherwise, one is a copy of the other."""
  return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x, tree)


def _recurrence_cases(backend: str) -> Iterator[Case]:
  def build(shape, phase):
    r = jax.eval_shape(lambda: inputs(shape, dtype=jnp.bfloat16))

    def forward(projected):
      own = jax.tree.map(lambda x, like: x.reshape(like.shape), projected, r)
      return _projected(linear_recurrence(own, backend=backend)[0])

    def both(projected, do):
      o, vjp = jax.vjp(forward, projected)
      return o, vjp(do)

    arguments = jax.eval_shape(_projected, r)
    return (forward, (arguments,)) if phase == "forward" else (both, (arguments, arguments.v))

  for name, shape in SHAPES.items():
    if name.startswith("cpu_"):
      continue
    units = shape.batch * shape.value_heads * shape.length / 128
    for phase in ("forward", "forward_backward"):
      run = functools.partial(build, shape, phase)
      yield Case("linear_recurrence", phase, name, "128 tokens x head", units, run)


def _step_cases(backend: str) -> Iterator[Case]:
  B = 64

  def build(shape, dtype):
    r = jax.eval_shape(lambda: inputs(shape, batch=B, length=1, dtype=jnp.bfloat16))
    state = jax.ShapeDtypeStruct((B, r.v.shape[2], r.k.shape[3], r.v.shape[3]), dtype)
    return functools.partial(linear_recurrence_step, backend=backend), (r, state)

  for name, shape in SHAPES.items():
    if name.startswith("cpu_"):
      continue
    for dtype in ("float32", "bfloat16"):
      run = functools.partial(build, shape, jnp.dtype(dtype))
      units = B * shape.value_heads
      phase = f"{dtype}_state"
      yield Case("linear_recurrence_step", phase, name, "1 token x head", units, run, (1,))


# Channels of the short convolutions, with 4 taps: Qwen3-Next's over q, k and v at once, and Mamba-2 2.7B's over
# x, B and C.
_CONVOLUTIONS = {"qwen3_next": 8192, "mamba2": 5376}


def _short_conv_cases(backend: str) -> Iterator[Case]:
  T = 8192

  def build(D, phase, packed):
    def array(*shape, dtype=jnp.bfloat16):
      return jax.ShapeDtypeStruct(shape, dtype)

    x, weight = array(1, T, D), array(4, D, dtype=jnp.float32)
    ids = array(1, T, dtype=jnp.int32) if packed else None

    def forward(x, weight, ids):
      return short_conv(x, weight, segment_ids=ids, backend=backend)[0]

    def both(x, weight, ids, dy):
      y, vjp = jax.vjp(lambda *a: forward(*a, ids), x, weight)
      return y, vjp(dy)

    return (forward, (x, weight, ids)) if phase == "forward" else (both, (x, weight, ids, x))

  for name, D in _CONVOLUTIONS.items():
    for packed in (False, True):
      for phase in ("forward", "forward_backward"):
        shape = name + "_packed" * packed
        run = functools.partial(build, D, phase, packed)
        unit = "128 tokens x 128 channels"
        yield Case("short_conv", phase, shape, unit, T * D / 128**2, run)


def _rope_cases(backend: str) -> Iterator[Case]:
  """32 heads, whole or a half of each side by side, and ones that come first; the gradient is the same kernel."""
  T, heads, size = 8192, 32, 128
  positions = jax.ShapeDtypeStruct((1, T), jnp.int32)

  def build(fraction):
    def forward(x, positions):
      return rope_heads(x, positions, size, fraction=fraction, backend=backend)

    return forward, (jax.ShapeDtypeStruct((1, T, heads * size), jnp.bfloat16), positions)

  def first(size):
    def forward(x, positions):
      return rope(x.swapaxes(1, 2), positions, backend=backend).swapaxes(1, 2)

    return forward, (jax.ShapeDtypeStruct((1, heads, T, size), jnp.bfloat16), positions)

  builds = {"whole": functools.partial(build, 1.0), "half": functools.partial(build, 0.5)}
  builds |= {"first": functools.partial(first, size), "first_64": functools.partial(first, 64)}
  for shape, run in builds.items():
    yield Case("rope", "forward", shape, "128 tokens x head", heads * T / 128, run)


def _block_sparse_cases(backend: str) -> Iterator[Case]:
  # A GPU's record is of short rows, whose cost a token is the same.
  T = 65536 if backend == "tpu" else 8192

  def arguments(s):
    def array(heads, dim):
      return jax.ShapeDtypeStruct((1, T, heads, dim), jnp.bfloat16)

    q, k = array(s.heads, s.key_dim), array(s.kv_heads, s.key_dim)
    v, do = array(s.kv_heads, s.value_dim), array(s.heads, s.value_dim)
    return q, k, v, jax.ShapeDtypeStruct((1, s.groups, T, s.top_k), jnp.int32), do

  def build(s, phase):
    def forward(q, k, v, indices):
      return block_sparse_attention(q, k, v, indices, block_size=s.block_size, backend=backend)[0]

    def both(q, k, v, indices, do):
      o, vjp = jax.vjp(lambda *a: forward(*a, indices), q, k, v)
      return o, vjp(do)

    *args, do = arguments(s)
    return (forward, tuple(args)) if phase == "forward" else (both, (*args, do))

  for name in ("nsa", "minimax_m3", "infllm_v2", "moba"):
    for phase in ("forward", "forward_backward"):
      s = BLOCK_SPARSE[name]
      run = functools.partial(build, s, phase)
      units, unit = s.groups * T, "1 token x group of heads"
      trips = (
        functools.partial(loops.block_sparse, s, *arguments(s)[:4]) if backend == "tpu" else dict
      )
      # Half a minute each: one chip, and the others in the tests, at a shorter length.
      chips = ("v6e",) if backend == "tpu" else ()
      yield Case("block_sparse", phase, name, unit, units, run, chips=chips, trips=trips)


def _token_cases(backend: str) -> Iterator[Case]:
  """DeepSeek-V3.2's attention to chosen latents, for the last queries of 64k."""
  s, t = BLOCK_SPARSE["dsa"], 64

  def array(T, heads, dim):
    return jax.ShapeDtypeStruct((1, T, heads, dim), jnp.bfloat16)

  def build(phase):
    def forward(q, k, indices):
      options = dict(block_size=1, query_positions=s.length - t + jnp.arange(t), backend=backend)
      return block_sparse_attention(q, k, s.value_dim, indices, **options)[0]

    def both(q, k, indices, do):
      o, vjp = jax.vjp(lambda *a: forward(*a, indices), q, k)
      return o, vjp(do)

    q, k = array(t, s.heads, s.key_dim), array(s.length, s.kv_heads, s.key_dim)
    args = q, k, jax.ShapeDtypeStruct((1, s.groups, t, s.top_k), jnp.int32)
    return (
      (forward, args) if phase == "forward" else (both, (*args, array(t, s.heads, s.value_dim)))
    )

  for phase in ("forward", "forward_backward"):
    run = functools.partial(build, phase)
    yield Case("block_sparse", phase, "dsa", "1 token x group of heads", t, run, chips=("v6e",))


def _pool_cases(backend: str) -> Iterator[Case]:
  """NSA's compressed attention: a pool for 16 tokens. All pools of all queries: those that are hidden count too."""
  s, stride, some = BLOCK_SPARSE["nsa"], 16, 1024
  scale = s.key_dim**-0.5

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, *shape), dtype)

  def build(phase):
    def forward(q, k, v, first, complete):
      return pool_attention(q, k, v, first, complete, scale=scale, backend=backend)[0]

    def both(q, k, v, first, complete, do):
      o, vjp = jax.vjp(lambda *a: forward(*a, first, complete), q, k, v)
      return o, vjp(do)

    def weights(q, k, lse, first, complete):
      return pool_weights(q, k, first, complete, scale=scale, lse=lse, backend=backend)

    T, pools = some if phase == "weights" else s.length, s.length // stride
    q, k = array(T, s.heads, s.key_dim), array(pools, s.kv_heads, s.key_dim)
    v, do = array(pools, s.kv_heads, s.value_dim), array(T, s.heads, s.value_dim)
    places = array(T, dtype=jnp.int32), array(T, dtype=jnp.int32)
    if phase == "weights":
      return weights, (q, k, array(T, s.heads, dtype=jnp.float32), *places)
    return (forward, (q, k, v, *places)) if phase == "forward" else (both, (q, k, v, *places, do))

  for phase in ("forward", "forward_backward", "weights"):
    tokens = some if phase == "weights" else s.length
    run, units = functools.partial(build, phase), s.groups * tokens
    yield Case(
      "pool_attention", phase, "nsa", "1 token x group of heads", units, run, chips=("v6e",)
    )


def _index_cases(backend: str) -> Iterator[Case]:
  """DeepSeek-V3.2's indexer: 64 heads of 128 channels, of 512 queries at a time for 64k keys, none of them hidden."""
  t, h, d, N = 512, 64, 128, 65536

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, *shape), dtype)

  def build(phase):
    scores = functools.partial(index_scores, backend=backend)
    args = array(t, h, d), array(t, h, dtype=jnp.float32), array(N, d)
    if phase == "forward":
      return scores, args

    def both(q, w, k, dout):
      out, vjp = jax.vjp(scores, q, w, k)
      return out, vjp(dout)

    return both, (*args, array(t, N, dtype=jnp.float32))

  for phase in ("forward", "forward_backward"):
    run = functools.partial(build, phase)
    yield Case("index_scores", phase, "dsa", "1 query x 128 keys", t * N / 128, run, chips=("v6e",))


_MAKERS = {
  "tpu": (
    _recurrence_cases,
    _step_cases,
    _short_conv_cases,
    _rope_cases,
    _block_sparse_cases,
    _token_cases,
    _pool_cases,
    _index_cases,
  ),
  "gpu": (_recurrence_cases, _step_cases, _block_sparse_cases),
}


def cases(platform: str = "tpu") -> dict[str, Case]:
  """All cases of a platform by name."""
  return {case.name: case for make in _MAKERS[platform] for case in make(platform)}


def case_of(name: str, platform: str = "tpu") -> Case:
  """The case of a name, or of "module:function[:argument]": what the function returns is its function and arguments."""
  if ":" not in name:
    return cases(platform)[name]
  module, function, *argument = name.split(":", 2)

  def build():
    sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), function)(*argument)

  return Case(module, function, ":".join(argument) or "-", "call", 1, build)
