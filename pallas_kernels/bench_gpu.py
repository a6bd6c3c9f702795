"""What `python -m pallas_kernels.bench --platform=gpu` runs: the timed rows, and a GPU's clock."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench_checks, bench_peers
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
    peers: other libraries', by name: from the arguments to a call; one that is not there says so.
    timed: or only checked.
    note: what a reader of its times must know.
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
  peers: dict[str, Callable[[tuple], Callable[[], object]]] = dataclasses.field(
    default_factory=dict
  )
  timed: bool = True
  note: str = ""

  @property
  def name(self) -> str:
    return f"{self.kernel} {self.shape} {self.phase}"


# --- clocks ---


def host_clock(fn: Callable, args: tuple) -> Callable[[tuple], Callable[[], float]]:
  """Compiles for such arguments; then, of arguments: seconds of a call, by this machine's clock."""
  compiled = jax.jit(fn).lower(*args).compile()

  def start(args):
    jax.block_until_ready(compiled(*args))

    def seconds():
      begin = time.perf_counter()
      jax.block_until_ready(compiled(*args))
      return time.perf_counter() - begin

    return seconds

  return start


def kernel_seconds(run: Callable[[], object]) -> dict[str, float]:
  """Seconds of all kernels that run meanwhile, by name, by the GPU's own clock (CUPTI's records), whoever starts them.

  Gaps between kernels are in no contestant's time: torch starts them one by one, an XLA program all at once.
  """
  from jax.experimental.mosaic.gpu import profiler

  cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
  cupti._cupti_init()
  try:
    run()
  finally:
    timings = cupti._cupti_get_timings(True)
  return summed(timings)


def summed(timings: Iterable[tuple[str, float]]) -> dict[str, float]:
  """Seconds by name, of names and milliseconds."""
  kernels: dict[str, float] = {}
  for name, ms in timings:
    kernels[name] = kernels.get(name, 0.0) + 1e-3 * ms
  return kernels


@dataclasses.dataclass
class KernelClock:
  """Seconds of the kernels of a call; ``kernels`` has those of the last one."""

  run: Callable[[], object]
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)

  def __call__(self) -> float:
    self.kernels = kernel_seconds(self.run)
    return sum(self.kernels.values())


def device_clock(fn: Callable, args: tuple) -> Callable[[tuple], KernelClock]:
  """Compiles for such arguments; then, of arguments: seconds of the kernels of a call."""
  compiled = jax.jit(fn).lower(*args).compile()

  def start(args):
    jax.block_until_ready(compiled(*args))
    return KernelClock(lambda: jax.block_until_ready(compiled(*args)))

  return start


def medians(
  clocks: dict[str, Callable[[], float]], seconds: float, why_not: dict[str, str] | None = None
) -> dict[str, float]:
  """The median of each clock, read in turns for about ``seconds`` each, at least three times.

  With ``why_not`` a clock that fails is told there, and the others go on.
  """
  times: dict[str, list[float]] = {name: [] for name in clocks}
  start = time.perf_counter()
  while times and (
    time.perf_counter() - start < seconds * len(times) or min(map(len, times.values())) < 3
  ):
    for name in list(times):
      try:
        times[name].append(clocks[name]())
      except Exception as error:
        if why_not is None:
          raise
        why_not[name] = in_words(error)
        del times[name]
  return {name: statistics.median(t) for name, t in times.items()}


def in_words(error: Exception) -> str:
  return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


# --- rows ---


def _size(tree) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def worst(got, want) -> float:
  """The largest relative error of the arrays of a tree; what is not finite must be the same infinity."""
  largest = 0.0
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    seen = np.isfinite(w)
    if not (np.array_equal(np.isfinite(g), seen) and np.array_equal(g[~seen], w[~seen])):
      return math.inf
    error, size = np.linalg.norm(g[seen] - w[seen]), np.linalg.norm(w[seen])
    if error:
      largest = max(largest, float(error / size) if size else math.inf)
  return largest


def against_reference(run: Callable, backend: str, args: tuple) -> float:
  """``run(backend)`` of the arguments against ``run("reference")`` of the same numbers in float64."""
  got = jax.jit(run(backend))(*args)
  with jax.enable_x64(True):
    wide = jax.tree.map(
      lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, args
    )
    want = jax.jit(run("reference"))(*wide)
    return worst(got, jax.tree.map(np.asarray, want))


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


def with_pullback(run: Callable, count: int) -> Callable:
  """Results and the gradients of the first ``count`` arguments, to be timed: no operation but those of ``run``.

  The cotangent of the first result is itself, those of others (a state) are zeros.
  """

  def both(*args):
    out, pull = jax.vjp(lambda *first: run(*first, *args[count:]), *args[:count])
    (o, *others), tree = jax.tree.flatten(out)
    return pull(jax.tree.unflatten(tree, [o, *map(jnp.zeros_like, others)])), out

  return both


def _seed() -> int:
  return time.time_ns() % 2**31


def recurrence_rows(name: str, s: Shape, kernel: str = "gpu") -> Iterator[Row]:
  """Forward, and forward + backward."""
  # Odd, for the tail of a chunk, and short: the reference keeps a state in float64 of every token, and a process that
  # has checked keeps its memory while others are timed.
  length = min(s.length, 200) - 1

  def make(batch=s.batch, length=s.length):
    return (inputs(s, batch=batch, length=length, dtype=jnp.bfloat16, seed=_seed()),)

  def run(backend):
    return functools.partial(linear_recurrence, return_state=True, backend=backend)

  def both(backend, gradients=with_pullback):
    return gradients(run(backend), 1)

  checked = functools.partial(both, gradients=with_gradients)

  (r,) = jax.eval_shape(make)
  tokens = s.batch * s.length * s.value_heads
  flops = tokens * 2 * s.key_dim * s.value_dim * (2 + (s.erase != "none"))
  moved = _size(r) + _size(r.v)
  for phase, of, check in (("forward", run, run), ("forward_backward", both, checked)):
    whole = of is both
    yield Row(
      *("linear_recurrence", name, phase),
      make=make,
      contestants={backend: of(backend) for backend in (kernel, "xla")},
      error=lambda check=check: against_reference(check, kernel, make(1, length)),
      bound=2e-2,
      bytes=2 * moved + _size(r.v) if whole else moved,
      flops=flops * (3 if whole else 1),
      peers={"fla": functools.partial(bench_peers.recurrence, s, whole)},
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
    peers={"fla": functools.partial(bench_peers.step, s, _TOKENS)},
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

  def both(backend, gradients=with_pullback):
    return gradients(run(backend), 3)

  checked = functools.partial(both, gradients=with_gradients)

  args = q, _, v, _ = jax.eval_shape(make)
  moved = _size(args) + _size(q) * v.shape[3] // q.shape[3]
  # Of its own block a query sees half.
  keys = min((s.top_k - 0.5) * s.block_size, s.length / 2)
  flops = 2 * s.length * keys * s.heads * (s.key_dim + s.value_dim)
  for phase, of, check in (("forward", run, run), ("forward_backward", both, checked)):
    yield Row(
      *("block_sparse", f"{name}_alike{alike}", phase),
      make=make,
      contestants={backend: of(backend) for backend in (kernel, "xla", "full")},
      error=lambda check=check: against_reference(check, kernel, make(min(s.length, 1024))),
      bound=2e-2,
      bytes=2 * moved if of is both else moved,
      flops=flops * (3.5 if of is both else 1),
      peers={"fla": functools.partial(bench_peers.nsa, s, of is both)},
      note=_padding(s),
    )


def _padding(s: sparse_shapes.Shape) -> str:
  if s.key_dim == s.value_dim:
    return ""
  return (
    f"full: cuDNN's kernel wants as many channels of values as of keys; {s.value_dim} are padded to {s.key_dim}, "
    f"{2 * s.key_dim / (s.key_dim + s.value_dim):.2f} times the FLOPs that are needed"
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
  yield from bench_checks.rows()
  for alike in (1, 16):
    yield from sparse_rows("nsa_t65536", sparse_shapes.SHAPES["nsa"], alike)


def effort(row: Row) -> int:
  """How long a row takes to compile, roughly: the larger, the longer."""
  gradients = 3 * (row.phase == "forward_backward")
  return gradients + ("float32" in row.shape) + ("low_rank" in row.shape) + row.timed


# --- results ---


def copy_bandwidth(clock: Callable, size: int = 1 << 30) -> float:
  """Bytes a second that XLA copies, read and written."""
  x = (jnp.zeros(size // 4, jnp.float32),)
  return 2 * size / medians({"copy": clock(lambda x: x + 1, x)(x)}, 0.5)["copy"]


@dataclasses.dataclass
class Prepared:
  """A row that is checked and compiled: its record so far, and from arguments to a clock, for each contestant."""

  row: Row
  record: dict
  starts: dict[str, Callable[[tuple], Callable[[], float]]]


def prepare(row: Row, clock: Callable) -> Prepared:
  """Checks a row, and compiles what is to be timed; what fails is told, and loses nothing else. Holds no arrays."""
  record: dict = {"kernel": row.kernel, "shape": row.shape, "phase": row.phase, "why_not": {}}
  record |= {"note": row.note} if row.note else {}
  why_not = record["why_not"]
  kernel = next(iter(row.contestants))
  record["bound"] = row.bound
  try:
    record["error"] = row.error()
    if not record["error"] <= row.bound:
      record["failure"] = f"error {record['error']:.1e} exceeds {row.bound}"
  except NotImplementedError as error:
    why_not[kernel] = in_words(error)
  except Exception as error:  # of compilers and devices, of whatever kind
    record["failure"] = in_words(error)
  starts: dict[str, Callable] = {}
  if not row.timed:
    return Prepared(row, record, starts)
  contestants = dict(row.contestants)
  if kernel in why_not or "failure" in record:
    why_not.setdefault(kernel, record.get("failure", ""))
    contestants.pop(kernel)
  shapes = jax.eval_shape(row.make)
  for name, fn in contestants.items():
    try:
      starts[name] = clock(fn, shapes)
    except Exception as error:
      why_not[name] = in_words(error)
  args = row.make() if row.peers else ()
  for name, peer in row.peers.items():
    try:
      starts[name] = bench_peers.prepare(peer, args)
    except Exception as error:  # another library's
      why_not[name] = in_words(error)
  return Prepared(row, record, starts)


def time_prepared(prepared: Prepared, seconds: float) -> dict:
  """Times whatever of a row serves here, on fresh arguments."""
  row, record, clocks = prepared.row, prepared.record, {}
  if not row.timed:
    return record
  kernel, args = next(iter(row.contestants)), row.make()
  for name, start in prepared.starts.items():
    try:
      clocks[name] = start(args)
    except Exception as error:
      record["why_not"][name] = in_words(error)
  times = medians(clocks, seconds, record["why_not"])
  # The kernel comes first.
  record["seconds"] = {name: t / row.calls for name, t in times.items()}
  if kernel in times:
    own = record["seconds"][kernel]
    record["bytes_per_second"], record["flops_per_second"] = row.bytes / own, row.flops / own
    record["times_faster_than"] = {n: t / own for n, t in record["seconds"].items() if n != kernel}
    if isinstance(clock := clocks[kernel], KernelClock):
      kernels = clock.kernels.items()
      record["kernels"] = {n: t / row.calls for n, t in sorted(kernels, key=lambda k: -k[1])}
  return record


def time_row(row: Row, clock: Callable, seconds: float) -> dict:
  """Checks a row, and times it."""
  return time_prepared(prepare(row, clock), seconds)


def with_backward(records: list[dict]) -> list[dict]:
  """Records of forward + backward with the backward pass alone: the difference to those of forward."""
  forward = {(r["kernel"], r["shape"]): r for r in records if r["phase"] == "forward"}
  for r in records:
    first = forward.get((r["kernel"], r["shape"]), {}).get("seconds", {})
    if r["phase"] == "forward_backward" and "times_faster_than" in r:
      alone = {n: t - first[n] for n, t in r["seconds"].items() if n in first}
      kernel = next(iter(r["seconds"]))
      if alone.get(kernel, 0) > 0:
        own = alone.pop(kernel)
        r["backward_times_faster_than"] = {n: t / own for n, t in alone.items()}
  return records


def print_rows(records: list[dict], ceiling: tuple[float, float] | None, copy: float) -> None:
  """The table: milliseconds of the kernel, how many times faster than the others it is, and of the ceilings.

  Then, in short, what is only checked, what is not served, and all failures.
  """
  print(f"copy: {copy / 1e12:.2f} TB/s; x: how many times faster than the other")
  notes, checked = [], []
  refused: dict[str, list[str]] = {}
  for r in records:
    name = f"{r['kernel']} {r['shape']} {r['phase']}"
    notes += [f"{name}: {n}: {why}" for n, why in r["why_not"].items() if "bytes_per_second" in r]
    if "bytes_per_second" not in r:
      if "error" in r and "failure" not in r:
        checked.append(r)
      elif r["why_not"]:
        n, why = next(iter(r["why_not"].items()))
        refused.setdefault(f"{n}: {why}", []).append(f"{r['kernel']} {r['shape']}")
      continue
    own = next(iter(r["seconds"].values()))
    others = "".join(f" x {n} {x:.2f}" for n, x in r["times_faster_than"].items())
    if alone := r.get("backward_times_faster_than"):
      others += "; backward alone:" + "".join(f" x {n} {x:.2f}" for n, x in alone.items())
    moved, done = r["bytes_per_second"], r["flops_per_second"]
    peak = f", {moved / ceiling[0]:.0%} of HBM, {done / ceiling[1]:.0%} of peak" if ceiling else ""
    print(f"{name:<62}{1e3 * own:>9.3f} ms{others}; {moved / copy:.0%} of a copy{peak}")
  for kernel in dict.fromkeys(r["kernel"] for r in checked):
    rows = [r for r in checked if r["kernel"] == kernel]
    worst = max(rows, key=lambda r: r["error"] / r["bound"])
    share = f"{worst['error']:.0e} of {worst['bound']:.0e} allowed, {worst['shape']}"
    print(f"{kernel}: {len(rows)} checked and not timed; the largest error {share}")
  for why, names in refused.items():
    print(f"not served: {why} ({len(names)}: {', '.join(names)})")
  notes += [r["note"] for r in records if "note" in r]
  for note in dict.fromkeys(notes):
    print(f"  {note}")
  for failure in failures(records):
    print(f"FAILED {failure}")


def failures(records: list[dict]) -> list[str]:
  """A line each."""
  failed = (r for r in records if "failure" in r)
  return [f"{r['kernel']} {r['shape']} {r['phase']}: {r['failure']}" for r in failed]


BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"


def markdown(record: dict | None) -> str:
  """The rows of a record, in short."""
  if record is None:
    return "No GPU has run this yet."
  lines = [f"{record['device']}, {record['date']}; x: how many times faster than the other.", ""]
  lines += [
    "| | | ms | x XLA | x fla | x full attention | of a copy's bytes a second | commit |",
    "|---" * 8 + "|",
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
    copy = row.get("copy_bytes_per_second", record["copy_bytes_per_second"])
    cells.append(f"{row['bytes_per_second'] / copy:.0%}")
    cells.append((row.get("commit") or "-")[:7])
    lines.append("| " + " | ".join(cells) + " |")
  lines += ["", *sorted({row["note"] for row in record["rows"] if "note" in row})]
  return "\n".join(lines)


def with_table(text: str, record: dict | None) -> str:
  """A document with the table between its two marks made anew."""
  before, rest = text.split(BEGIN)
  return f"{before}{BEGIN}\n{markdown(record)}\n{END}{rest.split(END)[1]}"


def newest_record(folder: pathlib.Path) -> dict | None:
  """The last record of a GPU, with what some of its rows were timed at since; each row has its commit."""
  paths = sorted(folder.glob("*-gpu.json"))
  if not paths:
    return None
  whole = json.loads(paths[-1].read_text())
  rows = {}
  some = {path: json.loads(path.read_text()) for path in folder.glob("*-gpu-only*.json")}
  later = [path for path, record in some.items() if _when(record) >= _when(whole)]
  later.sort(key=lambda path: (_when(some[path]), number(path)))
  for record in [whole, *(some[path] for path in later)]:
    for row in record["rows"]:
      if record["device"] == whole["device"] and (record is whole or "bytes_per_second" in row):
        more = {name: record.get(name) for name in ("date", "commit", "copy_bytes_per_second")}
        rows[row["kernel"], row["shape"], row["phase"]] = row | more
  return whole | {"rows": list(rows.values())}


def _when(record: dict) -> str:
  """When a record was made; the first ones have no time of the day, and are before those of their day that have one."""
  return record.get("time", record["date"])


def number(path: pathlib.Path) -> int:
  """Of a day's records of some rows: DATE-gpu-only.json is the first, DATE-gpu-only-2.json the second."""
  return int(re.fullmatch(r".*-only-?(\d*)", path.stem)[1] or 1)  # type: ignore[index]


def some_rows(folder: pathlib.Path, today: str) -> str:
  """The end of the name of a new record of some rows: none is written over."""
  taken = [number(path) for path in folder.glob(f"{today}-gpu-only*.json")]
  return f"-only-{max(taken) + 1}" if taken else "-only"


def driver() -> str | None:
  """The version of the GPU's driver, in the words of its kernel module."""
  path = pathlib.Path("/proc/driver/nvidia/version")
  return path.read_text().splitlines()[0].strip() if path.exists() else None


def ceiling_of(device: str) -> tuple[float, float] | None:
  """Bytes and FLOPs a second of a device by its name, where they are known."""
  return next((c for name, c in CEILINGS.items() if device.startswith(name)), None)
