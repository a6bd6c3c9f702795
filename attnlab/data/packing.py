"""Documents to rows of one length, and rows to batches.

Documents are laid end to end and the line is cut every `seq_len` tokens (grain's ConcatThenSplit):
no padding but in the last row of a finite pass, and a document that does not fit goes on in the
next row, as a segment of its own whose positions begin at 0 again. Every pair (input, target) lies
in exactly one row, and a pair never spans two documents: the last target of a document is its
end-of-document token, so no weight is lost at edges.
"""

import functools
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]


class _Row(grain.transforms.Map):
  def map(self, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
      "tokens": row["tokens"],
      "first": row["tokens_positions"] == 0,
      "used": row["tokens_segment_ids"] > 0,
      "index": row["index"][0],
    }


def pack(documents: grain.IterDataset, seq_len: int) -> grain.IterDataset:
  """Packs records {"tokens": int32 [n, 2], "index": int32} into rows.

  Args:
    documents: the records, n >= 1.
    seq_len: pairs a row.

  Returns:
    Rows {"tokens": int32 [T, 2], "first": bool [T], where a record begins or goes on from the row
    before; "used": bool [T], False at padding; "index": int32, of the row's first record}.
  """
  # index rides along as a meta feature: one a record, never cut. A row holds at most seq_len
  # records; the one more is the record at its end that does not fit any more.
  lengths = {"tokens": seq_len, "index": seq_len + 1}
  rows = grain.experimental.ConcatThenSplitIterDataset(
    documents, length_struct=lengths, meta_features=("index",)
  )
  return rows.map(_Row())


class ToBatch(grain.transforms.Map):
  """Packed rows, stacked to [B, T, ...], to a batch.

  A segment begins where a record does, and inside a record after a separator (token shards).
  """

  def __init__(self, start_id: int):
    self._start_id = start_id

  def map(self, rows: dict[str, np.ndarray]) -> Batch:
    inputs, targets = (np.ascontiguousarray(rows["tokens"][:, :, i]) for i in (0, 1))
    used = rows["used"]
    start = used & (rows["first"] | (inputs == self._start_id))
    place = np.arange(inputs.shape[1], dtype=np.int32)
    began = np.maximum.accumulate(np.where(start, place, 0), axis=1)
    return {
      "inputs": inputs,
      "targets": targets,
      "weights": used.astype(np.float32),
      "segment_ids": np.cumsum(start, axis=1, dtype=np.int32) * used,
      "positions": (place - began) * used,
      "index": rows["index"],
    }


class TakeRows(grain.transforms.Map):
  """A share of the global batch's rows."""

  def __init__(self, start: int, stop: int):
    self._slice = slice(start, stop)

  def map(self, batch: Batch) -> Batch:
    return {k: v[self._slice] for k, v in batch.items()}


class MarkPadding(grain.transforms.Map):
  """Index -1 for the rows that fill up a last batch."""

  def map(self, batch: Batch) -> Batch:
    return batch | {"index": np.where(batch["segment_ids"].any(1), batch["index"], np.int32(-1))}


def batched(rows: grain.IterDataset, batch_size: int, *, pad: bool) -> grain.IterDataset:
  """Stacks rows; with `pad`, fills up a last batch with rows of zeros."""
  if not pad:
    return rows.batch(batch_size, drop_remainder=True)
  fill: Any = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
  return rows.batch(batch_size, batch_fn=fill)
