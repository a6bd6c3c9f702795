"""The recurrence on Hopper GPUs.

What walks chunks one after the other (the state forward, its gradient backward) are Pallas Mosaic GPU kernels, in
``gpu_scan.py``. What is local to a chunk, and so the same for all chunks at once, is plain jax.numpy that XLA compiles:
forward, the operands of the kernels (decays applied, triangular systems inverted); backward, the gradients of all
inputs from the states at chunk boundaries and their gradients, which both kernels leave.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.linear_recurrence import gpu_scan, xla
from pallas_kernels.linear_recurrence.gpu_scan import CHUNK, Plan
from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence
from pallas_kernels.linear_recurrence.triangular import unit_lower_inverse

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
  if _plan(r) is None:
    raise NotImplementedError(
      f"a chunk of keys of {K} channels in {r.k.dtype} does not fit into a Hopper GPU's shared memory"
    )


def _plan(r: Recurrence) -> Plan | None:
  B, T, Hv, V = r.v.shape
  K = r.k.shape[3]
  # Anything with more than eight bits is two bfloat16.
  parts = 1 if r.q.dtype == r.k.dtype == r.v.dtype == jnp.bfloat16 else 2
  erase = {KeyErase: "key", LowRankErase: "low_rank", type(None): "none"}[type(r.erase)]
  for columns in (64, 32) if K <= 128 else (32,):
    p = Plan(B, Hv, K, V, -(-T // CHUNK), parts, erase, columns)
    if gpu_scan.fits(p, r.v.dtype.itemsize):
      return p
  return None


# --- what is local to a chunk ---


def _operands(p: Plan, bonus, tokens: Recurrence, runs):
  """Operands of ``gpu_scan`` by name, and what is kept of the state, [heads, N, K] or None for all of it."""
  chunks = xla.cut(bonus, tokens, runs, CHUNK)
  x = xla.local(chunks)
  if p.erase != "none":
    x["inverse"] = unit_lower_inverse(x.pop("L"))
    if p.erase == "key":
      x["inverse"] = x["inverse"] * jnp.swapaxes(chunks.beta, -1, -2)

  def by_head(y):  # [N, B, H, Hv / H, rows, columns] -> [B * Hv, N, rows, columns]
    y = jnp.broadcast_to(y, (p.chunks, p.B, *y.shape[2:]))
    y = jnp.broadcast_to(y, (*y.shape[:3], p.Hv // y.shape[2], *y.shape[4:]))
    y = y.transpose(1, 2, 3, 0, 4, 5)
    return y.reshape(p.heads * p.chunks, *y.shape[4:])

  keep = x.pop("keep")
  if tokens.log_decay is None and runs is None:
    keep = None
  else:
    keep = by_head(jnp.broadcast_to(keep, (*keep.shape[:4], p.K, 1)))
    keep = keep.reshape(p.heads, p.chunks, p.K)
  return {name: gpu_scan.parts(by_head(y), p.parts) for name, y in x.items()}, keep


def _values(p: Plan, x: Array) -> list[Array]:
  return gpu_scan.parts(x.reshape(p.B * p.chunks, CHUNK, p.Hv * p.V), p.parts)


def forward(
  r: Recurrence,
  initial_state: Float[Array, "B Hv K V"],
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
  *,
  keep: bool,
  interpret=False,
) -> tuple[Array, Array, list[Array] | None]:
  """Outputs [B, T, Hv, V], the final state, and the states that ``backward`` starts from (if to ``keep``)."""
  p = _plan(r)
  tokens, bonus, runs, _ = xla.prepare(r, runs, CHUNK)
  operands, kept = _operands(p, bonus, tokens, runs)
  initial_state = initial_state.reshape(p.heads, p.K, p.V)
  o, final, boundaries = gpu_scan.forward(
    p, operands, kept, _values(p, tokens.v), initial_state, r.v.dtype, boundaries=keep, interpret=interpret
  )  # fmt: skip
  o = o.reshape(p.B, p.chunks * CHUNK, p.Hv, p.V)[:, : r.v.shape[1]]
  return o, final.reshape(p.B, p.Hv, p.K, p.V), boundaries if keep else None


def backward(
  r: Recurrence,
  runs: Int[Array, "B T"] | None,
  chunk: int | None,
  boundaries: list[Array],
  do: Float[Array, "B T Hv V"],
  dfinal: Float[Array, "B Hv K V"],
  *,
  interpret=False,
) -> tuple[Recurrence, Float[Array, "B Hv K V"]]:
  """Gradients of inputs and initial state."""
  p = _plan(r)
  tokens, bonus, padded, _ = xla.prepare(r, runs, CHUNK)
  operands, kept = _operands(p, bonus, tokens, padded)
  do_padded = jnp.pad(do, ((0, 0), (0, p.chunks * CHUNK - do.shape[1]), (0, 0), (0, 0)))
  dfinal = dfinal.reshape(p.heads, p.K, p.V)
  dboundaries, dinitial = gpu_scan.backward(
    p, operands, kept, _values(p, do_padded), dfinal, interpret=interpret
  )

  def states(parts):  # [heads * N, K, V] in parts -> [N, B, Hv, K, V]
    x = sum(part.astype(jnp.float32) for part in parts)
    return jnp.moveaxis(x.reshape(p.B, p.Hv, p.chunks, p.K, p.V), 2, 0)

  dr = xla.between_states(r, runs, CHUNK, _GROUP, states(boundaries), do, states(dboundaries))
  return dr, dinitial.reshape(p.B, p.Hv, p.K, p.V)
