"""Needles in haystacks: RULER's single-needle tasks (arXiv:2404.06654), small.

A needle `mark key value` lies anywhere in the hay; the row ends in `question key value`, whose value is the target. As
S-NIAH-1 to 3 in Gated DeltaNet's Table 2 (arXiv:2412.06464), they ask for three things: to keep something while nothing
happens, to find it among much that looks like it, and to keep something long.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from attnlab.errors import UserError
from attnlab.tasks.base import Example, Task, labelled, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Needle(Task):
  """A needle in hay.

  Attributes:
    vocab_size: ids: 0 the mark, 1 the question, the rest words. Keys and values are words.
    value_size: words of the value, each a target.
  """

  vocab_size: int = 256
  value_size: int = 1

  def check(self, seq_len: int) -> None:
    if self.vocab_size < 8 or self.value_size < 1:
      raise UserError(
        f"vocab_size={self.vocab_size} must be at least 8, and value_size={self.value_size} at least 1"
      )
    if seq_len < 2 * self.value_size + 4:
      raise UserError(
        f"config.data.seq_len={seq_len} must be at least 2 * value_size + 4 = {2 * self.value_size + 4}"
      )

  def hay(self, rng: np.random.Generator, size: int) -> Int64[np.ndarray, " size"]:
    """Words from 0."""
    raise NotImplementedError

  def labels(self, seq_len: int) -> int:
    return self.value_size

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    n, words = self.value_size, self.vocab_size - 2
    needle = rng.integers(words, size=n + 1)  # key and value
    hay = 2 + self.hay(rng, seq_len - 2 * n - 3)
    at = int(rng.integers(len(hay) + 1))
    # The value's last word is a target alone.
    parts = ([0], 2 + needle, hay[at:], [1], 2 + needle[:-1])
    inputs = np.concatenate([hay[:at], *parts])
    return labelled(inputs, np.arange(seq_len - n, seq_len), 2 + needle[1:])


@register("needle_retention")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleRetention(_Needle):
  """S-NIAH-1: the hay is one phrase, again and again.

  Attributes:
    period: words of the phrase.
  """

  period: int = 4

  def hay(self, rng, size):
    return np.arange(size) % min(self.period, self.vocab_size - 2)


@register("needle_filtering")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleFiltering(_Needle):
  """S-NIAH-2: the hay is random words, frequent and rare ones as in a text (Zipf: word r has weight 1 / (r + 1))."""

  def hay(self, rng, size):
    law = 1 / np.arange(1, self.vocab_size - 1)
    return rng.choice(self.vocab_size - 2, size, p=law / law.sum())


@register("needle_memorisation")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleMemorisation(NeedleFiltering):
  """S-NIAH-3: as filtering, with a value of many words."""

  value_size: int = 8
