"""Which keys a query sees, before any block structure."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
  """A query sees a key of its segment, not after it, and less than ``window`` before it.

  Attributes:
    query_positions: of the queries on the line of time that both share.
    key_positions: of the keys; one that is negative is seen by none.
    query_segments, key_segments: equal where a query may see a key; None: everywhere.
    window: how many positions a query sees, its own included; None: all up to its own.
    aligned: query t and key t are the same token, and positions count up from 0: what libraries' kernels take.
    apart: segments of keys were given beside those of queries, so that a query may not see its own token, nor any.
  """

  query_positions: Int[Array, " Tq"]
  key_positions: Int[Array, " Tk"]
  query_segments: Int[Array, "B Tq"] | None = None
  key_segments: Int[Array, "B Tk"] | None = None
  window: int | None = dataclasses.field(default=None, metadata=dict(static=True))
  aligned: bool = dataclasses.field(default=False, metadata=dict(static=True))
  apart: bool = dataclasses.field(default=False, metadata=dict(static=True))

  def mask(self) -> Bool[Array, "#B Tq Tk"]:
    """True where the query sees the key."""
    queries, keys = self.query_positions[:, None], self.key_positions
    seen = (keys >= 0) & (keys <= queries)
    if self.window is not None:
      seen &= keys > queries - self.window
    if self.query_segments is None:
      return seen[None]
    return seen & (self.query_segments[:, :, None] == self.key_segments[:, None, :])
