"""Multi-query associative recall of "Zoology" (Arora et al. 2023, arXiv:2312.04927)."""

import dataclasses

import numpy as np
from jaxtyping import Int32, Int64

from attnlab.errors import UserError
from attnlab.tasks.base import Example, Task, labelled, register


@register("mqar")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(Task):
  """`k1 v1 k2 v2 ...`, then each key once more, where its value is to be predicted.

  Keys are different ids of 1 .. vocab_size/2 - 1, values different ids of vocab_size/2 ..
  vocab_size - 1. A key is
  asked for at 2g positions after the pairs, the g drawn without replacement with probability
  proportional to (g + 1)^(power_a - 1). Its value is the target there, at the key itself, and does
  not follow in the input. All other targets have weight 0.

  The paper's Figure 2: vocab_size 8192; (seq_len, num_kv_pairs) of (64, 4), (128, 8), (256, 16),
  (512, 64); 100 000 training and 3 000 test examples; random_non_queries False.

  Attributes:
    vocab_size: ids, half of them keys and half values.
    num_kv_pairs: pairs, each asked for once.
    power_a: exponent of the gaps; 1: uniform.
    random_non_queries: fill the positions between queries with random ids of the whole vocabulary
      instead of 0, as the published generator does by default.
    min_length: rows have any even length from here to seq_len; 0: all have seq_len.
  """

  vocab_size: int = 8192
  num_kv_pairs: int = 8
  power_a: float = 0.01
  random_non_queries: bool = True
  min_length: int = 0

  def check(self, seq_len: int) -> None:
    pairs = self.num_kv_pairs
    if self.min_length and not 4 * pairs <= self.min_length <= seq_len:
      raise UserError(
        f"mqar: min_length={self.min_length} must lie between 4 * num_kv_pairs = {4 * pairs} and "
        f"config.data.seq_len={seq_len}, or be 0"
      )
    if pairs < 1 or self.vocab_size // 2 - 1 < pairs:
      raise UserError(
        f"mqar: num_kv_pairs={pairs} must lie between 1 and the {self.vocab_size // 2 - 1} keys of "
        f"vocab_size={self.vocab_size}"
      )
    if seq_len % 2 or 4 * pairs > seq_len:
      raise UserError(
        f"mqar: config.data.seq_len={seq_len} must be even and at least 4 * num_kv_pairs "
        f"= {4 * pairs}"
      )

  def labels(self, seq_len: int) -> int:
    return self.num_kv_pairs

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    pairs, half = self.num_kv_pairs, self.vocab_size // 2
    if self.min_length:
      seq_len = 2 * int(rng.integers(self.min_length // 2, seq_len // 2 + 1))
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    values = half + rng.choice(self.vocab_size - half, pairs, replace=False)
    context = 2 * pairs
    inputs = np.zeros(seq_len, np.int32)
    inputs[0:context:2], inputs[1:context:2] = keys, values
    queries = context + 2 * gaps(rng, pairs, (seq_len - context) // 2, self.power_a)
    inputs[queries] = keys
    if self.random_non_queries:
      fill(rng, inputs, self.vocab_size)
    return labelled(inputs, queries, values)


def gaps(
  rng: np.random.Generator, count: int, space: int, power_a: float
) -> Int64[np.ndarray, " n"]:
  """`count` different numbers below `space`, g drawn with probability proportional to (g + 1)^(power_a - 1).

  They are what `rng.choice(space, count, replace=False, p=...)` draws, whose time was a third of an example's, in less
  than half of it.

  Raises:
    ValueError: there are not so many.
  """
  if count > space:
    raise ValueError(f"{count} different numbers below {space}")
  law = np.arange(1, space + 1, dtype=np.float64) ** (power_a - 1)
  law /= law.sum()
  drawn: dict[int, None] = {}  # in order
  while missing := count - len(drawn):
    uniform = rng.random(missing)
    law[list(drawn)] = 0.0
    cumulative = np.cumsum(law)
    cumulative /= cumulative[-1]
    drawn |= dict.fromkeys(cumulative.searchsorted(uniform, side="right").tolist())
  return np.fromiter(drawn, np.int64, count)


def fill(rng: np.random.Generator, inputs: Int32[np.ndarray, " T"], vocab_size: int) -> None:
  """Puts random ids of the whole vocabulary where the input is 0."""
  free = inputs == 0
  inputs[free] = rng.integers(vocab_size, size=int(free.sum()), dtype=np.int32)
