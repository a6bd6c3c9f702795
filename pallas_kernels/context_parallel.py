"""Context parallelism: rows whose tokens are on several devices, each of which has the next part of every row.

Within ``jax.shard_map``, ``axis_name`` is the mesh axis of the parts. What looks a few tokens back takes them from the
part before; what carries a state composes what the parts do to it (``linear_recurrence/parts.py``).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped


def tokens_before(
  x: Shaped[Array, "B T ..."],
  count: int,
  axis_name: str,
  initial: Shaped[Array, "B count ..."],
  segment_ids: Int[Array, "B T"] | None = None,
) -> Shaped[Array, "B count ..."]:
  """The last tokens of the part before each part, zero where they are not of its first token's segment.

  Args:
    count: how many, at most T.
    initial: what is before the first part.
  """
  if count > x.shape[1]:
    raise ValueError(
      f"a part of {x.shape[1]} tokens has no {count} for the next one: rows need longer parts"
    )
  before = from_before(x[:, x.shape[1] - count :], axis_name)
  if segment_ids is not None:
    ids = from_before(segment_ids[:, segment_ids.shape[1] - count :], axis_name)
    ids = jnp.concatenate([ids, segment_ids[:, :1]], axis=1)
    # From the part's first token back: until the first change.
    alike = jnp.cumprod((ids[:, 1:] == ids[:, :-1])[:, ::-1], axis=1)[:, ::-1]
    alike = alike.reshape(*alike.shape, *(1,) * (x.ndim - 2))
    before = jnp.where(alike == 1, before, 0)
  return jnp.where(lax.axis_index(axis_name) == 0, initial.astype(x.dtype), before)


def previous(
  x: Shaped[Array, "B T ..."], first: Shaped[Array, "B 1 ..."], axis_name: str | None = None
) -> Shaped[Array, "B T ..."]:
  """The token before each token; ``first`` before a row's first. With an axis rows are in parts."""
  if axis_name is not None:
    first = tokens_before(x, 1, axis_name, first)
  return jnp.concatenate([first.astype(x.dtype), x[:, :-1]], axis=1)


def of_last(x: Array, axis_name: str | None) -> Array:
  """The last part's x, on every device; without an axis x itself."""
  if axis_name is None:
    return x
  is_last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
  return lax.psum(jnp.where(is_last, x, 0), axis_name)


def from_before(x: Array, axis_name: str) -> Array:
  """The x of the part before; zero for the first."""
  n = lax.axis_size(axis_name)
  return lax.ppermute(x, axis_name, [(i, i + 1) for i in range(n - 1)])
