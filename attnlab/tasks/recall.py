"""Harder recall than MQAR's: keys that change their values, keys of two ids, and lookups that are chained."""

import dataclasses
import math

import numpy as np

from attnlab.errors import UserError
from attnlab.tasks.base import Example, Task, labelled, register
from attnlab.tasks.mqar import fill, gaps


@register("forgetting_mqar")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingMQAR(Task):
  """MQAR in which some keys get another value after all pairs; asked for is the last (Zoology's forgetting_mqar).

  `k1 v1 ... kn vn`, then `num_updates` of the keys with new values, then queries as in MQAR.

  Attributes:
    vocab_size: ids, half of them keys and half values.
    num_kv_pairs: keys, each asked for once.
    num_updates: keys that get a second value.
    power_a, random_non_queries: as in MQAR.
  """

  vocab_size: int = 8192
  num_kv_pairs: int = 8
  num_updates: int = 4
  power_a: float = 0.01
  random_non_queries: bool = True

  def check(self, seq_len: int) -> None:
    pairs, updates, half = self.num_kv_pairs, self.num_updates, self.vocab_size // 2
    if pairs < 1 or half - 1 < pairs or not 0 <= updates <= pairs:
      raise UserError(
        f"forgetting_mqar: num_kv_pairs={pairs} must lie between 1 and the {half - 1} keys of "
        f"vocab_size={self.vocab_size}, and num_updates={updates} between 0 and num_kv_pairs"
      )
    if self.vocab_size - half < pairs + updates:
      raise UserError(
        f"forgetting_mqar: {pairs + updates} values do not fit vocab_size={self.vocab_size}"
      )
    if seq_len % 2 or 4 * pairs + 2 * updates > seq_len:
      raise UserError(
        f"forgetting_mqar: config.data.seq_len={seq_len} must be even and at least "
        f"4 * num_kv_pairs + 2 * num_updates = {4 * pairs + 2 * updates}"
      )

  def labels(self, seq_len: int) -> int:
    return self.num_kv_pairs

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    pairs, half = self.num_kv_pairs, self.vocab_size // 2
    slots = pairs + self.num_updates
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    written = half + rng.choice(self.vocab_size - half, slots, replace=False)
    changed = rng.choice(pairs, self.num_updates, replace=False)
    values = written[:pairs].copy()
    values[changed] = written[pairs:]
    context = 2 * slots
    inputs = np.zeros(seq_len, np.int32)
    inputs[0:context:2], inputs[1:context:2] = np.concatenate([keys, keys[changed]]), written
    queries = context + 2 * gaps(rng, pairs, (seq_len - context) // 2, self.power_a)
    inputs[queries] = keys
    if self.random_non_queries:
      fill(rng, inputs, self.vocab_size)
    return labelled(inputs, queries, values)


@register("compositional_mqar")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompositionalMQAR(Task):
  """MQAR whose keys are two ids, neither of which alone says the value (Zoology's compositional_mqar).

  A grid of n x n keys `a b`, each followed by its value, in any order; then queries `a b`, 3g positions after the
  context, the value being the target at b.

  Attributes:
    vocab_size: ids, a third each for first ids, second ids and values.
    num_kv_pairs: keys, a square number.
    power_a, random_non_queries: as in MQAR.
  """

  vocab_size: int = 8192
  num_kv_pairs: int = 4
  power_a: float = 0.01
  random_non_queries: bool = True

  def check(self, seq_len: int) -> None:
    pairs, third = self.num_kv_pairs, self.vocab_size // 3
    side = math.isqrt(max(pairs, 0))
    if pairs < 1 or side * side != pairs or side > third - 1 or pairs > third:
      raise UserError(
        f"compositional_mqar: num_kv_pairs={pairs} must be a square number of at most "
        f"{third}, a third of vocab_size={self.vocab_size}"
      )
    if 6 * pairs > seq_len:
      raise UserError(
        f"compositional_mqar: config.data.seq_len={seq_len} must be at least 6 * num_kv_pairs = {6 * pairs}"
      )

  def labels(self, seq_len: int) -> int:
    return self.num_kv_pairs

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    pairs, third, side = self.num_kv_pairs, self.vocab_size // 3, math.isqrt(self.num_kv_pairs)
    first = 1 + rng.choice(third - 1, side, replace=False)
    second = third + rng.choice(third, side, replace=False)
    values = 2 * third + rng.choice(self.vocab_size - 2 * third, pairs, replace=False)
    cells = rng.permutation(pairs)
    a, b = first[cells // side], second[cells % side]
    context = 3 * pairs
    inputs = np.zeros(seq_len, np.int32)
    inputs[:context] = np.stack([a, b, values], axis=1).ravel()
    queries = context + 3 * gaps(rng, pairs, (seq_len - context) // 3, self.power_a)
    inputs[queries], inputs[queries + 1] = a, b
    if self.random_non_queries:
      fill(rng, inputs, self.vocab_size)
    return labelled(inputs, queries + 1, values)


@register("multi_hop_mqar")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiHopMQAR(Task):
  """MQAR with chained lookups: of pairs `x y`, what is x0's value, what is that one's, and so on?

  `num_chains` chains x0 -> x1 -> ... -> x_hops, as pairs `x_i x_i+1` in any order, a 0 after each; then a question a
  chain, at places as MQAR's: `x0 1 1 ...`, where x1 is the target at x0, x2 at the first 1, and so on. None of them
  follows in the input: whoever says x2 has looked x1 up, and then looked up what was found. (Ours: multi-hop recall is
  what large linear models were found to lose; no small task is published.)

  Chains cross nowhere, and each x_i has ids of its own, an equal share of the vocabulary, as MQAR's keys and values
  have: guessing among the row's ids that can be meant is right once in num_chains.

  All lookups on the way are targets. With the last alone, and ids of one kind, no model of ours learnt two.

  Attributes:
    vocab_size: ids.
    num_chains: with hops pairs each.
    hops: lookups of a chain, 1 to 4 in our experiments.
    asked: only this lookup of each question is a target; 0: all are.
    power_a, random_non_queries: as in MQAR.
  """

  vocab_size: int = 8192
  num_chains: int = 4
  hops: int = 2
  asked: int = 0
  power_a: float = 0.01
  random_non_queries: bool = False

  def check(self, seq_len: int) -> None:
    chains, hops = self.num_chains, self.hops
    if chains < 1 or hops < 1 or not 0 <= self.asked <= hops:
      raise UserError(
        f"multi_hop_mqar: num_chains={chains} and hops={hops} must be at least 1, and asked={self.asked} one of hops "
        "or 0"
      )
    if chains > self._ids:
      raise UserError(
        f"multi_hop_mqar: num_chains={chains} do not fit vocab_size={self.vocab_size}, which has {self._ids} ids for "
        f"each of {hops + 1} places in a chain"
      )
    if (needed := chains * (4 * hops + 1)) > seq_len:
      raise UserError(
        f"multi_hop_mqar: config.data.seq_len={seq_len} must be at least {needed}: 3 for each of "
        f"num_chains * hops = {chains * hops} pairs, {hops + 1} for each of {chains} questions"
      )

  @property
  def _ids(self) -> int:
    """Of each place in a chain; 0 and 1 are none's."""
    return (self.vocab_size - 2) // (self.hops + 1)

  def labels(self, seq_len: int) -> int:
    return self.num_chains * (1 if self.asked else self.hops)

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    chains, hops = self.num_chains, self.hops
    places = range(hops + 1)
    ids = [2 + i * self._ids + rng.choice(self._ids, chains, replace=False) for i in places]
    chain = np.stack(ids, axis=1)
    pairs = np.stack([chain[:, :-1], chain[:, 1:]], axis=-1).reshape(-1, 2)
    context = 3 * len(pairs)
    inputs = np.zeros(seq_len, np.int32)
    inputs[:context].reshape(-1, 3)[:, :2] = rng.permutation(pairs)
    slots = (seq_len - context) // (hops + 1)
    queries = context + (hops + 1) * gaps(rng, chains, slots, self.power_a)
    where = queries[:, None] + np.arange(hops)
    inputs[where] = 1
    inputs[queries] = chain[:, 0]
    if self.random_non_queries:
      fill(rng, inputs[context:], self.vocab_size)
    told = slice(self.asked - 1, self.asked) if self.asked else slice(None)
    return labelled(inputs, where[:, told].ravel(), chain[:, 1:][:, told].ravel())
