"""What `python -m pallas_kernels.bench --platform=gpu` runs: the rows, and a GPU's clock."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse import Layout, block_sparse_attention, select_blocks
from pallas_kernels.block_sparse import shapes as sparse_shapes
from pallas_kernels.linear_recurrence import linear_recurrence, linear_recurrence_step
from pallas_kernels.linear_recurrence.shapes import Shape, inputs

# Bytes and FLOPs (bfloat16, dense) a second, by data sheet; the name begins so.
CEILINGS = {"NVIDIA H200": (4.8e12, 989e12), "NVIDIA H100": (3.35e12, 989e12)}

_KINDS = {
  "gated_deltanet": ("scalar", "key"),
  "kda": ("channel", "key"),
  "decay_only": ("scalar", "none"),
}
RECURRENCES = {
  f"{name}_{size}": Shape(heads, 128, heads, 128, *kind, batch=B, length=T)
  for size, heads, B, T in (("b1_t8192_h64", 64, 1, 8192), ("b8_t2048_h16", 16, 8, 2048))
  for name, kind in _KINDS.items()
}
STEPS = {name: Shape(32, 128, 32, 128, *kind, batch=128) for name, kind in _KINDS.items()}


@dataclasses.dataclass
class Row:
  """One thing to time.

  Attributes:
    kernel, shape, phase: its name, in three parts.
    make: the arguments.
    contestants: functions of them, by name; the first is the kernel.
    error: the largest relative error of the kernel, on fresh inputs of a smaller size.
    bound: of the error.
    bytes: of arguments and results, each once.
    flops: of the recurrence as it is defined, token by token, or of the matmuls over keys that queries see; the
      backward pass has twice as many, of attention 2.5 times.
    calls: how often a contestant does it in a call.
    peer: a clock of another library's, where it is there.
  """

  kernel: str
  shape: str
  phase: str
  make: Callable[[], tuple]
  contestants: dict[str, Callable]
  error: Callable[[], float]
  bound: float
  bytes: float
  flops: float
  calls: int = 1
  peer: Callable[[tuple], Callable[[], float] | None] = lambda args: None


# --- clocks ---


def host_clock(fn: Callable, args: tuple) -> Callable[[], float]:
  """Seconds of a call, by this machine's clock."""
  compiled = jax.jit(fn).lower(*args).compile()
  jax.block_until_ready(compiled(*args))

  def seconds():
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return time.perf_counter() - start

  return seconds


def device_clock(fn: Callable, args: tuple) -> Callable[[], float]:
  """Seconds of the kernels of a call, by the GPU's own clock (CUPTI's events, summed)."""
  from jax.experimental.mosaic.gpu import profiler

  measured = profiler.measure(jax.jit(fn).lower(*args).compile())
  return lambda: 1e-3 * measured(*args)[1]


def torch_clock(fn: Callable[[], object]) -> Callable[[], float]:
  """Seconds of a call of torch, by CUDA events."""
  import torch

  fn()

  def seconds():
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)

  return seconds


def medians(clocks: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
  """The median of each clock, read in turns for about ``seconds`` each, at least three times."""
  times: dict[str, list[float]] = {name: [] for name in clocks}
  start = time.perf_counter()
  while time.perf_counter() - start < seconds * len(clocks) or min(map(len, times.values())) < 3:
    for name, clock in clocks.items():
      times[name].append(clock())
  return {name: statistics.median(t) for name, t in times.items()}


# --- rows ---


def _size(tree) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _worst(got, want) -> float:
  """The largest relative error of the arrays of a tree; infinities must be where they should."""
  worst = 0.0
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    seen = np.isfinite(w)
    if not np.array_equal(np.isfinite(g), seen):
      return math.inf
    worst = max(worst, float(np.linalg.norm(g[seen] - w[seen]) / np.linalg.norm(w[seen])))
  return worst


def against_reference(run: Callable, backend: str, args: tuple) -> float:
  """``run(backend)`` of the arguments against ``run("reference")`` of the same numbers in float64."""
  got = jax.jit(run(backend))(*args)
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, args
    )
    want = jax.jit(run("reference"))(*wide)
    return _worst(got, jax.tree.map(np.asarray, want))


def with_gradients(run: Callable, count: int) -> Callable:
  """Results and the gradients of the first ``count`` arguments, under fixed cotangents."""

  def both(*args):
    def loss(*first):
      out = run(*first, *args[count:])
      total = 0.0
      for x in jax.tree.leaves(out):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        total += jnp.sum(jnp.sin(jnp.where(jnp.isfinite(wide), wide, 0)))
      return total, out

    return jax.grad(loss, tuple(range(count)), has_aux=True)(*args[:count])

  return both


def _seed() -> int:
  return time.time_ns() % 2**31


def recurrence_rows(name: str, s: Shape, kernel: str = "gpu") -> Iterator[Row]:
  """Forward, and forward + backward."""
  length = min(s.length, 500) - 1  # odd, for the tail of a chunk

  def make(batch=s.batch, length=s.length):
    return (inputs(s, batch=batch, length=length, dtype=jnp.bfloat16, seed=_seed()),)

  def run(backend):
    return functools.partial(linear_recurrence, return_state=True, backend=backend)

  def both(backend):
    return with_gradients(run(backend), 1)

  (r,) = jax.eval_shape(make)
  tokens = s.batch * s.length * s.value_heads
  flops = tokens * 2 * s.key_dim * s.value_dim * (2 + (s.erase != "none"))
  moved = _size(r) + _size(r.v)
  for phase, of in (("forward", run), ("forward_backward", both)):
    whole = of is both
    yield Row(
      *("linear_recurrence", name, phase),
      make=make,
      contestants={backend: of(backend) for backend in (kernel, "xla")},
      error=lambda of=of: against_reference(of, kernel, make(1, length)),
      bound=2e-2,
      bytes=2 * moved + _size(r.v) if whole else moved,
      flops=flops * (3 if whole else 1),
      peer=functools.partial(fla_recurrence, s, whole),
    )


# Tokens that a call steps: a loop changes its state in place, after one copy of it.
_TOKENS = 32


def step_rows(name: str, s: Shape, kernel: str = "gpu") -> Iterator[Row]:
  """One token, from a float32 state."""

  def make(batch=s.batch):
    r = inputs(s, batch=batch, length=1, dtype=jnp.bfloat16, seed=_seed())
    shape = (batch, s.value_heads, s.key_dim, s.value_dim)
    return r, jax.random.normal(jax.random.key(_seed()), shape)

  def run(backend):
    return functools.partial(linear_recurrence_step, backend=backend)

  def loop(backend):
    step = run(backend)
    return lambda r, state: jax.lax.fori_loop(
      0, _TOKENS, lambda _, carry: step(r, carry[1]), (r.v, state)
    )

  r, state = jax.eval_shape(make)
  flops = s.batch * s.value_heads * 2 * s.key_dim * s.value_dim * (2 + (s.erase != "none"))
  yield Row(
    *("linear_recurrence_step", name, "decode"),
    make=make,
    contestants={backend: loop(backend) for backend in (kernel, "reference")},
    error=lambda: against_reference(run, kernel, make(2)),
    bound=5e-3,
    bytes=2 * _size(state) + _size(r) + _size(r.v),
    flops=flops,
    calls=_TOKENS,
  )


def blocks_of(s: sparse_shapes.Shape, length: int, alike: int):
  """The choice of blocks of each query: the first, its own, the one before and others at random, distinct.

  So many neighbouring queries as ``alike`` says choose the same others: what trained indexers do lies in between.
  """
  layout = Layout.together(1, length, None)
  _, first = layout.table(s.block_size, s.block_size)
  noise = jax.random.uniform(
    jax.random.key(_seed()), (1, s.groups, -(-length // alike), length // s.block_size)
  )
  noise = jnp.repeat(noise, alike, axis=2)[:, :, :length]
  current = layout.within // s.block_size
  return select_blocks(noise, first, current, current, top_k=s.top_k, initial=1, local=2)


def sparse_rows(
  name: str, s: sparse_shapes.Shape, alike: int, kernel: str = "gpu"
) -> Iterator[Row]:
  """Beside causal attention over all keys."""

  def make(length=s.length):
    keys = jax.random.split(jax.random.key(_seed()), 3)
    heads = (s.heads, s.key_dim), (s.kv_heads, s.key_dim), (s.kv_heads, s.value_dim)
    qkv = (jax.random.normal(k, (1, length, *h)) for k, h in zip(keys, heads, strict=True))
    return *(x.astype(jnp.bfloat16) for x in qkv), blocks_of(s, length, alike)

  def run(backend):
    if backend == "full":
      return lambda q, k, v, indices: _cudnn(q, k, v)
    return functools.partial(block_sparse_attention, block_size=s.block_size, backend=backend)

  def both(backend):
    return with_gradients(run(backend), 3)

  args = q, _, v, _ = jax.eval_shape(make)
  moved = _size(args) + _size(q) * v.shape[3] // q.shape[3]
  # Of its own block a query sees half.
  keys = min((s.top_k - 0.5) * s.block_size, s.length / 2)
  flops = 2 * s.length * keys * s.heads * (s.key_dim + s.value_dim)
  for phase, of in (("forward", run), ("forward_backward", both)):
    yield Row(
      *("block_sparse", f"{name}_alike{alike}", phase),
      make=make,
      contestants={backend: of(backend) for backend in (kernel, "xla", "full")},
      error=lambda of=of: against_reference(of, kernel, make(min(s.length, 1024))),
      bound=2e-2,
      bytes=2 * moved if of is both else moved,
      flops=flops * (3.5 if of is both else 1),
    )


def _cudnn(q, k, v):
  """cuDNN's causal attention, by jax.nn, which wants equally many channels of keys and values."""
  v_ = jnp.pad(v, ((0, 0),) * 3 + ((0, q.shape[-1] - v.shape[-1]),))
  o = jax.nn.dot_product_attention(q, k, v_, is_causal=True, implementation="cudnn")
  return o[..., : v.shape[-1]]


def rows() -> Iterator[Row]:
  """All of them."""
  for name, s in RECURRENCES.items():
    yield from recurrence_rows(name, s)
  for name, s in STEPS.items():
    yield from step_rows(name, s)
  for alike in (1, 16):
    yield from sparse_rows("nsa_t65536", sparse_shapes.SHAPES["nsa"], alike)


# --- fla ---


def fla_recurrence(s: Shape, whole: bool, args: tuple) -> Callable[[], float] | None:
  """A clock of fla's Triton kernels on the same numbers, or None where torch or fla is not there."""
  try:
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla
  except ImportError:
    return None
  (r,) = args
  tensors = [torch.from_dlpack(x).clone() for x in (r.q, r.k, r.v)]
  decay = torch.from_dlpack(r.log_decay if s.decay == "channel" else r.log_decay[..., 0]).clone()
  tensors.append(decay)
  if s.erase == "key":
    tensors.append(torch.from_dlpack(r.erase.beta).clone())
  own = {"channel": chunk_kda, "scalar": chunk_gated_delta_rule}
  op = chunk_simple_gla if s.erase == "none" else own[s.decay]
  for x in tensors:
    x.requires_grad_(whole)
  do = torch.randn_like(tensors[2])

  def call():
    o, _ = op(*tensors, scale=1.0)
    if whole:
      torch.autograd.grad(o, tensors, do)

  with contextlib.nullcontext() if whole else torch.no_grad():
    call()
  return torch_clock(call if whole else torch.no_grad()(call))


# --- results ---


def copy_bandwidth(clock: Callable, size: int = 1 << 30) -> float:
  """Bytes a second that XLA copies, read and written."""
  x = (jnp.zeros(size // 4, jnp.float32),)
  return 2 * size / medians({"copy": clock(lambda x: x + 1, x)}, 0.5)["copy"]


def time_row(row: Row, clock: Callable, seconds: float) -> dict:
  """Checks a row, and times whatever of it serves here.

  Raises:
    RuntimeError: the kernel's error is larger than it may be.
  """
  record: dict = {"kernel": row.kernel, "shape": row.shape, "phase": row.phase, "why_not": {}}
  kernel = next(iter(row.contestants))
  args = row.make()
  clocks = {}
  for name, fn in row.contestants.items():
    try:
      clocks[name] = clock(fn, args)
    except (NotImplementedError, ValueError, RuntimeError) as error:
      record["why_not"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
  if kernel in clocks:
    record["error"] = row.error()
    if not record["error"] <= row.bound:
      name = f"{row.kernel} {row.shape} {row.phase}"
      raise RuntimeError(f"{name}: error {record['error']:.1e} exceeds {row.bound}")
  try:
    if peer := row.peer(args):
      clocks["fla"] = peer
  except Exception as error:  # another library's, of whatever kind
    record["why_not"]["fla"] = f"{type(error).__name__}: {error}"
  times = medians(clocks, seconds) if clocks else {}
  # The kernel comes first.
  record["seconds"] = {name: t / row.calls for name, t in times.items()}
  if kernel in clocks:
    own = record["seconds"][kernel]
    record["bytes_per_second"], record["flops_per_second"] = row.bytes / own, row.flops / own
    record["times_faster_than"] = {n: t / own for n, t in record["seconds"].items() if n != kernel}
  return record


def print_rows(records: list[dict], ceiling: tuple[float, float] | None, copy: float) -> None:
  """The table: milliseconds of the kernel, how many times faster than the others it is, and of the ceilings."""
  print(f"copy: {copy / 1e12:.2f} TB/s")
  for r in records:
    name = f"{r['kernel']:<24}{r['shape']:<32}{r['phase']:<18}"
    if "bytes_per_second" not in r:
      print(name, "not served:", "; ".join(f"{n}: {why}" for n, why in r["why_not"].items()))
      continue
    own = next(iter(r["seconds"].values()))
    others = "  ".join(f"x {n} {x:.2f}" for n, x in r["times_faster_than"].items())
    moved, done = r["bytes_per_second"], r["flops_per_second"]
    peak = f" ({done / ceiling[1]:.0%} of peak, {moved / ceiling[0]:.0%} of HBM)" if ceiling else ""
    rates = f"{moved / 1e12:.2f} TB/s = {moved / copy:.0%} of a copy, {done / 1e12:.0f} TFLOP/s"
    print(f"{name}{1e3 * own:>9.3f} ms  {others}  {rates}{peak}  error {r['error']:.0e}")
    for n, why in r["why_not"].items():
      print(f"  {n}: {why}")


BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


def markdown(record: dict | None) -> str:
  """The rows of a record, in short."""
  if record is None:
    return "No GPU has run this yet."
  lines = [f"{record['device']}, {record['date']}; x: how many times faster than the other.", ""]
  lines += [
    "| | | ms | x XLA | x fla | x full attention | of a copy's bytes a second |",
    "|---" * 7 + "|",
  ]
  for row in record["rows"]:
    if "bytes_per_second" not in row:
      continue
    x = row["times_faster_than"]
    others = [x.get("xla", x.get("reference")), x.get("fla"), x.get("full")]
    cells = [
      row["shape"],
      row["phase"].replace("_", " + "),
      f"{1e3 * next(iter(row['seconds'].values())):.3f}",
    ]
    cells += ["-" if t is None else f"{t:.2f}" for t in others]
    cells.append(f"{row['bytes_per_second'] / record['copy_bytes_per_second']:.0%}")
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def with_table(text: str, record: dict | None) -> str:
  """A document with the table between its two marks made anew."""
  before, rest = text.split(BEGIN)
  return f"{before}{BEGIN}\n{markdown(record)}\n{END}{rest.split(END)[1]}"


def newest_record(folder: pathlib.Path) -> dict | None:
  """The last record of a GPU, by date."""
  paths = sorted(folder.glob("*-gpu.json"))
  return json.loads(paths[-1].read_text()) if paths else None


def ceiling_of(device: str) -> tuple[float, float] | None:
  """Bytes and FLOPs a second of a device by its name, where they are known."""
  return next((c for name, c in CEILINGS.items() if device.startswith(name)), None)
