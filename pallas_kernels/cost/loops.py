"""How often loops run that the data decide on: those of block-sparse attention, for blocks that are chosen at random.

Of a query the first block and the last two are chosen, as NSA's are, and the others anywhere before them, whatever its
neighbours have chosen: no choice makes tiles of queries visit more blocks.
"""

import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.block_sparse import tpu, tpu_by_query
from pallas_kernels.block_sparse import tpu_tiles as tiles
from pallas_kernels.block_sparse.layout import Layout
from pallas_kernels.block_sparse.reference import Blocks
from pallas_kernels.block_sparse.shapes import Shape

# Tiles that are looked at, of all.
_TILES = 32


def choices(s: Shape, queries: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """[queries, top_k]: the blocks of one group, ascending, -1 where there are not so many."""
  out = np.full((len(queries), s.top_k), -1)
  for i, current in enumerate(queries // s.block_size):
    forced = sorted({0, max(current - 1, 0), current})
    others = rng.permutation(np.arange(1, max(current - 1, 1)))[: s.top_k - len(forced)]
    found = sorted([*forced, *others])[: s.top_k]
    out[i, : len(found)] = found
  return out


def block_sparse(s: Shape, q, k, v, indices) -> dict[str, float]:
  """Of the kernels of a call on the chip that is traced for."""
  T = q.shape[1]
  blocks = Blocks(indices, Layout.together(1, T, None), s.block_size)
  out, kernels = {}, [("backward", True)]
  if tpu.by_query(q, blocks):  # which says itself how often it loops, but for ranges of keys
    p = tpu_by_query.Plan.of(q, k, v, blocks, dispatch.vmem())
    if p.ranges > 1:
      out["block_sparse_forward"] = _matrices(p, s, T)
  else:
    kernels.append(("forward", False))
  for name, backward in kernels:
    p = tiles.Plan.of(q, k, v, blocks, dispatch.vmem(), backward)
    rng = np.random.default_rng(0)
    starts = np.arange(0, T, p.tile)
    found = []
    for start in starts[:: max(len(starts) // _TILES, 1)]:
      found += _items(p, s, choices(s, np.arange(start, min(start + p.tile, T)), rng))
    out[f"block_sparse_{name}"] = float(np.mean(found))
  return out


def _matrices(p: tpu_by_query.Plan, s: Shape, T: int) -> float:
  """Of each range and some queries together: the most matrices of any."""
  n = tpu_by_query.TOGETHER
  starts = np.linspace(0, T - n, 64 * _TILES).astype(int)
  queries = (starts[:, None] + np.arange(n)).reshape(-1)
  chosen = choices(s, queries, np.random.default_rng(0))
  ranges = np.where(chosen >= 0, chosen * s.block_size // p.keys, -1)
  counts = np.stack([np.sum(ranges == r, axis=1) for r in range(p.ranges)])
  return float(np.mean(-(-counts.reshape(p.ranges, -1, n).max(axis=2) // p.width)))


def _items(p: tiles.Plan, s: Shape, chosen: np.ndarray) -> list[int]:
  """Of each range: the steps over a tile's items."""
  unit = np.repeat(np.arange(len(chosen)) // p.unit, s.top_k)
  block = chosen.reshape(-1)
  visits = np.unique(np.stack([block, unit])[:, block >= 0], axis=1)
  numbers, count = np.unique(visits[0], return_counts=True)
  # The pieces of a long block have a loop of their own.
  pieces, together = (1, 1) if p.long else (p.span // p.piece, tiles.TOGETHER)
  items = -(-count // p.most) * pieces
  r = numbers * s.block_size // p.keys
  return [-(-items[r == i].sum() // together) for i in range(p.ranges)]
