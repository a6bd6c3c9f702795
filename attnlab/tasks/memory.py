"""Palindrome and stacks, as in Kimi Linear's Figure 4 (arXiv:2510.26692, section 5.1)."""

import dataclasses

import numpy as np

from attnlab.errors import UserError
from attnlab.tasks.base import Example, Task, labelled, register


@register("palindrome")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Palindrome(Task):
  """A random word, a separator, and the word backwards, every id of which is a target.

  The word has seq_len / 2 ids of 1 .. vocab_size - 1; 0 is the separator. The paper does not state its vocabulary.

  Attributes:
    vocab_size: ids, with the separator.
  """

  vocab_size: int = 64

  def check(self, seq_len: int) -> None:
    if self.vocab_size < 2:
      raise UserError(f"palindrome: vocab_size={self.vocab_size} must be at least 2")
    if seq_len % 2:
      raise UserError(f"palindrome: config.data.seq_len={seq_len} must be even")

  def labels(self, seq_len: int) -> int:
    return seq_len // 2

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    n = seq_len // 2
    word = rng.integers(1, self.vocab_size, n)
    inputs = np.concatenate([word, [0], word[:0:-1]])
    return labelled(inputs, np.arange(n, seq_len), word[::-1])


@register("stack")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack(Task):
  """Many stacks: `push i x` puts x on stack i, `pop i x` takes off its top x, the target at i.

  Ids: 0 push, 1 pop, then the stacks, then the elements. Each operation is a push or a pop with the same probability
  (a push while all stacks are empty), on a random stack (one that holds something). The last is a pop, so that there
  is a target. The paper: 64 stacks; the rest is not stated.

  Attributes:
    stacks: how many there are.
    elements: different things to push.
  """

  stacks: int = 64
  elements: int = 64

  @property
  def vocab_size(self) -> int:
    return 2 + self.stacks + self.elements

  def check(self, seq_len: int) -> None:
    if self.stacks < 1 or self.elements < 1:
      raise UserError(f"stack: stacks={self.stacks} and elements={self.elements}: at least 1 each")
    if seq_len < 6:
      raise UserError(f"stack: config.data.seq_len={seq_len} must be at least 6")

  def labels(self, seq_len: int) -> int:
    return seq_len // 3

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    count = seq_len // 3
    pops = rng.random(count) < 0.5
    pops[-2:] = False, True
    places = rng.random(count)  # of all stacks, or of those that hold something
    elements = 2 + self.stacks + rng.integers(self.elements, size=count)
    held: dict[int, list[int]] = {}
    inputs = np.empty((count, 3), np.int32)
    for i in range(count):
      if pops[i] and held:
        stack = sorted(held)[int(places[i] * len(held))]
        inputs[i] = 1, 2 + stack, held[stack].pop()
        if not held[stack]:
          del held[stack]
      else:
        stack = int(places[i] * self.stacks)
        held.setdefault(stack, []).append(int(elements[i]))
        inputs[i] = 0, 2 + stack, elements[i]
    where = 3 * np.flatnonzero(inputs[:, 0]) + 1
    return labelled(inputs.ravel(), where, inputs[inputs[:, 0] == 1, 2])
