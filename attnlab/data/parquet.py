"""Parquet files with a column of text, and a shuffle that opens one row group at a time."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int64

from attnlab.data.files import File
from attnlab.data.source import TextSource
from attnlab.digest import digest
from attnlab.errors import UserError
from attnlab.tokenizer import Tokenizer


class Parquet(TextSource):
  """Rows of Parquet files, each a document in one string column. A null is an empty document.

  Parquet is compressed by row groups and reads nothing smaller. So the shuffle goes by row groups
  (`blocks`), and the last two that were read stay in memory. With many processes, ArrayRecord
  (source "tokens") is the better format: here each process opens every row group for its share of
  the rows.

  Args:
    files: in order.
    key: column of the text.
    tokenizer: of the text.

  Raises:
    UserError: pyarrow is missing, a file is not Parquet, or has no such column of strings.
  """

  def __init__(self, files: Sequence[File], key: str, tokenizer: Tokenizer):
    super().__init__(tokenizer)
    self._files, self._key = files, key
    groups = []
    for i, file in enumerate(files):
      opened = _open(file)
      schema = opened.schema_arrow
      if key not in schema.names:
        raise UserError(
          f"{file.path} has no column {key!r} (config.data.text_key); it has {schema.names}"
        )
      kind = str(schema.field(key).type)
      if kind not in ("string", "large_string", "string_view"):
        raise UserError(f"{file.path}: column {key!r} (config.data.text_key) is {kind}, not string")
      for j in range(opened.num_row_groups):
        groups.append((i, j, opened.metadata.row_group(j).num_rows))
    # Columns: file, row group in it, rows.
    self._groups: Int64[np.ndarray, "groups 3"] = np.asarray(groups, np.int64).reshape(-1, 3)
    self.rows_per_file = np.bincount(self._groups[:, 0], self._groups[:, 2], len(files)).astype(
      np.int64
    )
    self.keep(np.ones(self._groups[:, 2].sum(), bool))

  def keep(self, mask: np.ndarray) -> None:
    """Keeps the rows of a mask over all rows of all files."""
    if not mask.any():
      raise UserError(f"all of {len(self._files)} file(s), {self._files[0].path} first, are empty")
    rows = self._groups[:, 2]
    group = np.repeat(np.arange(len(rows)), rows)[mask]
    within = (np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows))[mask]
    self._rows: Int64[np.ndarray, "records 2"] = np.stack([group, within], axis=1)
    counts = np.bincount(group, minlength=len(rows))
    self.blocks = counts[counts > 0]
    self._open()

  def _open(self) -> None:
    self._lock = threading.Lock()
    self._column = functools.lru_cache(maxsize=2)(self._read_column)

  def _read_column(self, group: int) -> Any:
    number, index, _ = (int(x) for x in self._groups[group])
    file = self._files[number]
    try:
      return _open(file).read_row_group(index, columns=[self._key]).column(0)
    except (OSError, ValueError) as error:
      raise UserError(f"{file.path}: row group {index} cannot be read: {error}") from error

  def __len__(self) -> int:
    return len(self._rows)

  def text(self, i: int) -> str:
    group, within = (int(x) for x in self._rows[i])
    with self._lock:  # Many threads ask for rows of one group at once: one of them reads it.
      column = self._column(group)
    return column[within].as_py() or ""

  def name(self, i: int) -> str:
    group, within = (int(x) for x in self._rows[i])
    number, index, _ = (int(x) for x in self._groups[group])
    return f"{self._files[number].path} row group {index} row {within}"

  def identity(self) -> str:
    names = (part for f in self._files for part in (f.name, f.size))
    return digest(self._key, *names, self._groups, self._rows)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_column")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()


def _open(file: File) -> Any:
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(f"reading {file.path} needs pyarrow: pip install pyarrow") from error
  try:
    return pyarrow.parquet.ParquetFile(file.path)
  except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError.
    raise UserError(f"{file.path} is not a Parquet file: {error}") from error


class ShuffleBlocks(grain.MapDataset):
  """Shuffles blocks of neighbouring records, and the records within each block, anew every epoch.

  Args:
    parent: the records, block after block.
    blocks: records in each block, all at least 1.
    seed: of the order.
  """

  _MUTATES_ELEMENT_SPEC = False

  def __init__(self, parent: grain.MapDataset, blocks: Int64[np.ndarray, " blocks"], seed: int):
    super().__init__(parent)
    self._blocks, self._seed = blocks, seed
    self._first = np.cumsum(blocks) - blocks
    self._bytes = blocks.astype(np.int64).tobytes()

  def __len__(self) -> int:
    return len(self._parent)

  def __str__(self) -> str:
    return f"ShuffleBlocks({len(self._blocks)} blocks)"

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    epoch, index = divmod(index, len(self))
    order, ends = _epoch_order(self._seed, epoch, self._bytes)
    place = int(np.searchsorted(ends, index, side="right"))
    block = int(order[place])
    size = int(self._blocks[block])
    seed = int(np.random.SeedSequence([self._seed, epoch, block]).generate_state(1)[0])
    within = index_shuffle(
      int(index - (ends[place] - size)), max_index=size - 1, seed=seed, rounds=4
    )
    return self._parent[int(self._first[block]) + within]


@functools.lru_cache(maxsize=4)
def _epoch_order(
  seed: int, epoch: int, blocks: bytes
) -> tuple[Int64[np.ndarray, " blocks"], Int64[np.ndarray, " blocks"]]:
  sizes = np.frombuffer(blocks, np.int64)
  order = np.random.default_rng([seed, epoch]).permutation(len(sizes))
  return order, np.cumsum(sizes[order])
