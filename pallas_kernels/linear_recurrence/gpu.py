"""The recurrence on Hopper GPUs.

Pallas Mosaic GPU kernels are: decays of channels, summed over a chunk's tokens (``gpu_decay.py``); what is local to a
chunk, for all chunks at once (``gpu_chunk.py``: decays applied, triangular systems inverted); what walks chunks one
after the other, the state forward and its gradient backward (``gpu_scan.py``, and ``gpu_stream.py`` where a chunk of
keys is too large for it); and, once the states at a chunk's ends and their gradients are there, the gradients of what
it is computed from (``gpu_gradients.py``). XLA compiles what is elementwise, numbers a token and head, and their
derivatives; and the gradients of a low-rank erase in float32, whose sums and operands in parts are more than a Hopper
GPU's shared memory.

The forward pass keeps for the backward pass the states before chunks and what tokens are to tokens: of a key erase
three matrices, 64 numbers a token and head each. What has key channels is computed again.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.linear_recurrence import (
  gpu_chunk,
  gpu_decay,
  gpu_gradients,
  gpu_scan,
  gpu_stream,
  xla,
)
from pallas_kernels.linear_recurrence.gpu_scan import CHUNK, Plan
from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence

# Programs along a grid's second axis, which has the chunks.
_MOST = 65535
# Chunks whose gradients are computed at once: memory for what is local to a chunk.
_GROUP = 8


def check(r: Recurrence, chunk: int | None) -> None:
  """Raises NotImplementedError, saying why, where the kernels cannot serve the call on this machine."""
  dispatch.needs_hopper()
  supports(r, chunk)


def supports(r: Recurrence, chunk: int | None) -> None:
  """The part of ``check`` that does not ask where it runs."""
  if r.accumulate_dtype != jnp.float32:
    raise NotImplementedError("the GPU kernels compute in float32; float64 inputs need 'xla'")
  if chunk not in (None, CHUNK):
    raise NotImplementedError(f"the GPU kernels take chunks of {CHUNK} tokens; got {chunk}")
  K, V = r.k.shape[3], r.v.shape[3]
  if K not in (64, 128, 256) or V % 64:
    raise NotImplementedError(
      f"the GPU kernels take keys of 64, 128 or 256 channels and values of a multiple of 64; got {K} and {V}"
    )
  B, T = r.k.shape[:2]
  if (chunks := B * -(-T // CHUNK)) > _MOST:
    raise NotImplementedError(f"the GPU kernels take up to {_MOST} chunks of {CHUNK}; got {chunks}")


def _plan(r: Recurrence) -> Plan:
  B, T, Hv, V = r.v.shape
  K = r.k.shape[3]
  # Anything with more than eight bits is two bfloat16.
  parts = 1 if r.q.dtype == r.k.dtype == r.v.dtype == jnp.bfloat16 else 2
  erase = {KeyErase: "key", LowRankErase: "low_rank", type(None): "none"}[type(r.erase)]
  for columns in (64, 32) if K <= 128 else (32,):
    p = Plan(B, Hv, K, V, -(-T // CHUNK), parts, erase, columns)
    if gpu_scan.fits(p, r.v.dtype.itemsize):
      break
  return p


def _scan(p: Plan, o_bytes: int):
  """The module that walks over chunks."""
  return gpu_scan if gpu_scan.fits(p, o_bytes) else gpu_stream


# --- what is local to a chunk ---


def _arrays(p: Plan, bonus, tokens: Recurrence, runs, interpret):
  """What ``gpu_chunk`` reads, by name, and what is kept of the state, [heads, N, K] or None for all of it."""
  B, N, Hv, K = p.B, p.chunks, p.Hv, p.K
  f32 = jnp.float32

  def side_by_side(x):  # [B, T, heads, K] -> [B * N, C, heads * K]
    return x.reshape(B * N, CHUNK, -1)

  def of_heads(x):  # [B, N, C, Hv or 1] -> [B * Hv * N, C]
    x = jnp.broadcast_to(x.astype(f32), (B, N, CHUNK, Hv))
    return x.transpose(0, 3, 1, 2).reshape(p.heads * N, CHUNK)

  arrays = {"q": side_by_side(tokens.q), "k": side_by_side(tokens.k)}
  if p.erase == "low_rank":
    arrays |= {"a": side_by_side(tokens.erase.a), "b": side_by_side(tokens.erase.b)}
  if p.erase == "key":
    arrays["beta"] = of_heads(tokens.erase.beta.reshape(B, N, CHUNK, Hv))
  if bonus is not None:
    # No einsum: of float32 a GPU's is one of 11 bits.
    own = jnp.sum(tokens.q.astype(f32) * tokens.k.astype(f32) * bonus, axis=-1)
    own = jnp.repeat(own, Hv // own.shape[-1], axis=-1)
    arrays["own"] = of_heads(own.reshape(B, N, CHUNK, Hv))

  # Factors of what reads the state, of what writes it, and of the state.
  undecayed = tokens.reads == "undecayed"
  start = erase_start = end = keep = None
  if runs is not None:
    own_runs = runs[:, 1:].reshape(B, N, CHUNK, 1)
    carried, last = runs[:, :-1].reshape(B, N, CHUNK, 1)[:, :, :1], own_runs[:, :, -1:]
    start = erase_start = (own_runs == carried).astype(f32)
    end, keep = (own_runs == last).astype(f32), (last == carried).astype(f32)
    arrays["runs"] = of_heads(own_runs - carried)
  if tokens.log_decay is not None:
    if tokens.decay == "channel":
      G, last, before = gpu_decay.cumulative(
        side_by_side(tokens.log_decay),
        gpu_chunk.smallest_decay(p),
        before=bonus is not None or (undecayed and p.erase != "none"),
        interpret=interpret,
      )
      arrays |= {"G": G} | ({} if before is None else {"before": before})
      kept = jnp.exp(last).reshape(B, N, 1, Hv, K)
      keep = kept if keep is None else kept * keep[..., None]
    else:
      g = jnp.maximum(tokens.log_decay.astype(f32), xla.strongest(f32))
      G = jnp.cumsum(
        jnp.broadcast_to(g[..., 0], (B, *g.shape[1:3])).reshape(B, N, CHUNK, -1), axis=2
      )
      before = jnp.concatenate([jnp.zeros_like(G[:, :, :1]), G[:, :, :-1]], axis=2)
      last = G[:, :, -1:]
      kept = jnp.exp(last)
      keep = kept if keep is None else kept * keep
      arrays |= {"G_row": of_heads(G), "before_row": of_heads(before)}
      reads = before if bonus is not None else G
      erase_reads = before if undecayed else G
      one = 1.0 if runs is None else start
      start, erase_start = one * jnp.exp(reads), one * jnp.exp(erase_reads)
      end = (1.0 if runs is None else end) * jnp.exp(last - G)
  factors = {"start": start, "erase_start": erase_start, "end": end}
  arrays |= {name: of_heads(x) for name, x in factors.items() if x is not None}
  if keep is not None:
    if keep.ndim == 4:
      keep = keep[..., None]
    keep = jnp.broadcast_to(keep, (B, N, 1, Hv, K))
    keep = keep[:, :, 0].transpose(0, 2, 1, 3).reshape(p.heads, N, K)
  # Twice, as a column and as a row: loads of one array that differ in layout alone would be merged.
  columns = {"G_row": "G_column", "runs": "runs_column"}
  arrays |= {columns[name]: x for name, x in arrays.items() if name in columns}
  return arrays, keep


def _beta(p: Plan, arrays: dict) -> Array | None:
  return arrays["beta"].reshape(p.heads, p.chunks, CHUNK) if p.erase == "key" else None


def _values(p: Plan, x: Array) -> list[Array]:
  return gpu_scan.parts_in_xla(x.reshape(p.B * p.chunks, CHUNK, p.Hv * p.V), p.parts)


def forward(
  r: Recurrence,
  initial_state: Float[Array, "B Hv K V"],
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
  *,
  keep: bool,
  interpret=False,
) -> tuple[Array, Array, dict[str, list[Array]] | None]:
  """Outputs [B, T, Hv, V], the final state, and, if to ``keep``, what ``backward`` takes of it.

  The states before chunks, "S" [B * Hv * N, K, V], and what tokens are to tokens in chunks, by name, all in parts.
  """
  p = _plan(r)
  tokens, bonus, runs, _ = xla.prepare(r, runs, CHUNK)
  arrays, kept = _arrays(p, bonus, tokens, runs, interpret)
  squares = gpu_scan.square(p.erase)
  if keep and p.erase != "none":
    squares += ("erasing",)
  operands = gpu_chunk.operands(
    p,
    arrays,
    tokens.k.shape[2],
    tokens.reads == "undecayed",
    (*gpu_scan.wide(p.erase), *squares),
    interpret,
  )
  initial_state = initial_state.reshape(p.heads, p.K, p.V)
  o, final, boundaries = _scan(p, r.v.dtype.itemsize).forward(
    p,
    operands,
    kept,
    _beta(p, arrays),
    _values(p, tokens.v),
    initial_state,
    r.v.dtype,
    boundaries=keep,
    interpret=interpret,
  )
  o = o.reshape(p.B, p.chunks * CHUNK, p.Hv, p.V)[:, : r.v.shape[1]]
  residuals = {"S": boundaries} | {name: operands[name] for name in squares}
  return o, final.reshape(p.B, p.Hv, p.K, p.V), residuals if keep else None


def backward(
  r: Recurrence,
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
  residuals: dict[str, list[Array]],
  do: Float[Array, "B T Hv V"],
  dfinal: Float[Array, "B Hv K V"],
  *,
  interpret=False,
) -> tuple[Recurrence, Float[Array, "B Hv K V"]]:
  """Gradients of inputs and initial state."""
  p = _plan(r)
  tokens, bonus, padded, _ = xla.prepare(r, runs, CHUNK)
  (arrays, kept), of_inputs = jax.vjp(
    lambda bonus, tokens: _arrays(p, bonus, tokens, padded, interpret), bonus, tokens
  )
  H, undecayed = tokens.k.shape[2], tokens.reads == "undecayed"
  boundaries, squares = residuals["S"], {n: x for n, x in residuals.items() if n != "S"}
  operands = squares | gpu_chunk.operands(
    p, arrays, H, undecayed, gpu_scan.wide(p.erase), interpret
  )
  of_outputs = jnp.pad(do, ((0, 0), (0, p.chunks * CHUNK - do.shape[1]), (0, 0), (0, 0)))
  of_outputs = _values(p, of_outputs)
  dfinal = dfinal.reshape(p.heads, p.K, p.V)
  dboundaries, dinitial, dy = _scan(p, r.v.dtype.itemsize).backward(
    p, operands, kept, of_outputs, dfinal, interpret=interpret
  )
  dinitial = dinitial.reshape(p.B, p.Hv, p.K, p.V)
  if not gpu_gradients.serves(p):
    states = _states(p, boundaries), do, _states(p, dboundaries)
    return xla.between_states(r, runs, CHUNK, _GROUP, *states), dinitial

  # By name, in parts: what is laid out like v, and the states before and after chunks.
  parts = {"v": _values(p, tokens.v), "do": of_outputs, "dy": dy, "S": boundaries, "D": dboundaries}
  # What tokens are to tokens has names of its own; what reads and writes states, in places those of inputs.
  own = {"beta": arrays["beta"]} if p.erase == "key" else {}
  written = gpu_gradients.values(p, operands | parts | own, r.v.dtype, interpret)
  dv = written.pop("v", None)
  darrays = gpu_gradients.gradients(
    p,
    arrays | squares | parts | written,
    H,
    undecayed,
    kept is not None,
    jnp.result_type(r.q, r.k) if H == p.Hv else jnp.float32,
    interpret,
  )
  dkept = darrays.pop("keep", None)
  for name in ("q", "k") if H < p.Hv else ():  # a key head's: the sum of its value heads'
    x = darrays[name].reshape(p.B * p.chunks, CHUNK, H, p.Hv // H, p.K)
    darrays[name] = jnp.sum(x, axis=3, dtype=jnp.float32).reshape(arrays[name].shape)
  darrays = {
    n: darrays[n].astype(x.dtype) if n in darrays else jnp.zeros_like(x) for n, x in arrays.items()
  }
  dbonus, dtokens = of_inputs((darrays, dkept))
  if p.erase == "key":  # values are written times beta
    dy = sum(x.astype(jnp.float32) for x in dy).reshape(tokens.v.shape)
    dv = dy * tokens.erase.beta[..., None]
    dbeta = jnp.sum(dy * tokens.v, axis=-1).astype(dtokens.erase.beta.dtype)
    # A sum along rows, which XLA would compute in the order of heads, along columns, to add it to the other.
    dbeta = dtokens.erase.beta + jax.lax.optimization_barrier(dbeta)
    dtokens = dataclasses.replace(dtokens, erase=KeyErase(dbeta))
  dv = dv.reshape(tokens.v.shape).astype(tokens.v.dtype)
  return xla.gradients(r, dbonus, dataclasses.replace(dtokens, v=dv)), dinitial


def _states(p: Plan, parts: list[Array]) -> Float[Array, "N B Hv K V"]:
  x = sum(part.astype(jnp.float32) for part in parts)
  return jnp.moveaxis(x.reshape(p.B, p.Hv, p.chunks, p.K, p.V), 2, 0)
