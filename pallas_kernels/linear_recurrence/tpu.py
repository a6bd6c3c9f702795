"""The recurrence as two Pallas kernels for TPUs: all chunks forward, and all chunks in reverse.

One program walks the chunks of a group of heads, the states in VMEM; several heads a step give the scheduler
independent work. Inputs are taken as projections write them, [B, T, heads * dim]: a head is a range of lanes. An array
that XLA holds as [B, T, heads, dim], in tiles of 8 heads and 128 channels, is copied to that first. Taking it as it is
would take steps of a multiple of 8 heads, which VMEM does not hold backward in float32 or on v4, and would have what
projections write copied instead; a function that is traced is not told which of the two it gets. What is one number a
head and token (decay, beta) is laid out with tokens in lanes, [B, groups, chunks, heads, chunk], which costs a small
copy. The tail of a length that is no multiple of the chunk is masked in the kernel: nothing large is padded.

What a step computes is ``tpu_chunk.py``; the backward kernel differentiates it there, from the state at the chunk's
start, which the forward kernel has kept.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence
from pallas_kernels.linear_recurrence.tpu_chunk import Chunk, Masks, chunks, dot_ones

# Tokens of a chunk. On v6e 64 cost more, forward and backward, in bundles per 128 tokens and head: Lightning 238 and
# 561 against 159 and 417, GLA at 128 channels 318 and 779 (247 and 662), Qwen3-Next 695 and 1379 (526 and 958), Kimi
# Linear 698 and 1523 (547 and 1305). Products of 64 rows leave most of the matrix unit idle, and the state is decayed,
# read and written twice as often; the shorter inverse saves less than that. 256, with half of the heads a step, for
# which there is room: Lightning 179 and 510, GLA 310 and 800. An inverse of 256 rows gathers across two registers of
# lanes, which Mosaic does not compile.
_CHUNK = 128
# A decay below this is none to float32: e^-30 of a state is less than its rounding.
_SMALLEST = -30.0
# Tokens of a block in which channels are compared through its middle, and the smallest decay for
# which exp of half a block of them is a number. In bfloat16 arithmetic e^-10 is less than a rounding.
_BASES = {True: (8, -20.0), False: (16, -10.0)}
# Value heads a step, forward and backward. On v6e Gated DeltaNet's forward takes 753, 572 and 522
# bundles per 128 tokens and head with 4, 8 and 16 heads, its backward 1454, 1140 and 963 with 2, 4
# and 8: what else there is to do while one head waits. Half of them where VMEM is 16 MiB (v4), and
# half for float32, whose blocks and parts of products are larger; both together need chunks of 64. A
# low-rank erase in float32, which has the most of both, takes half of that.
_HEADS = {"forward": 16, "backward": 8}
# Bytes of VMEM that are left beside the states of a group; with a low-rank erase in float32 half as much again.
_REST = 6 * 2**20


def check(r: Recurrence, chunk: int | None) -> None:
  """Raises NotImplementedError, saying why, where the kernels cannot serve the call on this machine."""
  dispatch.needs_tpu(r.accumulate_dtype)
  supports(r, chunk)


def supports(r: Recurrence, chunk: int | None) -> None:
  """The part of ``check`` that does not ask where it runs."""
  if r.accumulate_dtype != jnp.float32:
    raise NotImplementedError("the TPU kernels compute in float32; float64 inputs need 'xla'")
  if chunk is not None and not 16 <= chunk <= _CHUNK:
    raise NotImplementedError(f"the TPU kernels take chunks of 16 to {_CHUNK} tokens; got {chunk}")
  K, V = r.k.shape[3], r.v.shape[3]
  if K * V > 8 * 128 * 128:
    raise NotImplementedError(f"a state of {K} x {V} is too large for the TPU kernels")
  for direction in _HEADS:
    p = _plan(r, None, chunk, direction)
    if p.states > p.vmem - (_REST * 3 // 2 if p.large else _REST):
      raise NotImplementedError(
        f"{p.heads * p.repeats} states of {K} x {V}, whose heads share a key head, take {p.states >> 20} MiB of "
        f"the {p.vmem >> 20} MiB of VMEM that the TPU kernels have"
      )


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Static facts of one call.

  Attributes:
    heads: value heads a step, ``keys`` key heads; ``repeats``: steps that share their key head.
    groups: steps (times repeats) that make up all heads, the last perhaps with heads that are none, whose numbers are
      what lies in memory and go nowhere; ``ratio``: value heads a key head.
  """

  B: int
  T: int
  K: int
  V: int
  C: int
  N: int
  heads: int
  keys: int
  repeats: int
  groups: int
  ratio: int
  decay: str
  erase: str
  bonus: bool
  undecayed: bool
  segments: bool
  exact: bool

  @property
  def scalar(self) -> bool:
    """Whether a head has one decay a token."""
    return self.decay in ("constant", "scalar")

  @property
  def rows(self) -> int:
    """Rows of the array of gates: decays, then betas."""
    return self.heads * (self.scalar + (self.erase == "key"))

  @property
  def beta(self) -> int:
    """The first column of betas in a step: after the cumulative decays, with and without a token's own."""
    return self.heads * self.scalar * (1 + self.before)

  @property
  def before(self) -> bool:
    """Whether anything reads the state before a token's decay."""
    return self.decay != "none" and (self.bonus or (self.undecayed and self.erase != "none"))

  @property
  def large(self) -> bool:
    """Whether a step is of the kind that takes most."""
    return self.exact and self.erase == "low_rank"

  @property
  def vmem(self) -> int:
    """Bytes that a call may take."""
    # Most steps take a few MiB; eight narrow heads with a low-rank erase in float32 take 37 on a 7x.
    return min(dispatch.vmem(), (3 if self.large else 2) * dispatch.SMALL_VMEM)

  @property
  def states(self) -> int:
    """Bytes of VMEM of a group's states, as they come and as they go; the next group's, too, where there is one."""
    lanes, sublanes = -(-self.K // 128) * 128, -(-self.V // 8) * 8
    copies = 2 if self.B * self.groups == 1 else 4
    return copies * self.heads * self.repeats * sublanes * lanes * 4

  @property
  def base(self) -> int:
    return _BASES[self.exact][0]


def _heads(r: Recurrence, most: int) -> int:
  """Value heads of a step, at most ``most`` of 128 x 128: those that cost least.

  A step's heads are a range of lanes that ends with a register of them or with the array, and have their key heads to
  themselves or share one. Heads of the last step that are none are computed all the same, and count.
  """
  (_, _, H, K), (Hv, V) = r.k.shape, r.v.shape[2:]
  ratio = Hv // H

  def fits(n):
    keys = max(n // ratio, 1)
    aligned = all(d * m % 128 == 0 or m == of for d, m, of in ((K, keys, H), (V, n, Hv)))
    return aligned and not (n % ratio and ratio % n)

  choices = [n for n in range(1, Hv + 1) if fits(n)]
  few = [n for n in choices if n <= most and n * K * V <= most * 128 * 128]
  # As few as there can be are still a step where they are a register of lanes, or two, or two heads' worth.
  small = lambda n: n == 1 or n * max(K // ratio, V) <= 256 or n * K * V <= 2 * 128 * 128  # noqa: E731
  few = few or [n for n in choices[:1] if small(n)]
  if not few:
    raise NotImplementedError(
      f"the TPU kernels take at most {most} of {Hv} heads at a time, and as many are no whole registers of lanes: "
      f"{H} heads x {K} channels of keys, {Hv} x {V} of values"
    )
  # What a step takes for itself is worth three heads: see _HEADS.
  return min(few, key=lambda n: (-(-Hv // n) * (n + 3), -n))


def _plan(r: Recurrence, runs, C: int | None, direction: str) -> _Plan:
  B, T, H, K = r.k.shape
  Hv, V = r.v.shape[2:]
  # Vectors of a low-rank erase do not count: they may be gates times keys, wider than what they are made for.
  exact = any(x.dtype == jnp.float32 for x in (r.q, r.k, r.v))
  small = dispatch.vmem() <= dispatch.SMALL_VMEM
  C = C or (_CHUNK // 2 if exact and small else _CHUNK)
  erase = {KeyErase: "key", LowRankErase: "low_rank", type(None): "none"}[type(r.erase)]
  n = _heads(r, _HEADS[direction] >> (exact + small + (exact and erase == "low_rank")))
  ratio = Hv // H
  repeats = max(ratio // n, 1)
  return _Plan(
    B, T, K, V, C, -(-T // C), n, max(n // ratio, 1), repeats, -(-Hv // (n * repeats)), ratio,
    r.decay, erase, r.bonus is not None, r.reads == "undecayed", runs is not None,
    exact,
  )  # fmt: skip


# --- operands ---


def _gates(p: _Plan, r: Recurrence) -> Array | None:
  """Decays and betas, [1 or B, groups * repeats, chunks, rows, chunk]; tokens that pad change nothing."""
  parts = []
  if p.decay == "constant":
    parts.append(jnp.broadcast_to(r.log_decay, (1, p.T, r.log_decay.shape[0])))
  elif p.decay == "scalar":
    parts.append(r.log_decay[..., 0])
  if p.erase == "key":
    parts.append(r.erase.beta)
  if not parts:
    return None
  batch = max(x.shape[0] for x in parts)
  parts = [jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in parts]
  return jnp.concatenate([_to_rows(p, x) for x in parts], axis=3)


def _to_rows(p: _Plan, x: Float[Array, "B T Hv"]) -> Array:
  heads = p.heads * p.groups * p.repeats
  x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, p.N * p.C - p.T), (0, heads - x.shape[2])))
  x = x.reshape(x.shape[0], p.N, p.C, -1, p.heads)
  return x.transpose(0, 3, 1, 4, 2)


def _from_rows(p: _Plan, x: Array, Hv: int) -> Float[Array, "B T Hv"]:
  x = x.transpose(0, 2, 4, 1, 3)
  return x.reshape(x.shape[0], p.N * p.C, -1)[:, : p.T, :Hv]


def _relative_runs(p: _Plan, runs: Int[Array, "B T"]) -> Float[Array, "B N 1 C"]:
  """Runs less the run of the state that comes into the chunk."""
  runs = jnp.pad(runs, ((0, 0), (0, p.N * p.C - p.T)), mode="edge")
  carried = jnp.pad(runs, ((0, 0), (1, 0)))[:, : -1 : p.C]
  return (runs.reshape(p.B, p.N, p.C) - carried[:, :, None]).astype(jnp.float32)[:, :, None]


def _operands(p: _Plan, r: Recurrence, runs, walk) -> tuple[dict, dict]:
  """The arrays of a call by name, and how a step sees each; ``walk(n)`` is the chunk of step n."""

  def tokens(width, shared):
    def index(b, g, n, j):
      return b, walk(n), g if shared else g * p.repeats + j

    return pl.BlockSpec((1, p.C, width), index)

  keys, values, wide = (
    tokens(p.keys * p.K, True),
    tokens(p.heads * p.V, False),
    tokens(p.heads * p.K, False),
  )
  arrays = {"q": r.q, "k": r.k, "v": r.v}
  specs = {"q": keys, "k": keys, "v": values}
  if p.decay == "channel":
    # What makes it of a projection, a softplus say, is XLA's. In here that would save 2 of 12 bytes that a token
    # and channel move forward, and take Kimi Linear, which waits for no bytes, 72 bundles forward and 130 backward
    # more on v6e (620 and 1435).
    arrays["log_decay"], specs["log_decay"] = r.log_decay, wide
  if p.erase == "low_rank":
    arrays |= {"a": r.erase.a, "b": r.erase.b}
    specs |= {"a": wide, "b": wide}
  arrays = {name: x.reshape(p.B, p.T, -1) for name, x in arrays.items()}
  if p.rows:
    arrays["gates"] = _gates(p, r)
    specs["gates"] = _gate_rows(p, walk, shared=arrays["gates"].shape[0] < p.B)
  if p.bonus:
    arrays["bonus"] = r.bonus.astype(jnp.float32).reshape(1, -1)
    specs["bonus"] = pl.BlockSpec((1, p.keys * p.K), lambda b, g, n, j: (0, g))
  if p.segments:
    arrays["runs"] = _relative_runs(p, runs)
    specs["runs"] = pl.BlockSpec((1, 1, 1, p.C), lambda b, g, n, j: (b, walk(n), 0, 0))
  return arrays, specs


def _gate_rows(p: _Plan, walk, shared: bool = False) -> pl.BlockSpec:
  """Of ``_gates``, or of what is laid out like it; ``shared``: by all sequences."""
  shape = (1, 1, 1, p.rows, p.C)
  return pl.BlockSpec(
    shape, lambda b, g, n, j: (0 if shared else b, g * p.repeats + j, walk(n), 0, 0)
  )


def _states(p: _Plan) -> pl.BlockSpec:
  """All states of a group, [B, Hv, V, K]: they stay in VMEM from the first chunk to the last."""
  shape = (1, p.heads * p.repeats, p.V, p.K)
  return pl.BlockSpec(shape, lambda b, g, n, j: (b, g, 0, 0))


def _boundaries(p: _Plan, walk) -> pl.BlockSpec:
  shape = (1, p.heads, 1, p.V, p.K)
  return pl.BlockSpec(shape, lambda b, g, n, j: (b, g * p.repeats + j, walk(n), 0, 0))


# --- a step ---


class _Step:
  """What a step reads, once for all of its heads."""

  def __init__(self, p: _Plan, refs: dict, n):
    self.p, self.refs = p, refs
    row = jax.lax.broadcasted_iota(jnp.int32, (p.C, p.C), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (p.C, p.C), 1)
    self.lower, self.upper = row >= lane, row <= lane
    self.valid = None
    if p.T % p.C:
      self.valid = jax.lax.broadcasted_iota(jnp.int32, (p.C, 1), 0) < p.T - n * p.C
    strictly = row > lane
    self.masks = Masks(self.lower, strictly)
    columns = []
    if p.rows:
      gates = refs["gates"][0, 0, 0]
      if p.scalar:
        self.g = gates[: p.heads]
        g = jnp.maximum(self.g, _SMALLEST)
        self.G_rows = dot_ones(g, jnp.where(self.upper, 1.0, 0.0))
        columns.append(self.G_rows)
        if p.before:
          columns.append(self.G_rows - g)
      if p.erase == "key":
        columns.append(gates[p.rows - p.heads :])
    if p.segments:
      runs = refs["runs"][0, 0]
      columns.append(runs)
    if columns:
      count = sum(c.shape[0] for c in columns)
      pad = -count % 8
      if pad:
        columns.append(jnp.zeros((pad, p.C), jnp.float32))
      self.columns = jnp.concatenate(columns).T
    if p.segments:
      runs_column = self.columns[:, count - 1 : count]
      same = runs_column == runs
      last = runs[:, p.C - 1 :]
      self.masks = Masks(
        self.lower & same, strictly & same, runs_column == 0, runs_column == last, last == 0
      )

  def tokens(self, name: str, i: int, width: int) -> Array:
    """Head i of an operand in float32, tokens beyond T zero."""
    x = self.refs[name][0, :, i * width : (i + 1) * width].astype(jnp.float32)
    return x if self.valid is None else jnp.where(self.valid, x, 0.0)

  def column(self, i: int) -> Array:
    return jnp.broadcast_to(self.columns[:, i : i + 1], (self.p.C, self.p.C))

  def key(self, h: int) -> int:
    return h // self.p.ratio if self.p.repeats == 1 else 0

  def state(self, h: int, j):
    """Where the state of head h lies among those of the group."""
    return h if self.p.repeats == 1 else j * self.p.heads + h

  def write(self, name: str, x: Array, i: int, width: int) -> None:
    self.refs[name][0, :, i * width : (i + 1) * width] = x.astype(self.refs[name].dtype)

  def head(self, h: int) -> Chunk:
    p = self.p
    hk = self.key(h)
    x = dict(q=self.tokens("q", hk, p.K), k=self.tokens("k", hk, p.K), v=self.tokens("v", h, p.V))
    if p.scalar:
      x["G"], x["G_row"] = self.column(h), self.G_rows[h : h + 1]
      if p.before:
        x["before"] = self.column(p.heads + h)
    elif p.decay == "channel":
      g = jnp.maximum(self.tokens("log_decay", h, p.K), _BASES[p.exact][1])
      ones = jnp.where(self.lower, 1.0, 0.0)
      x["G"] = dot_ones(g, ones, left=True, parts=3 if p.exact else 2)
      if p.before:
        x["before"] = x["G"] - g
    if "G" in x:
      x["last"] = x["G"][p.C - 1 :]
    if p.erase == "key":
      x["beta"] = self.column(p.beta + h)
    elif p.erase == "low_rank":
      x["a"], x["b"] = self.tokens("a", h, p.K), self.tokens("b", h, p.K)
    if p.bonus:
      x["bonus"] = self.refs["bonus"][:, hk * p.K : (hk + 1) * p.K]
    return Chunk(**x)

  def run(self, Sts: list[Array], xs: list[Chunk]):
    p = self.p
    return chunks(Sts, xs, self.masks, undecayed=p.undecayed, base=p.base, exact=p.exact)


def _forward_kernel(p: _Plan, names, *refs):
  refs = dict(zip(names, refs, strict=True))
  n, j = pl.program_id(2), pl.program_id(3)

  @pl.when((n == 0) & (j == 0))
  def _():
    refs["final"][...] = refs["initial"][...]

  step = _Step(p, refs, n)
  states = [refs["final"][0, step.state(h, j)] for h in range(p.heads)]
  if "boundaries" in refs:
    for h, St in enumerate(states):
      refs["boundaries"][0, h, 0] = St
  outputs, states = step.run(states, [step.head(h) for h in range(p.heads)])
  for h, (o, St) in enumerate(zip(outputs, states, strict=True)):
    step.write("o", o, h, p.V)
    refs["final"][0, step.state(h, j)] = St


def _backward_kernel(p: _Plan, names, *refs):
  refs = dict(zip(names, refs, strict=True))
  n, j = pl.program_id(2), pl.program_id(3)
  step = _Step(p, refs, p.N - 1 - n)

  @pl.when((n == 0) & (j == 0))
  def _():
    refs["dinitial"][...] = refs["dfinal"][...]
    if p.bonus:
      refs["dbonus"][...] = jnp.zeros(refs["dbonus"].shape, jnp.float32)

  shared = {}  # gradients of key heads, summed over their value heads
  count = p.beta + p.heads * (p.erase == "key")
  lanes = jax.lax.broadcasted_iota(jnp.int32, (p.C, max(-(-count // 8) * 8, 8)), 1)
  columns = jnp.zeros(lanes.shape, jnp.float32)

  def add_column(columns, x, i):
    return jnp.where(lanes == i, jnp.sum(x, axis=1, keepdims=True), columns)

  heads = range(p.heads)
  states = [refs["boundaries"][0, h, 0] for h in heads]
  _, vjp = jax.vjp(step.run, states, [step.head(h) for h in heads])
  dstates = [refs["dinitial"][0, step.state(h, j)] for h in heads]
  dstates, dxs = vjp(([step.tokens("do", h, p.V) for h in heads], dstates))
  for h, (dSt, dx) in enumerate(zip(dstates, dxs, strict=True)):
    hk = step.key(h)
    refs["dinitial"][0, step.state(h, j)] = dSt
    step.write("dv", dx.v, h, p.V)
    for name in ("q", "k"):
      shared[name, hk] = getattr(dx, name) + shared.get((name, hk), 0.0)
    if p.erase == "low_rank":
      step.write("da", dx.a, h, p.K)
      step.write("db", dx.b, h, p.K)
    if p.erase == "key":
      columns = add_column(columns, dx.beta, p.beta + h)
    if p.bonus:
      at = slice(hk * p.K, (hk + 1) * p.K)
      refs["dbonus"][0, :, at] = refs["dbonus"][0, :, at] + dx.bonus
    if p.decay == "channel":
      end = jax.lax.broadcasted_iota(jnp.int32, dx.G.shape, 0) == p.C - 1
      dG = dx.G + jnp.where(end, dx.last, 0.0)
      if p.before:
        dG = dG + dx.before
      dg = dot_ones(dG, jnp.where(step.upper, 1.0, 0.0), left=True, parts=3 if p.exact else 2)
      if p.before:
        dg = dg - dx.before
      kept = step.tokens("log_decay", h, p.K) >= _BASES[p.exact][1]
      step.write("dlog_decay", jnp.where(kept, dg, 0.0), h, p.K)
    elif p.decay != "none":
      columns = add_column(columns, dx.G, h)
      end = jax.lax.broadcasted_iota(jnp.int32, (1, p.C), 1) == p.C - 1
      last = jnp.sum(dx.last, axis=1, keepdims=True)
      refs["rows"][h : h + 1] = dx.G_row + jnp.where(end, last, 0.0)
      if p.before:
        columns = add_column(columns, dx.before, p.heads + h)

  for (name, hk), dx in shared.items():
    if p.repeats == 1:
      step.write("d" + name, dx, hk, p.K)
    else:
      total = refs["sum_" + name]

      @pl.when(j == 0)
      def _(total=total):
        total[...] = jnp.zeros(total.shape, jnp.float32)

      total[...] += dx

      @pl.when(j == p.repeats - 1)
      def _(name=name, total=total):
        step.write("d" + name, total[...], 0, p.K)

  if p.rows:
    across = columns.T
    if p.scalar:
      dG = across[: p.heads] + refs["rows"][: p.heads]
      dE = across[p.heads : 2 * p.heads] if p.before else None
      if dE is not None:
        dG = dG + dE
      dg = dot_ones(dG, jnp.where(step.lower, 1.0, 0.0))
      if dE is not None:
        dg = dg - dE
      refs["dgates"][0, 0, 0, : p.heads] = jnp.where(step.g >= _SMALLEST, dg, 0.0)
    if p.erase == "key":
      refs["dgates"][0, 0, 0, p.rows - p.heads :] = across[p.beta : count]


# --- calls ---


def _flops(p: _Plan) -> int:
  """Of the forward pass's products, for the scheduler."""
  erases = p.erase != "none"
  each = 2 * p.C * (p.K * p.C * (1 + erases) + p.V * p.C * (1 + erases) + p.K * p.V * (2 + erases))
  return each * p.B * p.N * p.heads * p.groups * p.repeats


def _call(p: _Plan, kernel, name, arrays, in_specs, outs, out_specs, scratch, work, interpret):
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays.values(), *outs.values()))
  names = (*arrays, *outs, *scratch)
  tokens = p.B * p.T * p.heads * p.groups * p.repeats
  results = pl.pallas_call(
    functools.partial(kernel, p, names),
    name=name,
    grid=(p.B, p.groups, p.N, p.repeats),
    in_specs=[in_specs[name] for name in arrays],
    out_specs=[out_specs[name] for name in outs],
    out_shape=list(outs.values()),
    scratch_shapes=list(scratch.values()),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=p.vmem,
    ),
    cost_estimate=pl.CostEstimate(
      flops=work * _flops(p), bytes_accessed=size, transcendentals=work * tokens * p.C
    ),
    interpret=interpret,
  )(*arrays.values())
  return dict(zip(outs, results, strict=True))


def forward(
  r: Recurrence,
  initial_state: Float[Array, "B Hv K V"],
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
  *,
  keep: bool = True,
  interpret=False,
) -> tuple[Array, Array, Array | None]:
  """Outputs [B, T, Hv, V], the final state, and the states that ``backward`` starts from (if to ``keep``)."""
  p = _plan(r, runs, chunk, "forward")

  def walk(n):
    return n

  arrays, specs = _operands(p, r, runs, walk)
  arrays["initial"], specs["initial"] = jnp.swapaxes(initial_state, 2, 3), _states(p)
  Hv = r.v.shape[2]
  outs = {
    "o": jax.ShapeDtypeStruct((p.B, p.T, Hv * p.V), r.v.dtype),
    "final": jax.ShapeDtypeStruct((p.B, Hv, p.V, p.K), jnp.float32),
  }
  out_specs = {"o": specs["v"], "final": specs["initial"]}
  if keep:
    outs["boundaries"] = jax.ShapeDtypeStruct((p.B, Hv, p.N, p.V, p.K), jnp.float32)
    out_specs["boundaries"] = _boundaries(p, walk)
  out = _call(
    p,
    _forward_kernel,
    "linear_recurrence_forward",
    arrays,
    specs,
    outs,
    out_specs,
    {},
    1,
    interpret,
  )
  return (
    out["o"].reshape(r.v.shape),
    jnp.swapaxes(out["final"], 2, 3),
    out.get("boundaries"),
  )


def backward(
  r: Recurrence,
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
  boundaries: Float[Array, "B Hv N V K"],
  do: Float[Array, "B T Hv V"],
  dfinal: Float[Array, "B Hv K V"],
  *,
  interpret=False,
) -> tuple[Recurrence, Float[Array, "B Hv K V"]]:
  """Gradients of inputs and initial state."""
  p = _plan(r, runs, chunk, "backward")

  def walk(n):
    return p.N - 1 - n

  arrays, specs = _operands(p, r, runs, walk)
  operands = dict(arrays)
  arrays |= {
    "do": do.reshape(p.B, p.T, -1),
    "dfinal": jnp.swapaxes(dfinal, 2, 3),
    "boundaries": boundaries,
  }
  specs |= {"do": specs["v"], "dfinal": _states(p), "boundaries": _boundaries(p, walk)}
  outs, out_specs = {}, {}
  for name, x in operands.items():
    if name == "runs":
      continue
    shape, spec = x.shape, specs[name]
    if name == "bonus":
      shape = (p.B, *shape)
      spec = pl.BlockSpec((1, 1, p.keys * p.K), lambda b, g, n, j: (b, 0, g))
    elif name == "gates":
      shape = (p.B, *shape[1:])
      spec = _gate_rows(p, walk)
    outs["d" + name], out_specs["d" + name] = jax.ShapeDtypeStruct(shape, x.dtype), spec
  outs["dinitial"] = jax.ShapeDtypeStruct(arrays["dfinal"].shape, jnp.float32)
  out_specs["dinitial"] = _states(p)
  scratch = {}
  if p.scalar:
    scratch["rows"] = pltpu.VMEM((-(-p.heads // 8) * 8, p.C), jnp.float32)
  if p.repeats > 1:
    scratch |= {name: pltpu.VMEM((p.C, p.K), jnp.float32) for name in ("sum_q", "sum_k")}
  out = _call(
    p, _backward_kernel, "linear_recurrence_backward", arrays, specs, outs, out_specs, scratch, 3,
    interpret,
  )  # fmt: skip
  dlog_decay = None
  if p.decay == "channel":
    dlog_decay = out["dlog_decay"].reshape(r.log_decay.shape)
  elif p.decay != "none":
    dlog_decay = _from_rows(p, out["dgates"][..., : p.heads, :], r.v.shape[2])
    if p.decay == "constant":
      dlog_decay = jnp.sum(dlog_decay, axis=(0, 1))
    dlog_decay = dlog_decay.reshape(r.log_decay.shape).astype(r.log_decay.dtype)
  erase = None
  if p.erase == "key":
    dbeta = _from_rows(p, out["dgates"][..., p.rows - p.heads :, :], r.v.shape[2])
    erase = KeyErase(dbeta.astype(r.erase.beta.dtype))
  elif p.erase == "low_rank":
    erase = LowRankErase(*(out[name].reshape(r.erase.a.shape) for name in ("da", "db")))
  bonus = None
  if p.bonus:
    bonus = jnp.sum(out["dbonus"], axis=0).reshape(r.bonus.shape).astype(r.bonus.dtype)
  dq, dk, dv = (out["d" + n].reshape(getattr(r, n).shape) for n in ("q", "k", "v"))
  dr = Recurrence(dq, dk, dv, dlog_decay, erase, bonus, r.reads)
  return dr, jnp.swapaxes(out["dinitial"], 2, 3)
