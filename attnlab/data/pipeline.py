"""The iterator over batches that training and evaluation read."""

import asyncio
import atexit
import json
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from attnlab.data import packing
from attnlab.data.parquet import ShuffleBlocks
from attnlab.data.sources import VALIDATION_SEED, open_source, resolve
from attnlab.digest import digest
from attnlab.errors import UserError

# Iterators that read ahead, and those of them that nobody holds any more.
_open: set[grain.DatasetIterator] = set()
_left: list[grain.DatasetIterator] = []


class BatchIterator(grain.DatasetIterator):
  """grain's iterator over batches, whose state is plain JSON and is refused by other data.

  State: {"data": what the batches depend on, "iterator": grain's own state}. A checkpoint has one of each share of the
  rows, not of each process as grain's own: processes with the same rows are at the same place.
  """

  def __init__(self, parent: grain.DatasetIterator, data: dict[str, Any], share: tuple[int, int]):
    super().__init__(parent)
    self._data, self._share = data, share
    while _left:
      _stop(_left.pop())
    _open.add(parent)

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

  async def save(self, directory: Any) -> Awaitable[None]:
    """Orbax's: takes the state, and returns what writes it once the directory is there."""
    state = json.dumps(self.get_state(), indent=4)

    async def write() -> None:
      path = await directory.await_creation() / self._file
      # Processes of one share write the same, and none reads before all have.
      await asyncio.to_thread(path.write_text, state)

    return write()

  async def load(self, directory: Any) -> Awaitable[None]:
    """Orbax's: returns what reads the state; UserError if the rows were divided into another number of shares."""

    async def read() -> None:
      self.set_state(json.loads(await asyncio.to_thread(self._read, directory)))

    return read()

  @property
  def _file(self) -> str:
    """As grain names it, by process."""
    return "process_{}-of-{}.json".format(*self._share)

  def _read(self, directory: Any) -> str:
    counts = {int(p.stem.rpartition("-")[2]) for p in directory.glob("process_*-of-*.json")}
    count = self._share[1]
    if counts and count not in counts:
      raise UserError(
        f"{directory} keeps the places of {counts.pop()} process(es) with rows of their own, not of"
        f" {count}: go on with as many processes and the same config.mesh, or give another --workdir"
      )
    return (directory / self._file).read_text()

  def close(self) -> None:
    """Stops the threads and processes that read ahead; if not called, making another iterator does, or Python's end."""
    self._closed = True
    _stop(self._parent)

  def __del__(self):
    # Not closed here, which waits for threads: garbage may be collected while this thread holds a lock that those
    # need, as one that submits work to any executor does.
    if not self._closed:
      _left.append(self._parent)

  def __str__(self) -> str:
    return "BatchIterator"


def _stop(parent: grain.DatasetIterator) -> None:
  parent.close()
  # grain closes once more when the object dies, which at the end of Python is after its own modules
  # have been taken apart, and then prints that it failed.
  parent.close = lambda: None
  _open.discard(parent)


@atexit.register
def _stop_all() -> None:
  while _open:
    _stop(next(iter(_open)))


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
  share: tuple[int, int] = (0, 1),
) -> BatchIterator:
  """Batches of a split, as dicts of [B, T] arrays (B = batch_size / shares):

    inputs, targets  int32
    weights          float32, 0: not counted (padding; where a task has no label)
    segment_ids      int32, 1, 2, ... in each row; 0: padding
    positions        int32, from 0 in each segment
    labels           int32 [B, K], of tasks: positions, among them all whose weight is not 0
    index            int32 [B], number of each row's first record (see `record_name`); -1: padding

  "train" goes on for ever, in epochs that are each shuffled anew from the seed; each process reads
  its share of the documents. "validation" goes once over all records in an order that does not
  depend on the seed; each process packs all of them and takes its rows, so that the global batches
  do not depend on the number of shares and all processes see equally many; the last batch is
  filled up with padding. To go over it again, `set_state` the state it had at first.

  The iterator is grain's: `get_state` / `set_state` resume exactly, and orbax saves it as it is.

  Args:
    config: `config.data`.
    split: "train" or "validation".
    batch_size: global, rows.
    seed: of the order, and of a task's examples; 0 to 2^32 - 1.
    share: which share of a batch's rows this process has, and of how many (`sharding.share`).

  Raises:
    UserError: anything wrong with the config or the data.
  """
  config = resolve(config)
  number, count = share
  if not 0 <= number < count:
    raise UserError(f"share={share}: the first must be below the second")
  if batch_size < 1 or batch_size % count:
    raise UserError(f"batch_size={batch_size} is not a multiple of {count} share(s)")
  if not 0 <= seed < 2**32:
    raise UserError(f"seed={seed}: between 0 and 2^32 - 1")
  train, packed = split == "train", config.name != "task"
  source = open_source(config, split, seed)
  order_seed = seed if train else VALIDATION_SEED
  local = batch_size // count
  readers = count * max(1, config.workers)
  if train and len(source) < readers:
    raise UserError(
      f"{len(source)} training record(s) cannot be shared among {count} process(es) with rows of "
      f"their own and config.data.workers={config.workers}"
    )

  records = grain.MapDataset.source(source)
  blocks = getattr(source, "blocks", None)
  if blocks is not None:
    records = ShuffleBlocks(records, blocks, order_seed)
  elif packed or train:
    records = records.seed(order_seed).shuffle()
  if train:
    records = records.repeat()[number::count]
  elif config.validation_half:
    if len(source) < 2:
      raise UserError("config.data.validation_half: there is one validation record, and no half")
    records = records[config.validation_half - 1 :: 2]
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
  if not train and count > 1:
    batches = batches.map(packing.TakeRows(number * local, (number + 1) * local))
  if packed:
    batches = batches.map(packing.ToBatch(source.start_id))
  batches = batches.map(packing.MarkPadding())
  if train and config.workers:
    if not flags.FLAGS.is_parsed():  # In a notebook; grain reads its own flags here.
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=2)
    batches = batches.mp_prefetch(options)
  else:
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
  data = {
    "records": f"{len(source)}, digest {source.identity()}",
    "tokenizer": _tokenizer_identity(config.tokenizer) if packed else "none",
    "split": split,
    "seed": seed if train else VALIDATION_SEED,
    "seq_len": config.seq_len,
    "shuffle_tokens": config.shuffle_tokens if packed else 0,
    "process": f"{number} of {count}" if train else "any",
    "workers": config.workers if train else 0,
  }
  if config.validation_half and not train:
    data["half"] = config.validation_half
  return BatchIterator(iter(batches), data, share)


def _tokenizer_identity(name: str) -> str:
  """The contents of a tokenizer.json, not its path: it may have moved."""
  return name if name in ("bytes", "ids") else digest(Path(name).read_bytes())


def _window_seed(seed: int) -> int:
  """A seed that leaves room in 32 bits for the number of the window, which grain adds."""
  return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0]) >> 1
