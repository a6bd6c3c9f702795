"""Segments of a packed batch, as every kernel here sees them."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels import context_parallel


def runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """The number of segment changes up to each token.

  Equal for two tokens exactly where no change lies between them, whatever the ids are: an id that
  comes back later in a row is a new segment. The first segment of every row is run 0, to which an
  initial state belongs.
  """
  # As ``starts``, of which XLA made a copy here.
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def starts(segment_ids: Int[Array, "B T"], axis_name: str | None = None) -> Bool[Array, "B T"]:
  """Whether a segment begins with a token; not with a row's first, to which an initial state belongs.

  With ``axis_name`` rows are in parts (``context_parallel``).
  """
  return segment_ids != context_parallel.previous(segment_ids, segment_ids[:, :1], axis_name)
