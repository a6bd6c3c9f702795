"""Languages of random automata, after RegBench, "In-Context Language Learning" (arXiv:2401.12973)."""

import dataclasses

import numpy as np

from attnlab.errors import UserError
from attnlab.tasks.base import Example, Task, register


@register("regbench")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RegBench(Task):
  """Words of one automaton, each example another: `word | word | ...`, in which every next id is a target.

  An automaton has 2 to max_states states and an alphabet of as many symbols; each state leads on by 1 to max_edges of
  them, to random states. A word starts in state 0, takes each edge with the same probability, and ends after a random
  length. As in the paper: 18 symbols and two more ids, up to 12 states and 4 edges, 10 to 20 words of up to 50.
  A target after which a word could have gone on otherwise cannot be known; the paper counts whether the model's first
  choice is an edge of the automaton, our accuracy whether it is the one that was taken. An end of a word is a target of
  weight 0, for any place may be one.

  Attributes:
    symbols: of all alphabets.
    max_states, max_edges: of an automaton.
    min_words, max_words: of an example, which is cut at config.data.seq_len.
    max_length: of a word.
  """

  symbols: int = 18
  max_states: int = 12
  max_edges: int = 4
  min_words: int = 10
  max_words: int = 20
  max_length: int = 50
  train_examples: int = 5_000
  validation_examples: int = 500

  @property
  def vocab_size(self) -> int:
    return self.symbols + 2  # the end of a word, and padding

  def check(self, seq_len: int) -> None:
    del seq_len
    if not 2 <= self.max_states <= self.symbols:
      raise UserError(
        f"regbench: max_states={self.max_states} must lie between 2 and symbols={self.symbols}"
      )
    if self.max_edges < 1 or self.max_length < 1:
      raise UserError(
        f"regbench: max_edges={self.max_edges} and max_length={self.max_length}: at least 1"
      )
    if not 1 <= self.min_words <= self.max_words:
      raise UserError(
        f"regbench: min_words={self.min_words} and max_words={self.max_words} must be at least 1, in order"
      )

  def automaton(self, rng: np.random.Generator) -> list[dict[int, int]]:
    """For each state the edges: symbol -> state."""
    states = int(rng.integers(2, self.max_states + 1))
    alphabet = rng.choice(self.symbols, states, replace=False)
    edges = []
    for _ in range(states):
      symbols = rng.choice(
        alphabet, int(rng.integers(1, min(self.max_edges, states) + 1)), replace=False
      )
      edges.append({int(s): int(rng.integers(states)) for s in symbols})
    return edges

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    edges, end = self.automaton(rng), self.symbols
    ids = [end]  # so that a first symbol is a target too
    for _ in range(int(rng.integers(self.min_words, self.max_words + 1))):
      state = 0
      for choice in rng.random(int(rng.integers(1, self.max_length + 1))):
        symbol = list(edges[state])[int(choice * len(edges[state]))]
        ids.append(symbol)
        state = edges[state][symbol]
      ids.append(end)
      if len(ids) > seq_len:
        break
    line = np.array(ids[: seq_len + 1], np.int32)
    return Example(line[:-1], line[1:], (line[1:] != end).astype(np.float32))
