"""Log-linear attention (arXiv:2506.04761): of the past a state for each power of two, on any linear mechanism.

A token's past is cut as a Fenwick tree cuts it (section 3.1). Token t itself is level 0; for each bit i that is set in
t, level i + 1 holds the 2^i tokens that share the bits of t above i and have a 0 there. What a level has is read with
its own weight of the token:

  o_t = sum_l w_t^l S_t^l q_t

So level l + 1 is the mechanism itself on blocks of 2^(l+1) tokens, in which the first half writes and the second reads:
log2 T + 1 runs of the engine, one after the other, each computed again in the backward pass. The floor would be one run
for all levels within a chunk, and one for each above.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import segments
from pallas_kernels.mechanisms import gated_delta_rule, ssd


def levels_of(length: int) -> int:
  """How many levels a sequence of so many tokens has."""
  return (length - 1).bit_length() + 1


def log_linear(
  core: Callable[..., tuple[Array, Array | None]],
  inputs: dict[str, Array],
  write: str,
  weights: Float[Array, "B T Hv L"],
  position: Float[Array, "B T Hv"],
  *,
  initial_state: Float[Array, "B Hv levels K V"] | None = None,
  return_state: bool = False,
  segment_ids: Array | None = None,
  **options,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv levels K V"] | None]:
  """A mechanism with a state for each level.

  Args:
    core: the mechanism: a function of ``inputs`` by name, ``initial_state``, ``return_state`` and ``segment_ids``.
    inputs: [B, T, ...].
    write: the name of those that write nothing where they are zero.
    weights: of levels, the token itself first; at least ``levels_of(T)``.
    position: of each token in its document, from 0, the same for all heads. Without an initial state, documents begin
      within the row.
    initial_state: of the first ``levels``, after the token at ``position[:, 0] - 1``; of no account at position 0.
    return_state: whether the last token's states are wanted, as many as there are initially or else as T has.
    segment_ids, options: as the mechanism's.

  Raises:
    ValueError: T, or the state, has more levels than there are weights.
    NotImplementedError: rows are in parts (``axis_name``), whose tokens do not know the blocks of those before.
  """
  if options.get("axis_name") is not None:
    raise NotImplementedError("log-linear attention takes rows that are whole, without axis_name")
  T, given = position.shape[1], initial_state is not None
  n = initial_state.shape[2] if given else levels_of(T)
  if n > weights.shape[3]:
    raise ValueError(f"{n} levels, but weights of {weights.shape[3]}")
  at = jax.lax.stop_gradient(position[..., 0]).astype(jnp.int32)
  v = inputs[write]
  wide = jnp.promote_types(v.dtype, jnp.float32)
  first = at[:, 0]

  def reads(level, t):
    """Whether a level has tokens that t reads: it is t itself, or t is in the second half of its block."""
    return (level == 0) | (t & ((1 << level) >> 1) > 0)

  if given:  # Levels that have no tokens are empty, whatever is there.
    has = reads(jnp.arange(n), first[:, None] - 1)
    held = jnp.where(has[:, None, :, None, None], initial_state, 0)

  def before(level):
    """What of v a level writes, its blocks' ids, and its states before the first token."""
    own = jnp.where(_like((level == 0) | ~reads(level, at), v), v, 0)
    ids = segments.runs(at >> level)
    if segment_ids is not None:
      ids += segments.runs(segment_ids)
    if not given:
      return own, ids, None
    # In the middle of a block: of its first half so far, which are the lower levels, or all of it, which is this one.
    lower = jnp.arange(n) < level
    lower = jnp.sum(jnp.where(lower[:, None, None], held, 0), axis=2)
    this = jax.lax.dynamic_index_in_dim(held, level, axis=2, keepdims=False)
    state = jnp.where(_like(reads(level, first - 1), this), this, lower)
    return own, ids, jnp.where(_like(first & ((1 << level) - 1) > 0, state), state, 0)

  def after(level, o, state):
    """A level's part of the outputs, and its states after the last token."""
    has = reads(level, at)
    weight = jax.lax.dynamic_index_in_dim(weights, level, axis=3)
    part = jnp.where(_like(has, o), weight * o.astype(wide), 0)
    return part, None if state is None else jnp.where(_like(has[:, -1], state), state, 0)

  def run(inputs, own, ids, state):
    inputs = inputs | {write: own}
    return core(
      **inputs, initial_state=state, return_state=return_state, segment_ids=ids, **options
    )

  if T == 1 and given:  # All levels in one step, as so many sequences.
    merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    own, ids, state = jax.tree.map(merge, jax.vmap(before)(jnp.arange(n)))
    every = jax.tree.map(lambda x: jnp.tile(x, (n, *[1] * (x.ndim - 1))), inputs)
    out = run(every, own, ids, state)
    o, state = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), out)
    parts, state = jax.vmap(after)(jnp.arange(n), o, state)
    o = jnp.sum(parts, axis=0)
  else:

    @jax.checkpoint
    def one(inputs, level):
      return after(level, *run(inputs, *before(level)))

    def body(o, level):
      part, state = one(inputs, level)
      return o + part, state

    o, state = jax.lax.scan(body, jnp.zeros(v.shape, wide), jnp.arange(n))
  return o.astype(v.dtype), jnp.moveaxis(state, 0, 2) if return_state else None


def _like(mask: Array, x: Array) -> Array:
  """A mask [B] or [B, T] with as many axes as x."""
  return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


def log_linear_ssd(x, dt, A, B, C, weights, position, **options):
  """Log-linear Mamba-2; without ``weights`` and ``position`` the arguments are ``ssd``'s."""

  def core(x, dt, B, C, **options):
    return ssd(x, dt, A, B, C, **options)

  return log_linear(core, dict(x=x, dt=dt, B=B, C=C), "x", weights, position, **options)


def log_linear_gated_delta_rule(q, k, v, g, beta, weights, position, **options):
  """Log-linear Gated DeltaNet: a level's state is decayed, and loses what it has under a key, by every later token."""
  inputs = dict(q=q, k=k, v=v, g=g, beta=beta)
  return log_linear(gated_delta_rule, inputs, "v", weights, position, **options)
