"""Text files and JSON lines as documents, read when they are asked for."""

import codecs
import json
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from attnlab.data import files as files_lib
from attnlab.data.files import File
from attnlab.data.source import TextSource, decode, once
from attnlab.digest import digest
from attnlab.errors import UserError
from attnlab.tokenizer import Tokenizer

# A text file longer than this (bytes) is read in pieces, each a document of its own: bounded
# memory, and a shuffle that reaches inside one large file. Longer where rows are, so that a piece
# fills many rows.
PIECE_BYTES = 1 << 20
# How much is read through before training starts, in search of bytes that are not UTF-8 and lines
# that are not JSON with a text: some seconds. What lies beyond is checked when it is read.
CHECK_TEXT_BYTES = 1 << 33
CHECK_JSON_BYTES = 1 << 29
# How much is searched for lines at a time.
_READ_BYTES = 1 << 24
_BLANK = np.array([not bytes([b]).strip() for b in range(256)])  # by byte

# Parts of the standard library that many systems ship apart, and files that are generated tables
# rather than prose or code: without them every machine has nearly the same text.
_STDLIB_EXCLUDED = re.compile(
  r"(^|/)(tests?|idle_test|site-packages|dist-packages|__pycache__)/"
  r"|^(distutils|ensurepip|idlelib|lib2to3|tkinter|turtledemo|venv|config-[^/]*)/"
  r"|^(encodings|pydoc_data|__phello__)/|^(_sysconfigdata|sitecustomize|usercustomize)"
  r"|^html/entities\.py$"
  r"|(^|/)[^/]+(?<!\.py)$"
)


def stdlib_files() -> list[File]:
  """The sources of Python's standard library, about 7 MB: real text that every machine has.

  Raises:
    UserError: this Python came without sources.
  """
  root = Path(sysconfig.get_paths()["stdlib"])
  files = []
  if root.is_dir():
    files = files_lib.find(str(root), "the standard library", _STDLIB_EXCLUDED)
  if not files:
    raise UserError(
      f"config.data.train is empty and {root} holds no Python sources: set config.data.train"
    )
  return files


class TextFiles(TextSource):
  """Text files, each a document, or several where it is long. Empty files are skipped.

  Args:
    files: in order.
    tokenizer: of the text.
    seq_len: tokens a row.
    start: fraction of the files' bytes from which on they are read: pieces of a file alone, cut in
      two.
    stop: fraction up to which they are read.

  Raises:
    UserError: a file is not UTF-8, or all are empty.
  """

  def __init__(
    self,
    files: Sequence[File],
    tokenizer: Tokenizer,
    seq_len: int,
    start: float = 0.0,
    stop: float = 1.0,
  ):
    super().__init__(tokenizer)
    self._files = files
    piece = max(PIECE_BYTES, 16 * seq_len)
    spans = []
    for i, file in enumerate(files):
      low, high = int(start * file.size), int(stop * file.size)
      edges = np.append(np.arange(low, high, piece), high)
      spans += [(i, a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    self._spans: Int64[np.ndarray, "records 3"] = np.asarray(spans, np.int64).reshape(-1, 3)
    if not spans:
      raise UserError(
        f"{files[0].path} and the other {len(files) - 1} file(s) are empty, or too short to keep "
        "some for validation"
      )
    left = CHECK_TEXT_BYTES
    for file in files:
      if left > 0:
        once(_check_utf8, file)
      left -= file.size

  def __len__(self) -> int:
    return len(self._spans)

  def text(self, i: int) -> str:
    number, start, stop = (int(x) for x in self._spans[i])
    file = self._files[number]
    # A span's ends may fall inside a character: the character belongs to the span that it starts
    # in.
    data = _read(file, start, min(stop + 3, file.size))
    low, high = 0, stop - start
    if start:
      low = _continuation(data, 0)
    high += _continuation(data, high)
    return decode(data[low:high], str(file.path), start + low)

  def name(self, i: int) -> str:
    number, start, stop = (int(x) for x in self._spans[i])
    file = self._files[number]
    whole = start == 0 and stop == file.size
    return str(file.path) if whole else f"{file.path} bytes {start} to {stop}"

  def identity(self) -> str:
    return digest(*(part for f in self._files for part in (f.name, f.size)), self._spans)


def _read(file: File, start: int, stop: int) -> bytes:
  try:
    with open(file.path, "rb") as handle:
      handle.seek(start)
      return handle.read(stop - start)
  except OSError as error:
    raise UserError(f"cannot read {file.path}: {error.strerror}") from error


def _continuation(data: bytes, at: int) -> int:
  """How many of at most 3 bytes from `at` on continue a UTF-8 character."""
  n = 0
  while n < 3 and at + n < len(data) and data[at + n] & 0xC0 == 0x80:
    n += 1
  return n


def _check_utf8(file: File) -> None:
  decoder = codecs.getincrementaldecoder("utf-8")()
  done = 0
  while done < file.size:
    data = _read(file, done, done + (1 << 20))
    if not data:
      raise UserError(f"{file.path} shrank from {file.size} to {done} bytes while it was read")
    held = len(decoder.getstate()[0])
    try:
      decoder.decode(data, final=done + len(data) >= file.size)
    except UnicodeDecodeError as error:
      bad = error.object[error.start]
      raise UserError(
        f"{file.path} is not UTF-8: byte {bad:#04x} at offset {done - held + error.start}"
      ) from error
    done += len(data)


class JsonLines(TextSource):
  """Lines of JSON objects, each with its document under one key. Blank lines are skipped.

  Args:
    files: in order.
    key: field of the text.
    tokenizer: of the text.

  Raises:
    UserError: names file:line of a line that is not an object with a text under `key`.
  """

  def __init__(self, files: Sequence[File], key: str, tokenizer: Tokenizer):
    super().__init__(tokenizer)
    self._files, self._key = files, key
    parts = [_lines(i, file) for i, file in enumerate(files)]
    # Columns: file, first byte, end byte, line (from 1).
    self._rows: Int64[np.ndarray, "records 4"] = np.concatenate(parts)
    self.rows_per_file = [len(p) for p in parts]
    if not len(self._rows):
      raise UserError(f"all of {len(files)} file(s), {files[0].path} first, are empty")
    left = CHECK_JSON_BYTES
    for file in files:
      if left > 0:
        once(_check_json, file, key)
      left -= file.size

  def keep(self, mask: np.ndarray) -> None:
    self._rows = self._rows[mask]

  def __len__(self) -> int:
    return len(self._rows)

  def text(self, i: int) -> str:
    number, start, stop, line = (int(x) for x in self._rows[i])
    file = self._files[number]
    return _text_of(_read(file, start, stop), self._key, f"{file.path}:{line}")

  def name(self, i: int) -> str:
    return f"{self._files[self._rows[i, 0]].path}:{self._rows[i, 3]}"

  def identity(self) -> str:
    return digest(self._key, *(f.name for f in self._files), self._rows)


def _lines(number: int, file: File) -> Int64[np.ndarray, "lines 4"]:
  """Byte ranges of a file's lines that are not blank."""
  ends: list[np.ndarray] = []
  filled = [np.zeros(0, np.int64)]  # Lines with something in them; twice where a read ends in one.
  for start in range(0, file.size, _READ_BYTES):
    data = np.frombuffer(_read(file, start, start + _READ_BYTES), np.uint8)
    breaks = np.flatnonzero(data == ord("\n"))
    begins, stops = np.append(0, breaks + 1), np.append(breaks, len(data))
    lines = np.flatnonzero(stops > begins)
    doubtful = _BLANK[data[begins[lines]]]  # Nearly all lines begin with what is no blank.
    blank = [i for i in lines[doubtful] if not bytes(data[begins[i] : stops[i]]).strip()]
    filled.append(
      np.setdiff1d(lines, np.array(blank, np.int64), assume_unique=True) + sum(map(len, ends))
    )
    ends.append(breaks + start)
  stop = np.concatenate([*ends, [file.size]]).astype(np.int64)
  start = np.concatenate([[0], stop[:-1] + 1]).astype(np.int64)
  line = np.arange(1, len(stop) + 1)
  rows = np.stack([np.full_like(stop, number), start, stop, line], axis=1)
  kept = np.zeros(len(rows), bool)
  kept[np.concatenate(filled)] = True
  return rows[kept]


def _text_of(data: bytes, key: str, where: str) -> str:
  text = decode(data, where)
  try:
    record = json.loads(text)
  except ValueError as error:
    raise UserError(f"{where} is not JSON: {error}") from error
  if not isinstance(record, dict):
    raise UserError(f"{where} is not a JSON object but a {type(record).__name__}")
  if key not in record:
    raise UserError(f"{where} has no field {key!r} (config.data.text_key); it has {sorted(record)}")
  if not isinstance(record[key], str):
    raise UserError(
      f"{where}: field {key!r} (config.data.text_key) is a {type(record[key]).__name__}, not a text"
    )
  return record[key]


def _check_json(file: File, key: str) -> None:
  done = 0
  with open(file.path, "rb") as handle:
    for line, data in enumerate(handle, 1):
      if data.strip():
        _text_of(data, key, f"{file.path}:{line}")
      done += len(data)
      if done > CHECK_JSON_BYTES:
        return
