"""Products of permutations: word problems of groups, and items that change places."""

import dataclasses
import functools
import itertools

import numpy as np
from jaxtyping import Int64

from attnlab import errors
from attnlab.errors import UserError
from attnlab.tasks.base import Example, Task, labelled, register

_GROUPS = {"s3": 3, "s4": 4, "a5": 5, "s5": 5}


@register("group_word")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupWord(Task):
  """Random elements of a group; the target at each is the product of all so far.

  As in DeltaProduct (arXiv:2502.10297, section 5): a first id that says nothing, then one id an element; trained on
  words of 128, evaluated to 512. Elements are numbered in the order of their permutations, the identity first; the
  product applies the earlier permutation first.

  Attributes:
    group: "s3", "s4", "a5" or "s5": permutations of three to five things, of a5 the even ones.
    everywhere: the product so far is a target at every element; False: at the last alone.
    swaps_only: draws the identity and exchanges of two things alone, which generate the group (not a5).
  """

  group: str = "s3"
  everywhere: bool = True
  swaps_only: bool = False

  def __post_init__(self):
    if self.group not in _GROUPS:
      raise errors.unknown("group of task 'group_word'", self.group, _GROUPS)
    if self.swaps_only and self.group == "a5":
      raise UserError("group_word: swaps are odd, and group='a5' has none: swaps_only=False")

  @property
  def vocab_size(self) -> int:
    return len(elements(self.group)) + 1

  def check(self, seq_len: int) -> None:
    del seq_len  # 2 at least, as everywhere

  def labels(self, seq_len: int) -> int:
    return seq_len - 1 if self.everywhere else 1

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    group = elements(self.group)
    drawn = np.arange(len(group))
    if self.swaps_only:
      drawn = np.flatnonzero((group != np.arange(group.shape[1])).sum(1) <= 2)
    word = rng.choice(drawn, seq_len - 1)
    table, product, products = _products(self.group), 0, []
    for g in word:
      product = int(table[product, g])
      products.append(product)
    inputs = np.append(len(group), word)
    where = np.arange(1, seq_len) if self.everywhere else np.array([seq_len - 1])
    return labelled(inputs, where, np.array(products)[where - 1])


@functools.lru_cache(maxsize=8)
def elements(group: str) -> Int64[np.ndarray, "n things"]:
  """The permutations of a group, in lexicographic order."""
  every = np.array(list(itertools.permutations(range(_GROUPS[group]))))
  if group != "a5":
    return every
  pairs = list(itertools.combinations(range(5), 2))
  inversions = np.sum([every[:, i] > every[:, j] for i, j in pairs], axis=0)
  return every[inversions % 2 == 0]


@functools.lru_cache(maxsize=8)
def _products(group: str) -> Int64[np.ndarray, "n n"]:
  """The number of the permutation that applies the first, then the second."""
  every = elements(group)
  number = {tuple(p): i for i, p in enumerate(every)}
  return np.array([[number[tuple(q[p])] for q in every] for p in every])


@register("state_exchange")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StateExchange(Task):
  """Items lie in places, pairs of places exchange what lies there, and what lies where is asked.

  The items in the order of their places, exchanges `a b` of two places, a mark, then every place once in any order,
  each with its item as target. (DeltaFormer's task, arXiv:2505.19488, whose own settings are not published.)
  Ids: 0 the mark, then places, then items.

  Attributes:
    items: items and places.
  """

  items: int = 5

  @property
  def vocab_size(self) -> int:
    return 2 * self.items + 1

  def check(self, seq_len: int) -> None:
    if self.items < 2:
      raise UserError(f"state_exchange: items={self.items} must be at least 2")
    if seq_len < 2 * self.items + 3:
      raise UserError(
        f"state_exchange: config.data.seq_len={seq_len} must be at least 2 * items + 3 = {2 * self.items + 3}"
      )

  def labels(self, seq_len: int) -> int:
    return self.items

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    n = self.items
    held = rng.permutation(n)
    start = held.copy()
    exchanges = np.array(
      [rng.choice(n, 2, replace=False) for _ in range((seq_len - 2 * n - 1) // 2)]
    )
    for a, b in exchanges:
      held[a], held[b] = held[b], held[a]
    asked = rng.permutation(n)
    inputs = np.concatenate([1 + n + start, 1 + exchanges.ravel(), [0], 1 + asked])
    return labelled(inputs, np.arange(len(inputs) - n, len(inputs)), 1 + n + held[asked])
