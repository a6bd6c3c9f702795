"""Where queries stand among keys, and where a document's blocks lie.

A document is a run of neighbouring keys, and its blocks are counted from its own first token, so that a document in a
packed row has the blocks that it has alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels import segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
  """A query sees the keys from its document's first to its own position.

  Attributes:
    positions: the key that each query stands at; -1: at none, it sees nothing.
    starts: the first key of each query's document. One that is later than the query's position hides all keys: so it is
      with padding on the left of a prompt.
    aligned: every document starts at the first key.
  """

  positions: Int[Array, " Tq"]
  starts: Int[Array, "B Tq"]
  aligned: bool = dataclasses.field(default=False, metadata=dict(static=True))

  @classmethod
  def together(cls, batch: int, length: int, segment_ids: Int[Array, "B T"] | None) -> "Layout":
    """Queries and keys are the same tokens, in documents that are runs of equal ids."""
    columns = jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
      return cls(columns, jnp.zeros((batch, length), jnp.int32), True)
    runs = segments.runs(segment_ids)
    new = jnp.pad(runs[:, 1:] != runs[:, :-1], ((0, 0), (1, 0)))
    return cls(columns, jax.lax.cummax(jnp.where(new, columns, 0), axis=1))

  @classmethod
  def cached(cls, positions: Int[Array, " Tq"], starts: Int[Array, " B"]) -> "Layout":
    """Queries meet a cache that holds one document a row, from key ``starts[b]`` on."""
    shape = (starts.shape[0], positions.shape[0])
    return cls(positions, jnp.broadcast_to(starts[:, None], shape))

  @property
  def within(self) -> Int[Array, "B Tq"]:
    """The queries' positions in their documents, from 0; negative where a query sees nothing."""
    return jnp.where(self.positions >= 0, self.positions - self.starts, -1)

  def complete(self, size: int, stride: int) -> Int[Array, "B Tq"]:
    """How many blocks of ``size`` tokens, one each ``stride``, end in a query's document up to the query."""
    return jnp.maximum((self.within + 1 - size) // stride + 1, 0)

  def table(self, size: int, stride: int) -> tuple[Int[Array, "B N"], Int[Array, "B T"]]:
    """All complete blocks of the documents of a row, in the order of time, where queries and keys are the same tokens.

    There are at most ``T // stride`` of them, however many documents there are, if ``stride <= size``.

    Returns:
      The first key of each, -1 where there is no such block, and the number in this table of the first block of each
      token's document.
    """
    T = self.positions.shape[0]
    ends = (self.within + 1 >= size) & ((self.within + 1 - size) % stride == 0)
    so_far = jnp.cumsum(ends, axis=1, dtype=jnp.int32)
    first = so_far - self.complete(size, stride)
    wanted = 1 + jnp.arange(max(T // stride, 1), dtype=jnp.int32)
    last = jax.vmap(lambda row: jnp.searchsorted(row, wanted))(so_far)
    return jnp.where(last < T, last - size + 1, -1).astype(jnp.int32), first
