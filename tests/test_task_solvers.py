"""Every task is solved by a hand-written program that sees the inputs alone: where labels are, and what they are."""

import functools
import itertools
from collections import defaultdict

import numpy as np
import pytest

from attnlab import tasks
from attnlab.errors import UserError
from attnlab.tasks import TaskSource
from attnlab.tasks.groups import elements

# A solver takes a task and a row's inputs and gives {position: answer}. Positions it need not find by itself where the
# task draws them (queries among random ids): then it takes them from the labels.


def pairs_then_queries(task, x, where, context):
  memory = {}
  for k, v in zip(x[0:context:2], x[1:context:2], strict=True):
    memory[k] = v
  return {q: memory[x[q]] for q in where}


def mqar(task, x, where):
  return pairs_then_queries(task, x, where, 2 * task.num_kv_pairs)


def forgetting_mqar(task, x, where):
  return pairs_then_queries(task, x, where, 2 * (task.num_kv_pairs + task.num_updates))


def compositional_mqar(task, x, where):
  context = x[: 3 * task.num_kv_pairs].reshape(-1, 3)
  memory = {(a, b): v for a, b, v in context}
  return {q: memory[x[q - 1], x[q]] for q in where}


def multi_hop_mqar(task, x, where):
  context = 3 * task.num_chains * task.hops
  follows = dict(zip(x[0:context:3], x[1:context:3], strict=True))
  assert not x[2:context:3].any()
  out, found, lookup = {}, 0, 0
  for q in range(context, len(x)):
    if x[q]:
      found = follows[found if x[q] == 1 else x[q]]
      lookup = lookup + 1 if x[q] == 1 else 1
      if task.asked in (0, lookup):
        out[q] = found
  return out


def palindrome(task, x, where):
  n = list(x).index(0)
  return {n + i: x[n - 1 - i] for i in range(n)}


def stack(task, x, where):
  stacks, out = defaultdict(list), {}
  for i in range(0, len(x) - 2, 3):
    operation, name, element = x[i : i + 3]
    if operation == 0:
      stacks[name].append(element)
    else:
      out[i + 1] = stacks[name].pop()
      assert out[i + 1] == element
  return out


def in_context_recall(task, x, where):
  memory, out = {}, {}
  half = (task.vocab_size - task.noise_vocab_size) // 2
  for i in range(0, len(x), 2):
    k, v = x[i : i + 2]
    if k < half:
      if k in memory:
        out[i] = memory[k]
      memory[k] = v
  return out


def fuzzy_recall(task, x, where):
  """Runs of key ids and of value ids in turn. The last value's last id is a target only."""
  pad, half = task.vocab_size - 1, (task.vocab_size - 1) // 2
  begin = int(np.argmax(x != pad))
  runs = [list(g) for _, g in itertools.groupby(range(begin, len(x)), lambda i: x[i] < half)]
  if x[runs[-1][0]] < half:
    runs.append([])  # a last value of one id
  memory, out = {}, {}
  for key, value in itertools.batched(runs, 2):
    name = tuple(x[key])
    for j, answer in enumerate(memory.get(name, ())):
      out[key[-1] + j] = answer
    memory.setdefault(name, tuple(x[value]))
  return out


@functools.cache
def memorized(task):
  """What training is for: all examples together say it."""
  source = TaskSource(task, 32, 0, "train")
  rows = [source[i] for i in range(60)]
  return {k: v for e in rows for k, v in zip(e["inputs"][::2], e["targets"][1::2], strict=True)}


def memorization(task, x, where):
  return {i: memorized(task)[x[i - 1]] for i in range(1, len(x), 2)}


def compression(task, x, where):
  n = len(x) // 2
  return {n + i: x[i] for i in range(n)}


def selective_copy(task, x, where):
  mark = list(x).index(task.vocab_size - 1)
  return dict(enumerate((i for i in x[:mark] if i != task.vocab_size - 2), mark + 1))


def parity(task, x, where):
  return {where[-1]: x[: where[-1] + 1].sum() % 2}


def arithmetic(task, x, where):
  marks = "+-*=" if task.vocab_size == task.modulus + 4 else "+-*()="
  symbols = [str(i) for i in range(task.modulus)] + list(marks)
  (end,) = where
  text = "".join(symbols[i] for i in x[: end + 1])
  assert text.endswith("=")
  return {end: eval(text[:-1]) % task.modulus}


def group_word(task, x, where):
  permutations = [tuple(p) for p in elements(task.group)]
  state = tuple(range(len(permutations[0])))
  out = {}
  for i in range(1, len(x)):
    state = tuple(permutations[x[i]][s] for s in state)
    out[i] = permutations.index(state)
  return out if task.everywhere else {i: out[i]}


def state_exchange(task, x, where):
  n, mark = task.items, list(x).index(0)
  held = list(x[:n])
  for a, b in x[n:mark].reshape(-1, 2) - 1:
    held[a], held[b] = held[b], held[a]
  return {mark + 1 + i: held[x[mark + 1 + i] - 1] for i in range(n)}


def needle(task, x, where):
  (at,) = np.flatnonzero(x == 0)
  (ask,) = np.flatnonzero(x == 1)
  assert x[at + 1] == x[ask + 1]
  return {ask + 1 + i: x[at + 2 + i] for i in range(task.value_size)}


def regbench(task, x, where):
  """With one edge a state, every word is the beginning of the longest."""
  ends = np.flatnonzero(x == task.symbols)
  words = [x[a + 1 : b] for a, b in itertools.pairwise([*ends, len(x)])]
  longest = max(words, key=len)
  places = {i: i - a for a, b in itertools.pairwise([*ends, len(x)]) for i in range(a, b)}
  return {i: longest[places[i]] for i in where if places[i] < len(longest)}


SOLVED = [
  ("mqar", dict(vocab_size=64, num_kv_pairs=4), 32, mqar),
  ("forgetting_mqar", dict(vocab_size=64, num_kv_pairs=5, num_updates=3), 32, forgetting_mqar),
  ("forgetting_mqar", dict(vocab_size=64, num_kv_pairs=5, num_updates=0), 32, forgetting_mqar),
  ("compositional_mqar", dict(vocab_size=60, num_kv_pairs=9), 61, compositional_mqar),
  ("multi_hop_mqar", dict(vocab_size=64, num_chains=3, hops=1), 32, multi_hop_mqar),
  ("multi_hop_mqar", dict(vocab_size=64, num_chains=3, hops=4), 51, multi_hop_mqar),
  ("multi_hop_mqar", dict(vocab_size=14, num_chains=3, hops=3, asked=2), 45, multi_hop_mqar),
  ("palindrome", {}, 64, palindrome),
  ("stack", {}, 64, stack),
  ("stack", dict(stacks=3, elements=5), 100, stack),
  ("in_context_recall", {}, 64, in_context_recall),
  ("noisy_recall", {}, 64, in_context_recall),
  ("fuzzy_recall", {}, 128, fuzzy_recall),
  ("fuzzy_recall", dict(vocab_size=9, key_size=1, value_size=2), 31, fuzzy_recall),
  ("memorization", {}, 32, memorization),
  ("compression", {}, 32, compression),
  ("selective_copy", {}, 64, selective_copy),
  ("selective_copy", dict(vocab_size=3, num_tokens_to_copy=5), 11, selective_copy),
  ("parity", {}, 40, parity),
  ("modular_arithmetic", {}, 40, arithmetic),
  ("modular_arithmetic_brackets", {}, 40, arithmetic),
  ("modular_arithmetic_brackets", dict(multiply=False, modulus=7), 64, arithmetic),
  ("group_word", {}, 32, group_word),
  ("group_word", dict(group="s4"), 32, group_word),
  ("group_word", dict(group="a5"), 32, group_word),
  ("group_word", dict(group="s5", swaps_only=True), 32, group_word),
  ("group_word", dict(everywhere=False), 32, group_word),
  ("state_exchange", {}, 40, state_exchange),
  ("needle_retention", {}, 64, needle),
  ("needle_filtering", {}, 64, needle),
  ("needle_memorisation", {}, 64, needle),
  ("regbench", dict(max_edges=1), 256, regbench),
]


@pytest.mark.parametrize(("name", "args", "seq_len", "solver"), SOLVED)
def test_solved(name, args, seq_len, solver):
  task = tasks.make(name, args)
  task.check(seq_len)
  source = TaskSource(task, seq_len, 0, "train")
  for i in range(40):
    e = source[i]
    used = int(e["segment_ids"].sum())
    x, where = e["inputs"][:used], np.flatnonzero(e["weights"])
    answers = solver(task, x, where)
    if name == "regbench":  # What no word has shown yet cannot be answered.
      where = np.array(sorted(answers))
      assert len(where) > used / 4
    assert sorted(answers) == list(where)
    assert [answers[j] for j in where] == list(e["targets"][where])


def test_every_task_is_solved():
  assert {name for name, *_ in SOLVED} == set(tasks.names())


# What the solvers do not show.


def test_lengths_of_expressions_are_uniform():
  source = TaskSource(tasks.make("parity", dict(min_length=3, max_length=6)), 16, 0, "train")
  lengths = [int(source[i]["segment_ids"].sum()) for i in range(400)]
  assert set(lengths) == {3, 4, 5, 6}
  assert min(np.bincount(lengths)[3:]) > 60  # of 100; five standard deviations are 43
  everywhere = TaskSource(tasks.make("parity", dict(everywhere=True)), 16, 0, "train")[0]
  n = int(everywhere["weights"].sum())
  assert list(everywhere["targets"][:n]) == list(np.cumsum(everywhere["inputs"][:n]) % 2)


@pytest.mark.parametrize(("group", "order"), [("s3", 6), ("s4", 24), ("a5", 60), ("s5", 120)])
def test_groups(group, order):
  every = {tuple(p) for p in elements(group)}
  assert len(every) == order and min(every) == tuple(range(len(min(every))))
  assert all(tuple(q[i] for i in p) in every for p in every for q in list(every)[:7])


def test_automata_take_their_edges():
  """A language's words are paths of one automaton, which has at most as many edges as allowed."""
  task = tasks.make("regbench", {})
  for i in range(20):
    edges = task.automaton(np.random.default_rng(i))
    assert 2 <= len(edges) <= 12 and all(1 <= len(e) <= 4 for e in edges)
    line = list(task.example(np.random.default_rng(i), 256).inputs)
    state = 0
    for symbol in line:
      state = 0 if symbol == task.symbols else edges[state][int(symbol)]


def test_needles_lie_anywhere():
  source = TaskSource(tasks.make("needle_filtering", {}), 24, 0, "train")
  places = [int(np.flatnonzero(source[i]["inputs"] == 0)[0]) for i in range(400)]
  assert set(places) == set(range(20))


def test_a_stack_is_popped_as_often_as_it_can_be():
  source = TaskSource(tasks.make("stack", {}), 600, 0, "train")
  pops = np.mean([source[i]["weights"].sum() / 200 for i in range(20)])
  assert 0.4 < pops < 0.5


@pytest.mark.parametrize(
  ("name", "args", "seq_len", "message"),
  [
    ("forgetting_mqar", dict(num_updates=9), 64, "num_updates=9 between 0"),
    ("forgetting_mqar", {}, 38, "at least .* = 40"),
    ("compositional_mqar", dict(num_kv_pairs=5), 64, "square"),
    ("compositional_mqar", {}, 20, "6 \\* num_kv_pairs = 24"),
    ("multi_hop_mqar", dict(vocab_size=12), 64, "num_chains=4 do not fit .* 3 ids for each of 3"),
    ("multi_hop_mqar", dict(asked=3), 64, "asked=3 one of hops or 0"),
    ("multi_hop_mqar", {}, 35, "at least 36: 3 .* = 8 pairs, 3 for each of 4"),
    ("palindrome", {}, 33, "even"),
    ("palindrome", dict(vocab_size=1), 32, "at least 2"),
    ("stack", dict(stacks=0), 32, "at least 1"),
    ("stack", {}, 5, "at least 6"),
    ("in_context_recall", dict(frac_noise=0.5), 32, "needs noise_vocab_size"),
    ("noisy_recall", dict(vocab_size=17), 32, "exceed"),
    ("in_context_recall", {}, 31, "even"),
    ("fuzzy_recall", dict(key_size=8), 64, "between 1 and the 7"),
    ("fuzzy_recall", {}, 11, "at least 12"),
    ("memorization", {}, 31, "even"),
    ("compression", {}, 31, "even"),
    ("selective_copy", {}, 32, "= 33"),
    ("parity", dict(min_length=2), 32, "between 3 and"),
    ("parity", dict(max_length=64), 32, "config.data.seq_len=32"),
    ("modular_arithmetic", dict(modulus=1), 32, "at least 2"),
    ("group_word", dict(group="s6"), 32, "s5"),
    ("group_word", dict(group="a5", swaps_only=True), 32, "swaps are odd"),
    ("state_exchange", dict(items=1), 32, "at least 2"),
    ("state_exchange", {}, 12, "= 13"),
    ("needle_retention", dict(vocab_size=4), 32, "at least 8"),
    ("needle_memorisation", {}, 19, "= 20"),
    ("regbench", dict(max_states=19), 32, "between 2 and symbols"),
    ("regbench", dict(max_edges=0), 32, "at least 1"),
    ("regbench", dict(min_words=30), 32, "in order"),
  ],
)
def test_bad_parameters(name, args, seq_len, message):
  with pytest.raises(UserError, match=message):
    tasks.make(name, args).check(seq_len)
