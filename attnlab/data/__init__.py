"""Data: text, token shards and synthetic tasks, as packed batches from grain.

Sources and their config keys: `data_config`. Batches, order and resuming: `make_iterator`. How
documents become rows: packing.py.
"""

from attnlab.data.packing import Batch
from attnlab.data.pipeline import BatchIterator, make_iterator
from attnlab.data.sources import data_config, open_source, record_name, tokenizer

__all__ = [
  "Batch",
  "BatchIterator",
  "data_config",
  "make_iterator",
  "open_source",
  "record_name",
  "tokenizer",
]
