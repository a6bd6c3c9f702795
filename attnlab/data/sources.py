"""`config.data`: its keys, and what they open: a tokenizer and a source of records."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from attnlab import errors, tasks
from attnlab import tokenizer as tokenizers
from attnlab.data import files as files_lib
from attnlab.data.parquet import Parquet
from attnlab.data.source import Examples
from attnlab.data.text import JsonLines, TextFiles, stdlib_files
from attnlab.data.tokens import ArrayRecords, FlatShards
from attnlab.errors import UserError
from attnlab.tokenizer import Tokenizer

SOURCES = ("text", "tokens", "task")

# Validation has one order, whatever the seed of the run.
# Shuffled all the same: neighbours in a directory are alike, and the first few batches should
# stand for all.
VALIDATION_SEED = 0


def data_config() -> ml_collections.ConfigDict:
  """Every key of `config.data`, with its default: rows of 256 bytes of Python's own library."""
  return ml_collections.ConfigDict(
    {
      # "text": files of text, JSON lines (.jsonl) or Parquet (.parquet). "tokens": flat token
      # shards (.npy, .bin) or ArrayRecord (any name with "arrayrecord" or "array_record" in it).
      # "task": a synthetic task.
      "name": "text",
      # Positions a row.
      "seq_len": 256,
      # "bytes", the path of a tokenizer.json, or for token shards "ids": none, ids are shown as
      # numbers.
      "tokenizer": "bytes",
      # A file, a directory (all files below it) or a glob. Empty: the sources of Python's standard
      # library ("text" only).
      "train": "",
      # Likewise. Empty: some of `train`'s files (of a single text file or flat shard, its end; of
      # JSON lines, Parquet and ArrayRecord, some documents), by a hash of their names.
      "validation": "",
      "validation_fraction": 0.05,
      # Field or column of the text in JSON lines and Parquet.
      "text_key": "text",
      # ArrayRecord: a record is a document, as "text" (UTF-8) or "tokens" (int32, little-endian).
      "record": "text",
      # Numbers in .bin shards: "uint16" or "uint32".
      "token_dtype": "uint16",
      # Id that stands between documents; -1: the tokenizer's own.
      "eos_id": -1,
      # With tokenizer "ids": the number of ids. Otherwise 0, the tokenizer's own.
      "vocab_size": 0,
      # A task's name (attnlab/tasks/), and what differs from its defaults.
      "task": "mqar",
      "task_args": ml_collections.ConfigDict(),
      # Of a task's validation examples. Settings are chosen on one, and results told of another.
      "validation_seed": 0,
      # 1 or 2: only one half of the validation records, every other one of them: one half can then
      # choose a setting, and the other report it. 0: all.
      "validation_half": 0,
      # Rows are shuffled within windows of this many tokens after packing, so that a batch is not
      # one stretch of one document. That much is read again on resuming.
      "shuffle_tokens": 1 << 20,
      # Processes that prepare training batches; 0: a thread. Each reads its own share of the
      # documents, so another number gives another order: part of the recipe, like the seed.
      "workers": 0,
    }
  )


def resolve(config: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """`data_config()` with a config's values, checked as far as it goes without touching data.

  Raises:
    UserError: unknown key, source or value.
  """
  out = data_config()
  for key, value in dict(config).items():
    if key not in out:
      raise errors.unknown("config key", f"config.data.{key}", [f"config.data.{k}" for k in out])
    try:
      out[key] = value
    except TypeError as error:
      kind = type(out[key]).__name__
      raise UserError(
        f"config.data.{key}={value!r} is a {type(value).__name__}, not a {kind}"
      ) from error
  if out.name not in SOURCES:
    raise errors.unknown("source (config.data.name)", out.name, SOURCES)
  if out.seq_len < 2:
    raise UserError(f"config.data.seq_len={out.seq_len}: at least 2")
  if not 0 < out.validation_fraction < 1:
    raise UserError(f"config.data.validation_fraction={out.validation_fraction}: between 0 and 1")
  for key in ("workers", "shuffle_tokens", "validation_seed"):
    if out[key] < 0:
      raise UserError(f"config.data.{key}={out[key]}: not negative")
  if out.validation_half not in (0, 1, 2):
    raise UserError(f"config.data.validation_half={out.validation_half}: 0 (all), 1 or 2")
  if out.name == "text" and out.tokenizer == "ids":
    raise UserError(
      "config.data.tokenizer='ids' makes no ids of text: give 'bytes' or a tokenizer.json"
    )
  return out


def _task(config: ml_collections.ConfigDict) -> tasks.Task:
  task = tasks.make(config.task, dict(config.task_args))
  task.check(config.seq_len)
  return task


def tokenizer(config: Mapping[str, Any]) -> Tokenizer:
  """The tokenizer of `config.data`; a task's shows ids as numbers.

  Raises:
    UserError: see `attnlab.tokenizer.load` and `attnlab.tasks.make`.
  """
  config = resolve(config)
  if config.name == "task":
    return tokenizers.IdTokenizer(_task(config).vocab_size)
  return tokenizers.load(config.tokenizer, config.eos_id, config.vocab_size)


def open_source(config: Mapping[str, Any], split: str, seed: int = 0) -> Examples:
  """The records of a split.

  Args:
    config: `config.data`.
    split: "train" or "validation".
    seed: of a task's training examples.

  Raises:
    UserError: anything wrong with the config or the data.
  """
  config = resolve(config)
  if split not in files_lib.SPLITS:
    raise errors.unknown("split", split, files_lib.SPLITS)
  if config.name == "task":
    seed = seed if split == "train" else config.validation_seed
    return tasks.TaskSource(_task(config), config.seq_len, seed, split)
  tok = tokenizer(config)

  if config.train:
    train = files_lib.find(config.train, "config.data.train")
  elif config.name == "text":
    train = stdlib_files()
  else:
    raise UserError(
      f"config.data.name={config.name!r} needs config.data.train: a file, a directory or a glob"
    )
  if config.validation:
    both = {
      "train": train,
      "validation": files_lib.find(config.validation, "config.data.validation"),
    }
    files_lib.distinct(both["train"], both["validation"])
    sources = {s: _open(config, tok, files) for s, files in both.items()}  # Both are checked.
    return sources[split]

  fraction, key = config.validation_fraction, f"config.data.train={config.train!r}"
  kind = _kind(config, train)
  if kind not in ("text files", "flat shards"):  # A record is a document.
    source = _open(config, tok, train)
    names = [f.name for f in train]
    mask = files_lib.in_validation(names, source.rows_per_file, fraction, key)
    source.keep(mask if split == "validation" else ~mask)
    return source
  filled = [f for f in train if f.size]
  if len(filled) == 1:
    return _open(config, tok, filled, side=split)
  mask = files_lib.in_validation([f.name for f in filled], [1] * len(filled), fraction, key)
  both = {
    s: [f for f, m in zip(filled, mask, strict=True) if m == (s == "validation")]
    for s in files_lib.SPLITS
  }
  return {s: _open(config, tok, files) for s, files in both.items()}[split]


def _kind(config: ml_collections.ConfigDict, files: list[files_lib.File]) -> str:
  """The one kind of all the files."""

  def kind(file: files_lib.File) -> str:
    name = file.path.name.lower()
    if config.name == "text":
      return {".jsonl": "JSON lines", ".parquet": "Parquet"}.get(file.path.suffix, "text files")
    if "arrayrecord" in name or "array_record" in name:
      return "ArrayRecord"
    if file.path.suffix in (".npy", ".bin"):
      return "flat shards"
    raise UserError(
      f"{file.path} is no shard: tokens come as .npy, .bin, or ArrayRecord "
      "('arrayrecord' or 'array_record' in the name)"
    )

  first = {kind(file): file for file in reversed(files)}
  if len(first) > 1:
    named = ", ".join(f"{k} ({f.path})" for k, f in sorted(first.items()))
    raise UserError(f"files of several kinds: {named}; name one kind with a glob")
  return next(iter(first))


def _open(
  config: ml_collections.ConfigDict,
  tok: Tokenizer,
  files: list[files_lib.File],
  side: str | None = None,
) -> Any:
  """A source of files of one kind; `side` of a file that is alone."""
  fraction = config.validation_fraction
  match _kind(config, files):
    case "JSON lines":
      return JsonLines(files, config.text_key, tok)
    case "Parquet":
      return Parquet(files, config.text_key, tok)
    case "ArrayRecord":
      return ArrayRecords(files, config.record, tok, tok.vocab_size)
    case "flat shards":
      return FlatShards(
        files,
        dtype=config.token_dtype,
        bos_id=tok.bos_id,
        eos_id=tok.eos_id,
        vocab_size=tok.vocab_size,
        seq_len=config.seq_len,
        side=side,
        fraction=fraction,
      )
    case _:
      start, stop = {None: (0.0, 1.0), "train": (0.0, 1 - fraction)}.get(side, (1 - fraction, 1.0))
      return TextFiles(files, tok, config.seq_len, start, stop)


def record_name(config: Mapping[str, Any], split: str, index: int, seed: int = 0) -> str:
  """Where the record with a batch's `index` comes from, for people: a file, a line, an example."""
  return "padding" if index < 0 else open_source(config, split, seed).name(int(index))
