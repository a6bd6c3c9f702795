"""Finding the files of a data path, and splitting them or their rows into train and validation."""

import dataclasses
import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt64

from attnlab.errors import UserError

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class File:
  """A file of a data path.

  Attributes:
    path: where it is.
    name: relative to the data path's directory, with forward slashes: the same on every machine, so
      splits hash it.
    size: bytes.
    modified: when it was last written, nanoseconds.
  """

  path: Path
  name: str
  size: int
  modified: int


def find(spec: str, key: str, skip: re.Pattern[str] | None = None) -> list[File]:
  """The files of a path, sorted by name.

  Args:
    spec: a file, a directory (recursive, without hidden files) or a glob (`**` allowed).
    key: the config key it came from, for messages.
    skip: in a directory, leaves out the files and directories ("name/") whose relative names it
      finds itself in.

  Raises:
    UserError: nothing is there, or a file cannot be read.
  """
  path = Path(spec).expanduser()
  if path.is_dir():
    root, paths = path, _walk(path, skip)
    if not paths:
      raise UserError(f"{key}={spec!r}: the directory holds no files")
  elif path.exists():
    root, paths = path.parent, [path]
  elif glob.has_magic(spec):
    paths = [Path(p) for p in glob.glob(str(path), recursive=True) if not os.path.isdir(p)]
    root = _fixed_part(path)
    if not paths:
      raise UserError(f"{key}={spec!r}: no file matches")
  else:
    raise UserError(f"{key}={spec!r}: no such file or directory")
  files = [_file(p, root) for p in paths]
  return sorted(files, key=lambda file: file.name)


def _walk(root: Path, skip: re.Pattern[str] | None) -> list[Path]:
  out = []
  for directory, directories, names in os.walk(root):
    here = Path(directory)

    def kept(name: str, end: str, here: Path = here) -> bool:
      relative = (here / name).relative_to(root).as_posix() + end
      return not name.startswith(".") and not (skip and skip.search(relative))

    directories[:] = [d for d in directories if kept(d, "/")]
    out += [here / name for name in names if kept(name, "")]
  return out


def _fixed_part(pattern: Path) -> Path:
  """The directory before a glob's first magic part."""
  parts = pattern.parts
  first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
  return Path(*parts[:first]) if first else Path(".")


def _file(path: Path, root: Path) -> File:
  try:
    with open(path, "rb") as handle:
      stat = os.fstat(handle.fileno())
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  return File(path, path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns)


def in_validation(
  names: Sequence[str], rows: Sequence[int], fraction: float, key: str
) -> Bool[np.ndarray, " documents"]:
  """Which documents are validation: those whose hash of name and row falls below `fraction`.

  A document's side depends on its own name and row alone, so that adding data moves nothing, and
  every machine agrees. Only where chance would leave a side empty does the document nearest to the
  threshold change sides.

  Args:
    names: a name a file.
    rows: how many documents each file holds.
    fraction: of all documents, in expectation.
    key: the config key that the files came from, for messages.

  Returns:
    A mask over the files' documents, file after file.

  Raises:
    UserError: there are fewer than two documents.
  """
  parts = [_mix(_hash(n) + np.arange(r, dtype=np.uint64)) for n, r in zip(names, rows, strict=True)]
  hashes = np.concatenate([np.zeros(0, np.uint64), *parts])
  if hashes.size < 2:
    raise UserError(
      f"{key} holds {hashes.size} document(s), too few to keep some for validation: "
      "set config.data.validation"
    )
  mask = hashes < np.uint64(fraction * 2**64)
  if not mask.any():
    mask[hashes.argmin()] = True
  elif mask.all():
    mask[hashes.argmax()] = False
  return mask


def _hash(name: str) -> np.uint64:
  digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
  return np.frombuffer(digest, "<u8")[0]


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
  """splitmix64's finaliser: neighbouring rows get unrelated hashes."""
  with np.errstate(over="ignore"):  # Modulo 2^64, on purpose.
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def distinct(train: Sequence[File], validation: Sequence[File]) -> None:
  """Raises UserError if a file is in both lists."""
  both = {f.path.resolve() for f in train} & {f.path.resolve() for f in validation}
  if both:
    raise UserError(f"{min(both)} is in both config.data.train and config.data.validation")
