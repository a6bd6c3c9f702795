"""Synthetic tasks: the registry, and each task's meaning."""

import dataclasses

import numpy as np
import pytest

from attnlab import data, tasks
from attnlab.errors import UserError
from attnlab.tasks import Example, Task, TaskSource
from attnlab.tasks import base as tasks_base
from attnlab.tasks.mqar import gaps

SMALL = {
  "mqar": ({"vocab_size": 64, "num_kv_pairs": 4}, 32),
}


def source(name, args, seq_len, seed=0, split="train"):
  task = tasks.make(name, args)
  task.check(seq_len)
  return TaskSource(task, seq_len, seed, split)


@pytest.mark.parametrize("name", tasks.names())
def test_contract(name):
  """What holds of every task that registers itself."""
  args, seq_len = SMALL.get(name, ({}, 64))
  one = source(name, args, seq_len)
  size = tasks.make(name, args).vocab_size
  for i in range(20):
    e = one[i]
    for key in ("inputs", "targets", "segment_ids", "positions"):
      assert e[key].shape == (seq_len,) and e[key].dtype == np.int32, key
    assert e["weights"].shape == (seq_len,) and e["weights"].dtype == np.float32
    assert set(np.flatnonzero(e["weights"])) <= set(e["labels"]) and e["labels"].max() < seq_len
    assert len(set(e["labels"])) == len(e["labels"]) == one[0]["labels"].size
    assert e["weights"].sum() > 0 and not e["weights"][e["segment_ids"] == 0].any()
    for key in ("inputs", "targets"):
      assert e[key].min() >= 0 and e[key].max() < size
    assert e["index"] == i
  # A function of (seed, split, i): in any order, from any object; another of each gives another.
  again = source(name, args, seq_len)
  _ = [again[i] for i in range(5)]
  np.testing.assert_array_equal(again[17]["inputs"], one[17]["inputs"])
  others = [source(name, args, seq_len, seed=1)[17], one[18]]
  others.append(source(name, args, seq_len, split="validation")[17])
  for other in others:
    assert (other["inputs"] != one[17]["inputs"]).any()


def test_unknown_names_and_arguments():
  with pytest.raises(
    UserError, match="unknown task .* 'mqarr': did you mean 'mqar'.* known: .*mqar"
  ):
    tasks.make("mqarr", {})
  with pytest.raises(UserError, match="'vocab': did you mean 'vocab_size'"):
    tasks.make("mqar", {"vocab": 5})
  with pytest.raises(UserError, match="takes a bool, such as True"):
    tasks.make("mqar", {"random_non_queries": 1})
  with pytest.raises(UserError, match="train_examples=0: at least 1"):
    tasks.make("mqar", {"train_examples": 0})
  assert tasks.make("mqar", {"power_a": 1}).power_a == 1.0  # An int where a float is meant.


def test_adding_a_task(monkeypatch):
  """One class is all it takes; shorter examples are padded."""
  monkeypatch.setattr(tasks_base, "_TASKS", dict(tasks_base._TASKS))

  @tasks.register("ones")
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Ones(Task):
    length: int = 3
    vocab_size = 2

    def check(self, seq_len):
      if self.length > seq_len:
        raise UserError("too long")

    def example(self, rng, seq_len):
      ids = np.ones(self.length, np.int32)
      return Example(ids, ids, np.ones(self.length))

  e = source("ones", {}, 5)[0]
  assert list(e["inputs"]) == list(e["segment_ids"]) == [1, 1, 1, 0, 0]
  assert list(e["positions"]) == [0, 1, 2, 0, 0] and list(e["weights"]) == [1, 1, 1, 0, 0]
  with pytest.raises(UserError, match="too long"):
    source("ones", {"length": 9}, 5)
  with pytest.raises(ValueError, match="two tasks are called 'ones'"):
    tasks.register("ones")(type("Twos", (Ones,), {}))


def test_validation_examples_have_a_seed_of_their_own():
  """Settings are chosen on one set, results told of another; neither depends on the run's seed."""
  keys = dict(name="task", seq_len=32, task="mqar", task_args=SMALL["mqar"][0])

  def first(validation_seed, seed, split="validation"):
    source = data.open_source(keys | {"validation_seed": validation_seed}, split, seed)
    return source[0]["inputs"].tolist()

  assert first(0, 0) == first(0, 1) != first(1, 0)
  assert first(0, 0, "train") == first(1, 0, "train") != first(0, 1, "train")


# --- MQAR ---------------------------------------------------------------------------------------


def solve_mqar(inputs, pairs, queries):
  """The answer at each query, from the inputs alone: what follows the key in the pairs."""
  memory = {int(inputs[2 * j]): int(inputs[2 * j + 1]) for j in range(pairs)}
  return [memory[int(inputs[q])] for q in queries]


@pytest.mark.parametrize("random_non_queries", [False, True])
@pytest.mark.parametrize(
  ("vocab_size", "seq_len", "pairs"), [(8192, 64, 4), (8192, 512, 64), (64, 32, 8), (33, 60, 15)]
)
def test_mqar_is_solved_by_lookup(vocab_size, seq_len, pairs, random_non_queries):
  args = dict(vocab_size=vocab_size, num_kv_pairs=pairs, random_non_queries=random_non_queries)
  examples = source("mqar", args, seq_len)
  for i in range(50):
    e = examples[i]
    x, y, w = e["inputs"], e["targets"], e["weights"]
    keys, values = x[0 : 2 * pairs : 2], x[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert keys.min() >= 1 and keys.max() < vocab_size // 2
    assert values.min() >= vocab_size // 2 and values.max() < vocab_size
    queries = np.flatnonzero(w)
    assert set(w) == {0.0, 1.0} and len(queries) == pairs  # Each pair is asked for once.
    assert queries.min() >= 2 * pairs and not (queries % 2).any()
    assert sorted(x[queries]) == sorted(keys)
    assert solve_mqar(x, pairs, queries) == list(y[queries])
    free = np.setdiff1d(np.arange(2 * pairs, seq_len), queries)
    if not random_non_queries:
      assert not x[free].any()


def test_mqar_gaps_follow_the_power_law():
  """With one query the gap's law is the formula itself; with power_a = 1 it is uniform."""
  for power_a in (0.01, 1.0):
    examples = source("mqar", dict(vocab_size=64, num_kv_pairs=1, power_a=power_a), 42)
    n, space = 4000, 20
    found = [(int(np.flatnonzero(examples[i]["weights"])[0]) - 2) // 2 for i in range(n)]
    law = np.array([(g + 1) ** (power_a - 1) for g in range(space)])
    law /= law.sum()
    counts = np.bincount(found, minlength=space)
    # Chi-squared with 19 degrees of freedom exceeds 43.8 once in a thousand; the seed is fixed.
    assert ((counts - n * law) ** 2 / (n * law)).sum() < 43.8


def test_gaps_are_numpys_choice():
  """The same numbers from the same generator: examples are what they were when numpy drew them."""
  for seed, (count, space, power_a) in enumerate(
    [(16, 16, 0.01), (6, 10, 0.01), (64, 128, 1.0), (1, 1, 0.1)] * 20
  ):
    ours, numpys = (np.random.default_rng(seed) for _ in range(2))
    law = np.arange(1, space + 1) ** (power_a - 1)
    expected = numpys.choice(space, count, replace=False, p=law / law.sum())
    np.testing.assert_array_equal(gaps(ours, count, space, power_a), expected)
    assert ours.random() == numpys.random()
  with pytest.raises(ValueError, match="5 different numbers below 4"):
    gaps(np.random.default_rng(0), 5, 4, 1.0)


def test_mqar_fills_with_the_whole_vocabulary():
  examples = source("mqar", dict(vocab_size=16, num_kv_pairs=2), 64)
  seen = set(np.concatenate([examples[i]["inputs"][4:] for i in range(40)]).tolist())
  assert seen == set(range(16))


@pytest.mark.parametrize(
  ("args", "seq_len", "message"),
  [
    ({"num_kv_pairs": 8}, 30, "at least 4"),
    ({"num_kv_pairs": 4}, 33, "even"),
    ({"vocab_size": 16, "num_kv_pairs": 8}, 64, "the 7 keys of vocab_size=16"),
    ({"num_kv_pairs": 0}, 64, "between 1"),
  ],
)
def test_mqar_bad_parameters(args, seq_len, message):
  with pytest.raises(UserError, match=message):
    source("mqar", args, seq_len)


def test_mqar_rows_of_several_lengths():
  args = dict(vocab_size=64, num_kv_pairs=4, min_length=16, random_non_queries=False)
  one = source("mqar", args, 32)
  lengths = {int((one[i]["segment_ids"] > 0).sum()) for i in range(60)}
  assert lengths == set(range(16, 33, 2))
  with pytest.raises(UserError, match="min_length=12 must lie between 4 \\* num_kv_pairs = 16"):
    tasks.make("mqar", args | {"min_length": 12}).check(32)


def test_label_slots_are_places_without_labels():
  """Two tasks with equally many have batches of one shape; labels and weights are what they were."""
  few, many = (source("mqar", SMALL["mqar"][0] | {"label_slots": n}, 32)[3] for n in (0, 20))
  assert few["labels"].size == 4 and many["labels"].size == len(set(many["labels"])) == 20
  np.testing.assert_array_equal(few["labels"], many["labels"][:4])
  np.testing.assert_array_equal(few["weights"], many["weights"])
