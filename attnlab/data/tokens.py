"""Shards that are already records or tokens: flat .npy and .bin files, and ArrayRecord."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, Int64

from attnlab.data.files import File
from attnlab.data.source import Source, decode, once, shifted
from attnlab.digest import digest
from attnlab.errors import UserError
from attnlab.tokenizer import Tokenizer

# Tokens a record of a flat shard, at least; more where rows are long, so that a record fills many
# rows.
PIECE_TOKENS = 1 << 18
# How much of the shards (bytes) is searched for ids past the vocabulary before training starts:
# some seconds. What lies beyond is checked when it is read.
CHECK_BYTES = 1 << 34


def check_ids(ids: np.ndarray, vocab_size: int, where: str, offset: int = 0) -> None:
  """Raises UserError, naming the first id outside [0, vocab_size).

  Args:
    ids: token ids, any integer type, one dimension.
    vocab_size: ids must be below it.
    where: names their source.
    offset: of their first in it.
  """
  if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
    bad = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
    raise UserError(
      f"{where}: token id {int(ids[bad])} at position {offset + bad} is outside the vocabulary of "
      f"{vocab_size}: set config.data.tokenizer (or config.data.vocab_size) to what the shards "
      "were made with"
    )


class FlatShards(Source):
  """Flat files of token ids, documents separated by an id.

  A record is a stretch of a file, so nothing need be read to find the documents.

  Each token is the target of the one before it, also across the edges of records. A document begins
  after every separator, whether shards put it before or after their documents, and at the start of a
  file: its first token is predicted from bos, as a text's is and as what follows a prompt will be. A
  bos that shards have there themselves is no target.

  Args:
    files: .npy of one dimension and an unsigned or signed integer type, or .bin of bare
      little-endian numbers.
    dtype: of .bin files, "uint16" or "uint32".
    bos_id: what the first token of a document is predicted from; it may be the separator.
    eos_id: the separator.
    vocab_size: ids must be below it.
    seq_len: tokens a row.
    side: None, or "train" or "validation" of a file that is alone: cut after the separator nearest
      to the end of its train part.
    fraction: of the tokens of a file that is alone that is validation.

  Raises:
    UserError: a file is not such a file, is empty, holds an id past the vocabulary, or cannot be
      cut.
  """

  def __init__(
    self,
    files: Sequence[File],
    *,
    dtype: str,
    bos_id: int,
    eos_id: int,
    vocab_size: int,
    seq_len: int,
    side: str | None = None,
    fraction: float = 0.0,
  ):
    if dtype not in ("uint16", "uint32"):
      raise UserError(f"config.data.token_dtype={dtype!r}: uint16 or uint32")
    self._files, self._dtype, self._vocab_size = files, dtype, vocab_size
    self.start_id, self._eos_id = bos_id, eos_id
    self._maps: dict[int, np.ndarray] = {}
    left = CHECK_BYTES
    for i, file in enumerate(files):
      self._map(i)
      if left > 0:
        once(_check_shard, file, dtype, vocab_size)
      left -= file.size
    piece = max(PIECE_TOKENS, 4 * seq_len)
    spans = []
    for i, file in enumerate(files):
      low, high = 0, len(self._map(i))
      if side is not None:
        cut = _cut(self._map(i), eos_id, fraction, file)
        low, high = (low, cut) if side == "train" else (cut, high)
      edges = np.append(np.arange(low, high, piece), high)
      spans += [(i, a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    self._spans: Int64[np.ndarray, "records 3"] = np.asarray(spans, np.int64).reshape(-1, 3)
    if not spans:
      raise UserError(f"all of {len(files)} shard(s), {files[0].path} first, are empty")

  def _map(self, number: int) -> np.ndarray:
    if number not in self._maps:
      self._maps[number] = _open_flat(self._files[number], self._dtype)
    return self._maps[number]

  def __len__(self) -> int:
    return len(self._spans)

  def pairs(self, i: int) -> Int32[np.ndarray, "n 2"]:
    number, start, stop = (int(x) for x in self._spans[i])
    shard = self._map(number)
    targets = shard[start:stop]
    check_ids(targets, self._vocab_size, str(self._files[number].path), start)
    out = np.empty((stop - start, 2), np.int32)
    out[:, 1] = targets
    out[1:, 0] = targets[:-1]
    out[0, 0] = shard[start - 1] if start else self._eos_id
    if self.start_id == self._eos_id:
      return out
    begins = out[:, 0] == self._eos_id
    out[begins, 0] = self.start_id
    kept = out[~(begins & (out[:, 1] == self.start_id))]
    return kept if len(kept) else out  # A record has a pair, though it were that bos alone.

  def name(self, i: int) -> str:
    number, start, stop = (int(x) for x in self._spans[i])
    return f"{self._files[number].path} tokens {start} to {stop}"

  def identity(self) -> str:
    names = (part for f in self._files for part in (f.name, f.size))
    return digest(self._dtype, self.start_id, *names, self._spans)

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_maps": {}}


def _open_flat(file: File, dtype: str) -> np.ndarray:
  if not file.size:
    return np.zeros(0, np.uint16)
  try:
    if file.path.suffix == ".npy":
      array = np.load(file.path, mmap_mode="r", allow_pickle=False)
    else:
      array = np.memmap(file.path, np.dtype(dtype).newbyteorder("<"), "r")
  except (OSError, ValueError) as error:
    raise UserError(f"{file.path} cannot be read as {file.path.suffix} tokens: {error}") from error
  if array.ndim != 1 or array.dtype.kind not in "ui":
    raise UserError(
      f"{file.path} holds {array.dtype} of shape {array.shape}, not integers of one dimension"
    )
  return array


def _check_shard(file: File, dtype: str, vocab_size: int) -> None:
  array = _open_flat(file, dtype)
  for start in range(0, len(array), 1 << 24):
    check_ids(array[start : start + (1 << 24)], vocab_size, str(file.path), start)


def _cut(array: np.ndarray, eos_id: int, fraction: float, file: File) -> int:
  """Where validation begins: after the separator next to 1 - fraction of the tokens."""
  at = int((1 - fraction) * len(array))
  for start in range(at, len(array) - 1, 1 << 24):
    found = np.flatnonzero(array[start : min(start + (1 << 24), len(array) - 1)] == eos_id)
    if found.size:
      return start + int(found[0]) + 1
  found = np.flatnonzero(array[:at] == eos_id)
  if not found.size:
    raise UserError(
      f"{file.path} has no separator {eos_id} (config.data.eos_id) to cut it into train and "
      "validation at: set config.data.validation"
    )
  return int(found[-1]) + 1


class ArrayRecords(Source):
  """ArrayRecord shards, a record a document: UTF-8 text, or little-endian int32 tokens.

  Args:
    files: in order.
    kind: "text" or "tokens".
    tokenizer: of the text; of tokens, its bos goes before each document and its eos after, where
      they are not there yet.
    vocab_size: ids of tokens must be below it.

  Raises:
    UserError: a file is not ArrayRecord, or all are empty.
  """

  def __init__(self, files: Sequence[File], kind: str, tokenizer: Tokenizer, vocab_size: int):
    if kind not in ("text", "tokens"):
      raise UserError(f"config.data.record={kind!r}: text or tokens")
    self._files, self._kind, self._tokenizer = files, kind, tokenizer
    self._vocab_size, self.start_id = vocab_size, tokenizer.bos_id
    self.rows_per_file = []
    try:
      for file in files:
        self.rows_per_file.append(len(grain.sources.ArrayRecordDataSource(str(file.path))))
      self._records = grain.sources.ArrayRecordDataSource([str(f.path) for f in files])
    except ImportError as error:
      raise UserError("ArrayRecord shards need array_record: pip install array_record") from error
    except (OSError, RuntimeError, ValueError) as error:
      raise UserError(f"{file.path} cannot be read as ArrayRecord: {error}") from error
    self._ends = np.cumsum(self.rows_per_file)
    self._rows = np.arange(self._ends[-1])
    if not len(self._rows):
      raise UserError(f"all of {len(files)} shard(s), {files[0].path} first, are empty")
    # One record a file shows a wrong config.data.record.
    for row in self._ends[np.asarray(self.rows_per_file) > 0] - 1:
      self._pairs_of(int(row))

  def keep(self, mask: np.ndarray) -> None:
    self._rows = self._rows[mask]

  def __len__(self) -> int:
    return len(self._rows)

  def pairs(self, i: int) -> Int32[np.ndarray, "n 2"]:
    return self._pairs_of(int(self._rows[i]))

  def _pairs_of(self, row: int) -> Int32[np.ndarray, "n 2"]:
    data, tok = self._records[row], self._tokenizer
    if self._kind == "text":
      return shifted(tok.encode(decode(data, self._name_of(row))), tok.bos_id, tok.eos_id)
    if len(data) % 4:
      raise UserError(
        f"{self._name_of(row)} has {len(data)} bytes, not whole int32 tokens "
        "(config.data.record='tokens')"
      )
    ids = np.frombuffer(data, "<i4")
    check_ids(ids, self._vocab_size, self._name_of(row))
    ids = ids[1:] if ids.size and ids[0] == tok.bos_id else ids
    ids = ids[:-1] if ids.size and ids[-1] == tok.eos_id else ids
    return shifted(ids, tok.bos_id, tok.eos_id)

  def _name_of(self, row: int) -> str:
    number = int(np.searchsorted(self._ends, row, side="right"))
    within = row - int(self._ends[number]) + self.rows_per_file[number]
    return f"{self._files[number].path} record {within}"

  def name(self, i: int) -> str:
    return self._name_of(int(self._rows[i]))

  def identity(self) -> str:
    names = (part for f in self._files for part in (f.name, f.size))
    return digest(self._kind, *names, self._rows)
