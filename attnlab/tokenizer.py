"""Tokenizers: bytes, any `tokenizer.json`, and plain ids.

All have the same small interface (`Tokenizer`). `vocab_size` is the size of the model's embedding:
the number of ids rounded up to a multiple of 64, so that it divides over a mesh and fills a matrix
unit. The ids that rounding adds are never produced by `encode` and are dropped by `decode`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from attnlab.errors import UserError

VOCAB_MULTIPLE = 64

# Names that published tokenizers give to their end and beginning of a text, tried in this order
# where no tokenizer_config.json beside the tokenizer.json says which it is.
_EOS_NAMES = (
  *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]"),
  *("<｜end▁of▁sentence｜>", "<|return|>"),
)
_BOS_NAMES = (
  *("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "[CLS]"),
  "<｜begin▁of▁sentence｜>",
)


@runtime_checkable
class Tokenizer(Protocol):
  """Text to ids and back.

  Attributes:
    ids: how many there are.
    vocab_size: that rounded up: the size of the embedding and of the logits, if a model has no other.
    bos_id: the first input of every document; never part of a text's own ids. -1: there are no
      documents, and none begins or ends: a task's.
    eos_id: the last target of every document. The same as bos_id where a tokenizer has one
      separator for both, or none.
  """

  ids: int
  vocab_size: int
  bos_id: int
  eos_id: int

  def encode(self, text: str) -> Int32[np.ndarray, " n"]:
    """The ids of a text, without bos and eos."""

  def decode(self, ids: Iterable[int | np.integer]) -> str:
    """The text of any ids: specials and unused ids are dropped, broken UTF-8 becomes U+FFFD."""

  def token_bytes(self) -> Int32[np.ndarray, " vocab_size"]:
    """Bytes of UTF-8 text that each id stands for (0: specials and unused ids).

    Bits per byte of a batch is then `sum(nats * weights) / ln 2 / sum(token_bytes[targets] *
    weights)`.
    """


def round_vocab(size: int) -> int:
  return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class ByteTokenizer:
  """256 bytes, then bos 256, eos 257 and pad 258; embedding of 320."""

  bos_id = 256
  eos_id = 257
  pad_id = 258
  ids = 259
  vocab_size = round_vocab(ids)

  def encode(self, text: str) -> Int32[np.ndarray, " n"]:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def decode(self, ids: Iterable[int | np.integer]) -> str:
    ids = np.asarray(list(ids), np.int64)
    return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace")

  def token_bytes(self) -> Int32[np.ndarray, "vocab_size"]:
    return (np.arange(self.vocab_size) < 256).astype(np.int32)


class JsonTokenizer:
  """A `tokenizer.json` of the Hugging Face format, through the `tokenizers` library.

  Text is encoded as text: a document in which the characters "<|endoftext|>" stand does not end
    there.

  Args:
    path: the tokenizer.json. A tokenizer_config.json beside it names its bos and eos.
    eos_id: id that separates documents, as bos and as eos; -1: the tokenizer's own bos and eos.

  Raises:
    UserError: the library, the file or the tokenizer's end of text is missing, or the file is
      broken.
  """

  def __init__(self, path: str, eos_id: int = -1):
    try:
      import tokenizers
    except ImportError as error:
      raise UserError(
        f"config.data.tokenizer={path!r} needs the tokenizers library: pip install tokenizers"
      ) from error
    if not Path(path).is_file():
      raise UserError(
        f"config.data.tokenizer={path!r}: no such file (give 'bytes' or a tokenizer.json)"
      )
    self.path = path
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(path)
    except (
      Exception
    ) as error:  # The library raises bare Exception for whatever is wrong with a file.
      raise UserError(f"config.data.tokenizer={path!r} is not a tokenizer.json: {error}") from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    self._vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    self.ids = 1 + max(self._vocab.values(), default=0)
    self.vocab_size = round_vocab(self.ids)
    if eos_id >= self.ids:
      raise UserError(f"config.data.eos_id={eos_id} is not below the {self.ids} ids of {path!r}")
    if eos_id >= 0:
      self.eos_id = self.bos_id = eos_id
    else:
      named = self._named_specials()
      self.eos_id = self._special("eos_token", named, _EOS_NAMES)
      if self.eos_id is None:
        specials = [t.content for t in self._tokenizer.get_added_tokens_decoder().values()]
        raise UserError(
          f"config.data.tokenizer={path!r} does not say which token ends a text: set "
          f"config.data.eos_id (its special tokens: {', '.join(map(repr, specials[:20])) or 'none'})"
        )
      bos_id = self._special("bos_token", named, _BOS_NAMES)
      self.bos_id = self.eos_id if bos_id is None else bos_id

  def _named_specials(self) -> dict[str, Any]:
    path = Path(self.path).with_name("tokenizer_config.json")
    try:
      named = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
      raise UserError(f"{path}: not readable as JSON: {error}") from error
    return named if isinstance(named, dict) else {}

  def _special(self, key: str, named: dict[str, Any], usual: Iterable[str]) -> int | None:
    name = named.get(key)
    if isinstance(name, dict):  # An AddedToken written out.
      name = name.get("content")
    for candidate in (name, *usual):
      if candidate in self._vocab:
        return self._vocab[candidate]
    return None

  def encode(self, text: str) -> Int32[np.ndarray, " n"]:
    return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

  def decode(self, ids: Iterable[int | np.integer]) -> str:
    ids = [int(i) for i in ids if 0 <= int(i) < self.ids]
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def token_bytes(self) -> Int32[np.ndarray, " vocab_size"]:
    out = np.zeros(self.vocab_size, np.int32)
    byte_level = '"ByteLevel"' in self._tokenizer.to_str()
    for token, i in self._vocab.items():
      if byte_level:  # Such a vocabulary is written with one character a byte.
        out[i] = len(token)
      elif len(token) == 6 and token.startswith("<0x"):  # Byte fallback.
        out[i] = 1
      else:
        out[i] = len(token.replace("▁", " ").encode("utf-8"))
    for i, token in self._tokenizer.get_added_tokens_decoder().items():
      out[i] = 0 if token.special else len(token.content.encode("utf-8"))
    return out

  def __getstate__(self) -> dict[str, Any]:
    return {"path": self.path, "eos_id": self.eos_id, "bos_id": self.bos_id}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__init__(state["path"], state["eos_id"])
    self.bos_id = state["bos_id"]


class IdTokenizer:
  """Ids written as numbers: for tasks, and for token shards whose tokenizer is not at hand.

  Args:
    vocab_size: ids are below it; not rounded.
    eos_id: what separates documents; -1: there are none.
  """

  def __init__(self, vocab_size: int, eos_id: int = -1):
    self.ids = self.vocab_size = vocab_size
    self.bos_id = self.eos_id = eos_id

  def encode(self, text: str) -> Int32[np.ndarray, " n"]:
    try:
      ids = np.asarray([int(word) for word in text.split()], np.int32)
    except ValueError as error:
      raise UserError(f"expected ids such as '3 14 15', got {text[:80]!r}") from error
    if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
      raise UserError(f"ids must be in [0, {self.vocab_size}), got {text[:80]!r}")
    return ids

  def decode(self, ids: Iterable[int | np.integer]) -> str:
    return " ".join(str(int(i)) for i in ids)

  def token_bytes(self) -> Int32[np.ndarray, " vocab_size"]:
    return np.zeros(self.vocab_size, np.int32)


def load(name: str, eos_id: int = -1, vocab_size: int = 0) -> Tokenizer:
  """The tokenizer that a name means.

  Args:
    name: "bytes", "ids", or the path of a tokenizer.json.
    eos_id: id that separates documents, as bos and as eos; -1: the tokenizer's own bos and eos.
    vocab_size: for "ids" only.

  Raises:
    UserError: see `JsonTokenizer`; or "ids" without a vocabulary and a separator.
  """
  if name == "ids":
    if not 0 <= eos_id < vocab_size:
      raise UserError(
        "config.data.tokenizer='ids' needs config.data.vocab_size and config.data.eos_id, "
        f"the id between documents, below it; they are {vocab_size} and {eos_id}"
      )
    return IdTokenizer(vocab_size, eos_id)
  if vocab_size:
    raise UserError(
      f"config.data.vocab_size is for config.data.tokenizer='ids'; {name!r} has its own"
    )
  if name != "bytes":
    return JsonTokenizer(name, eos_id)
  tokenizer = ByteTokenizer()
  if eos_id >= tokenizer.vocab_size:
    raise UserError(
      f"config.data.eos_id={eos_id} is not below the byte tokenizer's {tokenizer.vocab_size}"
    )
  if eos_id >= 0:
    tokenizer.bos_id = tokenizer.eos_id = eos_id
  return tokenizer
