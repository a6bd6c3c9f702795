"""From `config.data` to batches: the sources by name, and the iterator that training reads."""

import weakref
from collections.abc import Mapping
from typing import Any

import grain
import ml_collections
import numpy as np

from attnlab import errors, tasks
from attnlab import tokenizer as tokenizers
from attnlab.data import files as files_lib
from attnlab.data import packing
from attnlab.data.parquet import Parquet, ShuffleBlocks
from attnlab.data.source import Examples
from attnlab.data.text import JsonLines, TextFiles, stdlib_files
from attnlab.data.tokens import ArrayRecords, FlatShards
from attnlab.errors import UserError
from attnlab.tokenizer import Tokenizer

SOURCES = ("text", "tokens", "task")

# Validation reads its documents in one order, whatever the seed of the run: neighbours in a
# directory are alike, and the first few batches should stand for all.
_VALIDATION_SEED = 0


def data_config() -> ml_collections.ConfigDict:
  """Every key of `config.data`, with its default: rows of 512 bytes of Python's own library."""
  return ml_collections.ConfigDict(
    {
      # "text": files of text, JSON lines (.jsonl) or Parquet (.parquet). "tokens": flat token
      # shards (.npy, .bin) or ArrayRecord (any name with "arrayrecord" or "array_record" in it).
      # "task": a synthetic task.
      "name": "text",
      # Positions a row.
      "seq_len": 512,
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
      raise errors.unknown("config key", f"data.{key}", [f"data.{k}" for k in out])
    try:
      out[key] = value
    except TypeError as error:
      kind = type(out[key]).__name__
      raise UserError(f"data.{key}={value!r} is a {type(value).__name__}, not a {kind}") from error
  if out.name not in SOURCES:
    raise errors.unknown("source (data.name)", out.name, SOURCES)
  if out.seq_len < 2:
    raise UserError(f"data.seq_len={out.seq_len}: at least 2")
  if not 0 < out.validation_fraction < 1:
    raise UserError(f"data.validation_fraction={out.validation_fraction}: between 0 and 1")
  for key in ("workers", "shuffle_tokens"):
    if out[key] < 0:
      raise UserError(f"data.{key}={out[key]}: not negative")
  if out.name == "text" and out.tokenizer == "ids":
    raise UserError("data.tokenizer='ids' makes no ids of text: give 'bytes' or a tokenizer.json")
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


def vocab_size(config: Mapping[str, Any]) -> int:
  """Size of the embedding for `config.data`: a tokenizer's ids rounded up to 64, or a task's."""
  return tokenizer(config).vocab_size


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
    seed = seed if split == "train" else _VALIDATION_SEED
    return tasks.TaskSource(_task(config), config.seq_len, seed, split)
  tok = tokenizer(config)

  if config.train:
    train = files_lib.find(config.train, "data.train")
  elif config.name == "text":
    train = stdlib_files()
  else:
    raise UserError(f"data.name={config.name!r} needs data.train: a file, a directory or a glob")
  if config.validation:
    both = {"train": train, "validation": files_lib.find(config.validation, "data.validation")}
    files_lib.distinct(both["train"], both["validation"])
    sources = {s: _open(config, tok, files) for s, files in both.items()}  # Both are checked.
    return sources[split]

  fraction, key = config.validation_fraction, f"data.train={config.train!r}"
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


class BatchIterator(grain.DatasetIterator):
  """grain's iterator over batches, whose state is plain JSON and is refused by other data.

  State: {"data": what the batches depend on, "iterator": grain's own state}.
  """

  def __init__(self, parent: grain.DatasetIterator, data: dict[str, Any]):
    super().__init__(parent)
    self._data = data
    self._stop = weakref.finalize(self, _stop, parent)

  def __next__(self) -> packing.Batch:
    return next(self._parent)

  def get_state(self) -> dict[str, Any]:
    return {"data": self._data, "iterator": self._parent.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a state of `get_state`, also one that went through JSON.

    Raises:
      UserError: the state belongs to other data, another seed or another division among processes.
    """
    for key, now in self._data.items():
      then = state["data"].get(key)
      if then != now:
        raise UserError(
          f"the checkpoint's place in the data does not fit: {key} was {then!r}, now {now!r}"
        )
    self._parent.set_state(_tuples(state["iterator"]))

  def close(self) -> None:
    """Stops the threads and processes that read ahead; at the latest, Python's end does."""
    self._closed = True
    self._stop()

  def __str__(self) -> str:
    return "BatchIterator"


def _stop(parent: grain.DatasetIterator) -> None:
  parent.close()
  # grain closes once more when the object dies, which at the end of Python is after its own modules
  # have been taken apart, and then prints that it failed.
  parent.close = lambda: None


def _tuples(state: Any) -> Any:
  """grain's packing compares slices with tuples; it takes the lists that JSON made for others."""
  if isinstance(state, dict):
    return {
      k: {n: tuple(s) for n, s in v.items()} if k == "remainder_slices" else _tuples(v)
      for k, v in state.items()
    }
  return [_tuples(v) for v in state] if isinstance(state, list) else state


def make_iterator(
  config: Mapping[str, Any],
  *,
  split: str,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> BatchIterator:
  """Batches of a split, as dicts of [B, T] arrays (B = batch_size / process_count):

    inputs, targets  int32
    weights          float32, 0: not counted (padding; where a task has no label)
    segment_ids      int32, 1, 2, ... in each row; 0: padding
    positions        int32, from 0 in each segment
    index            int32 [B], number of each row's first record (see `record_name`); -1: padding

  "train" goes on for ever, in epochs that are each shuffled anew from the seed; each process reads
  its own share of the documents. "validation" goes once over all records in an order that does not
  depend on the seed; each process packs all of them and takes its rows, so that the global batches
  do not depend on the number of processes and all processes see equally many; the last batch is
  filled up with padding. To go over it again, `set_state` the state it had at first.

  The iterator is grain's: `get_state` / `set_state` resume exactly, and orbax saves it as it is.

  Args:
    config: `config.data`.
    split: "train" or "validation".
    batch_size: global, rows.
    seed: of the order, and of a task's examples; 0 to 2^32 - 1.
    process_index: this process.
    process_count: how many processes share a batch.

  Raises:
    UserError: anything wrong with the config or the data.
  """
  config = resolve(config)
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f"batch_size={batch_size} is not a multiple of {process_count} process(es)")
  if not 0 <= process_index < process_count:
    raise UserError(f"process_index={process_index} is not below process_count={process_count}")
  if not 0 <= seed < 2**32:
    raise UserError(f"seed={seed}: between 0 and 2^32 - 1")
  train, packed = split == "train", config.name != "task"
  source = open_source(config, split, seed)
  order_seed = seed if train else _VALIDATION_SEED
  local = batch_size // process_count
  readers = process_count * max(1, config.workers)
  if train and len(source) < readers:
    raise UserError(
      f"{len(source)} training record(s) cannot be shared among {process_count} process(es) with "
      f"data.workers={config.workers}"
    )

  records = grain.MapDataset.source(source)
  blocks = getattr(source, "blocks", None)
  if blocks is not None:
    records = ShuffleBlocks(records, blocks, order_seed)
  elif packed or train:
    records = records.seed(order_seed).shuffle()
  if train:
    records = records.repeat()[process_index::process_count]
  # Documents are up to a megabyte: few are held. Examples are made faster than threads switch.
  rows = records.to_iter_dataset(
    grain.ReadOptions(num_threads=4, prefetch_buffer_size=8) if packed else grain.ReadOptions(0, 0)
  )
  if packed:
    rows = packing.pack(rows, config.seq_len)
    window = config.shuffle_tokens // config.seq_len
    if window > 1:
      rows = grain.experimental.WindowShuffleIterDataset(
        rows, window_size=window, seed=_window_seed(order_seed)
      )
  batches = packing.batched(rows, local if train else batch_size, pad=not train)
  if not train and process_count > 1:
    take = packing.TakeRows(process_index * local, (process_index + 1) * local)
    batches = batches.map(take)
  if packed:
    batches = batches.map(packing.ToBatch(source.start_id))
  batches = batches.map(packing.MarkPadding())
  if train and config.workers:
    options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=2)
    batches = batches.mp_prefetch(options)
  else:
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
  data = {
    "records": f"{len(source)}, digest {source.identity()}",
    "tokenizer": config.tokenizer if packed else config.task,
    "split": split,
    "seed": seed if train else _VALIDATION_SEED,
    "seq_len": config.seq_len,
    "shuffle_tokens": config.shuffle_tokens if packed else 0,
    "process": f"{process_index} of {process_count}" if train else "any",
    "workers": config.workers if train else 0,
  }
  return BatchIterator(iter(batches), data)


def _window_seed(seed: int) -> int:
  """A seed that leaves room in 32 bits for the number of the window, which grain adds."""
  return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]) >> 1
