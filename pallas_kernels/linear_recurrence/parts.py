"""A recurrence over rows of which each device has a part (context parallelism).

What a part does to the state is affine, ``S_after = M S_before + U``, and so is what it does to the state's gradient,
with M transposed. Each device computes the M and U of its own part; all of them are gathered, a state or two a head and
part whatever the length; and each device composes those before its own. Then every part has its state at the start, and
runs as if it were alone.

That is a second run of the recurrence forward (with an erase a third, of K values, for M), and none more backward.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import segments
from pallas_kernels.linear_recurrence.recurrence import Recurrence
from pallas_kernels.linear_recurrence.xla import strongest

# A part's M: a matrix, or where channels do not mix its diagonal, the same for all or not.
Transition = Float[Array, "B Hv K K"] | Float[Array, "B Hv #K 1"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Effect:
  """What one part does to the state.

  Attributes:
    transition: M, zero where a segment begins in the part.
    reads: ``M_t^T q_t`` of each token, M_t being from the part's start to what the token reads: the gradient of the
      state at the start is the sum of ``reads_t do_t^T``, where nothing comes after the part.
    joined: whether the part begins within the segment that the part before ends with.
  """

  transition: Transition
  reads: Float[Array, "B T Hv K"]
  joined: Bool[Array, " B"]


def effect(
  run: Callable[[Recurrence, Array], tuple[Array, Array]],
  r: Recurrence,
  runs: Int[Array, "B T"] | None,
  segment_ids: Int[Array, "B T"] | None,
  axis_name: str,
) -> tuple[Effect, Float[Array, "B Hv K V"]]:
  """What this device's part does to the state, and U, its state at the end if it began with none.

  Args:
    run: a recurrence from a state: its outputs and the state after it.
    runs: ``segments.runs`` of segment_ids.
  """
  B, T, H, K = r.k.shape
  Hv, V, dtype = r.v.shape[2], r.v.shape[3], r.accumulate_dtype
  _, written = run(r, jnp.zeros((B, Hv, K, V), dtype))
  if r.erase is None:
    transition, reads = _decay(r, runs)
  else:  # What becomes of the identity where nothing is written.
    silent = dataclasses.replace(r, v=jnp.zeros((B, T, Hv, K), r.v.dtype))
    reads, transition = run(silent, jnp.broadcast_to(jnp.eye(K, dtype=dtype), (B, Hv, K, K)))
  joined = jnp.ones(B, bool)
  if segment_ids is not None:
    joined = ~segments.starts(segment_ids, axis_name)[:, 0]
  return Effect(transition, reads, joined), written


def _decay(r: Recurrence, runs: Int[Array, "B T"] | None) -> tuple[Transition, Array]:
  """``Effect``'s transition and reads of a recurrence without an erase."""
  B, T, H, _ = r.k.shape
  Hv, dtype = r.v.shape[2], r.accumulate_dtype
  if r.decay in ("none", "constant"):
    one = jnp.zeros(Hv) if r.log_decay is None else r.log_decay
    g = jnp.broadcast_to(one[:, None], (B, T, Hv, 1))
  else:
    g = r.log_decay
  total = jnp.cumsum(jnp.maximum(g.astype(dtype), strongest(dtype)), axis=1)
  kept = read = jnp.exp(total)
  if r.bonus is not None:  # a token reads the state before it
    read = jnp.pad(kept[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=1)
  if runs is not None:
    first = (runs == 0)[..., None, None]
    kept, read = jnp.where(first, kept, 0), jnp.where(first, read, 0)
  reads = jnp.repeat(r.q.astype(dtype), Hv // H, axis=2) * read
  return kept[:, -1, :, :, None], reads.astype(r.v.dtype)


def states(
  e: Effect, written: Float[Array, "B Hv K V"], initial: Float[Array, "B Hv K V"], axis_name: str
) -> tuple[Float[Array, "B Hv K V"], Float[Array, "B Hv K V"]]:
  """This part's state at the start, and the last part's at the end, from that before the first part."""

  def through(S, part):
    transition, written, joined = part
    S = jnp.where(joined[:, None, None, None], S, 0)
    return _apply(transition, S, "bhij,bhjv->bhiv") + written, S

  parts = lax.all_gather((e.transition, written, e.joined), axis_name)
  final, at_start = lax.scan(through, initial, parts)
  return at_start[lax.axis_index(axis_name)], final


def gradients(
  e: Effect, do: Float[Array, "B T Hv V"], dfinal: Float[Array, "B Hv K V"], axis_name: str
) -> tuple[Float[Array, "B Hv K V"], Float[Array, "B Hv K V"]]:
  """The gradient of this part's state at the end, and of the state before the first part (on its device; 0 elsewhere).

  Args:
    do: of this part's outputs.
    dfinal: of the last part's state at the end; the devices' own sum to it.
  """
  dfinal = lax.psum(dfinal, axis_name)
  own = jnp.einsum(
    "bthk,bthv->bhkv", e.reads, do, precision="highest", preferred_element_type=dfinal.dtype
  )

  def back(dS, part):
    transition, own, joined = part
    before = _apply(transition, dS, "bhij,bhiv->bhjv") + own
    return jnp.where(joined[:, None, None, None], before, 0), dS

  parts = lax.all_gather((e.transition, own, e.joined), axis_name)
  dinitial, at_end = lax.scan(back, dfinal, parts, reverse=True)
  i = lax.axis_index(axis_name)
  return at_end[i], jnp.where(i == 0, dinitial, 0)


def _apply(transition: Transition, S: Float[Array, "B Hv K V"], product: str) -> Array:
  if transition.shape[-1] == 1:
    return transition * S
  return jnp.einsum(product, transition, S, precision="highest")
