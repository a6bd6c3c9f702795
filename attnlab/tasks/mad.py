"""The six tasks of MAD, "Mechanistic Design and Scaling of Hybrid Architectures" (arXiv:2403.17844).

Defaults are the baseline settings of the authors' code (athms/mad-lab, configs/tasks). Labelled is what they score; in
recall tasks their training loss also covers every other next id.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int64

from attnlab.errors import UserError
from attnlab.tasks.base import Example, Task, labelled, register


@register("in_context_recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextRecall(Task):
  """Random pairs `k v`, in which a key always has the same value; labelled wherever a key comes again.

  Attributes:
    vocab_size: ids without noise's; half are keys and half values.
    noise_vocab_size: ids of noise.
    frac_noise: the share of pairs that are noise.
  """

  vocab_size: int = 16
  noise_vocab_size: int = 0
  frac_noise: float = 0.0
  train_examples: int = 12_800
  validation_examples: int = 1_280

  def __post_init__(self):
    if self.frac_noise and self.noise_vocab_size < 1:
      raise UserError(f"frac_noise={self.frac_noise} needs noise_vocab_size of at least 1")

  def check(self, seq_len: int) -> None:
    if self.vocab_size - self.noise_vocab_size < 2 or not 0 <= self.frac_noise < 1:
      raise UserError(
        f"vocab_size={self.vocab_size} must exceed noise_vocab_size={self.noise_vocab_size} by at "
        f"least 2, and frac_noise={self.frac_noise} lie in [0, 1)"
      )
    if seq_len < 4 or seq_len % 2:
      raise UserError(f"config.data.seq_len={seq_len} must be even and at least 4")

  def labels(self, seq_len: int) -> int:
    return seq_len // 2

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    n, size = seq_len // 2, self.vocab_size - self.noise_vocab_size
    half = size // 2
    value_of = half + rng.integers(size - half, size=half)
    keys = rng.integers(half, size=n)
    noise = rng.random(n) < self.frac_noise
    noise[rng.integers(n - 1)] = noise[-1] = False
    keys[-1] = rng.choice(keys[:-1][~noise[:-1]])  # the last pair has been seen
    pairs = np.stack([keys, value_of[keys]], axis=1)
    if noise.any():
      pairs[noise] = size + rng.integers(self.noise_vocab_size, size=(int(noise.sum()), 2))
    new = np.zeros(n, bool)
    new[np.unique(np.where(noise, half, keys), return_index=True)[1]] = True
    again = ~noise & ~new
    return labelled(pairs.ravel(), 2 * np.flatnonzero(again), pairs[again, 1])


@register("noisy_recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
  """In-context recall with noise between the pairs."""

  vocab_size: int = 32
  noise_vocab_size: int = 16
  frac_noise: float = 0.2


@register("fuzzy_recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Task):
  """In-context recall of values of one to three ids by keys of as many; labelled is a value whose key comes again.

  The authors train on keys of every size and score those of the largest; here keys have every size in both.

  Attributes:
    vocab_size: ids: half keys, half values, and one that pads on the left.
    key_size, value_size: ids in a key and a value, at most. The ids of one are different.
  """

  vocab_size: int = 16
  key_size: int = 3
  value_size: int = 3
  train_examples: int = 12_800
  validation_examples: int = 1_280

  def check(self, seq_len: int) -> None:
    size = self.key_size + self.value_size
    if min(self.key_size, self.value_size) < 1 or (self.vocab_size - 1) // 2 < max(
      self.key_size, self.value_size
    ):
      raise UserError(
        f"fuzzy_recall: key_size={self.key_size} and value_size={self.value_size} must lie between "
        f"1 and the {(self.vocab_size - 1) // 2} ids of vocab_size={self.vocab_size}"
      )
    if seq_len < 2 * size:
      raise UserError(f"fuzzy_recall: config.data.seq_len={seq_len} must be at least {2 * size}")

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    half = (self.vocab_size - 1) // 2
    values = self.vocab_size - 1 - half

    def motif(ids: int, first: int, size: int) -> tuple[int, ...]:
      length = int(rng.integers(1, size + 1))
      return tuple((first + rng.choice(ids, length, replace=False)).tolist())

    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    pieces: list[tuple[tuple[int, ...], bool]] = []  # motifs, and whether they are labelled
    free = seq_len - self.key_size - self.value_size  # of the last pair, which has been seen
    while True:
      key, value = motif(half, 0, self.key_size), motif(values, half, self.value_size)
      again, value = key in known, known.get(key, value)
      free -= len(key) + len(value)
      if free < 0:
        break
      known[key] = value
      pieces += [(key, False), (value, again)]
    probe = list(known)[int(rng.integers(len(known)))]
    pieces += [(probe, False), (known[probe], True)]
    ids = np.array([i for piece, _ in pieces for i in piece])
    labels = np.array([label for piece, label in pieces for _ in piece])
    # An id is the target at the position before it.
    inputs = np.full(seq_len, self.vocab_size - 1)
    inputs[seq_len - len(ids) + 1 :] = ids[:-1]
    where = seq_len - len(ids) + np.flatnonzero(labels)
    return labelled(inputs, where, ids[labels])


@register("memorization")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorization(Task):
  """Pairs of a key and a blank, at which the key's value is the target: one and the same for all examples.

  Nothing in the context says it; the parameters have to hold it.

  Attributes:
    vocab_size: ids: half keys, half values, and the blank.
    map_seed: of which value a key has.
  """

  vocab_size: int = 256
  map_seed: int = 12345
  train_examples: int = 256
  validation_examples: int = 1_280

  def check(self, seq_len: int) -> None:
    if self.vocab_size < 3 or seq_len % 2:
      raise UserError(
        f"memorization: vocab_size={self.vocab_size} must be at least 3, and config.data.seq_len={seq_len} even"
      )

  def labels(self, seq_len: int) -> int:
    return seq_len // 2

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    value_of = _value_map(self.vocab_size - 1, self.map_seed)
    keys = rng.integers(len(value_of), size=seq_len // 2)
    inputs = np.full(seq_len, self.vocab_size - 1)
    inputs[::2] = keys
    return labelled(inputs, np.arange(1, seq_len, 2), value_of[keys])


@functools.lru_cache(maxsize=8)
def _value_map(ids: int, seed: int) -> Int64[np.ndarray, " keys"]:
  half = ids // 2
  return half + np.random.default_rng(seed).permutation(ids - half)[:half]


@register("compression")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression(Task):
  """Random ids, then as many blanks, at which they are the targets in their order.

  The authors decode all of them with an MLP from the last token's activation and its position. A language model has no
  such decoder: here the state before the blanks must hold the ids, but attention may look back at them. Compare
  results with each other, not with the published column.

  Attributes:
    vocab_size: ids, the last of which is the blank.
  """

  vocab_size: int = 16
  train_examples: int = 12_800
  validation_examples: int = 1_280

  def check(self, seq_len: int) -> None:
    if self.vocab_size < 2 or seq_len % 2:
      raise UserError(
        f"compression: vocab_size={self.vocab_size} must be at least 2, and config.data.seq_len={seq_len} even"
      )

  def labels(self, seq_len: int) -> int:
    return seq_len // 2

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    n, blank = seq_len // 2, self.vocab_size - 1
    ids = rng.integers(blank, size=n)
    return labelled(np.append(ids, np.full(n, blank)), np.arange(n, seq_len), ids)


@register("selective_copy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
  """Ids scattered among blanks, a mark, and blanks at which the ids are the targets in their order.

  Attributes:
    vocab_size: ids: the last is the mark, the one before it the blank.
    num_tokens_to_copy: ids to copy.
  """

  vocab_size: int = 16
  num_tokens_to_copy: int = 16
  train_examples: int = 12_800
  validation_examples: int = 1_280

  def check(self, seq_len: int) -> None:
    n = self.num_tokens_to_copy
    if self.vocab_size < 3 or n < 1 or seq_len < 2 * n + 1:
      raise UserError(
        f"selective_copy: vocab_size={self.vocab_size} must be at least 3, and config.data.seq_len={seq_len} "
        f"at least 2 * num_tokens_to_copy + 1 = {2 * n + 1}"
      )

  def labels(self, seq_len: int) -> int:
    return self.num_tokens_to_copy

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    n, mark = self.num_tokens_to_copy, self.vocab_size - 1
    ids = rng.integers(mark - 1, size=n)
    inputs = np.full(seq_len, mark - 1)
    inputs[np.sort(rng.choice(seq_len - n - 1, n, replace=False))] = ids
    inputs[-n - 1] = mark
    return labelled(inputs, np.arange(seq_len - n, seq_len), ids)
