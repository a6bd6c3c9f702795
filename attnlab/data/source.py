"""What a source of documents is: random access to pairs (input, target), and names."""

import abc
import functools
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32, Int64

from attnlab.errors import UserError
from attnlab.tokenizer import Tokenizer


class Examples(Protocol):
  """What the pipeline reads, documents or a task: grain's random access, names, and an identity."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> dict[str, np.ndarray]: ...

  def name(self, i: int) -> str:
    """Where record i comes from, for people."""

  def identity(self) -> str:
    """Changes whenever the records do: a checkpoint of one source is refused by another."""


class Source(abc.ABC):
  """Documents as pairs of an input id and the id to predict from it.

  Attributes:
    start_id: an input of this id begins a document (inside a record too: token shards hold many
      documents a record).
    blocks: None, or the number of records in each stretch that is costly to open: shuffling then
      keeps to one at a time.
  """

  start_id: int
  blocks: Int64[np.ndarray, "blocks"] | None = None

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def pairs(self, i: int) -> Int32[np.ndarray, "n 2"]:
    """Record i, at least one pair."""

  @abc.abstractmethod
  def name(self, i: int) -> str: ...

  @abc.abstractmethod
  def identity(self) -> str: ...

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return {"tokens": self.pairs(i), "index": np.int32(i)}


class TextSource(Source):
  """Documents that are text: `bos t0 ... tn` predicts `t0 ... tn eos`, each token once."""

  def __init__(self, tokenizer: Tokenizer):
    self.tokenizer = tokenizer
    self.start_id = tokenizer.bos_id

  @abc.abstractmethod
  def text(self, i: int) -> str: ...

  def pairs(self, i: int) -> Int32[np.ndarray, "n 2"]:
    return shifted(
      self.tokenizer.encode(self.text(i)), self.tokenizer.bos_id, self.tokenizer.eos_id
    )


def shifted(ids: Int32[np.ndarray, " n"], bos_id: int, eos_id: int) -> Int32[np.ndarray, "n+1 2"]:
  out = np.empty((len(ids) + 1, 2), np.int32)
  out[0, 0], out[1:, 0] = bos_id, ids
  out[-1, 1], out[:-1, 1] = eos_id, ids
  return out


def decode(data: bytes, where: str, offset: int = 0) -> str:
  """UTF-8 bytes as text.

  Args:
    data: the bytes.
    where: names them in the error.
    offset: of their first byte, in whatever `where` names.

  Raises:
    UserError: names the offset of the first bad byte.
  """
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
      f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}"
    ) from error


@functools.cache
def once(check: Any, *args: Any) -> None:
  """Calls `check(*args)` the first time it is asked to; a check that raised is asked again."""
  check(*args)
