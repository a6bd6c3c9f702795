"""Packing, order, splits and resuming of the batches."""

import collections
import concurrent.futures
import json
import threading

import grain
import numpy as np
import pytest

from attnlab import data
from attnlab.data import files
from attnlab.errors import UserError

EOS, BOS = 257, 256
LENGTHS = (1, 2, 31, 32, 33, 64, 95, 96, 97, 5, 7, 11, 300, 13)


@pytest.fixture
def docs(tmp_path):
  """A directory of short text files, each of a text of its own; rows of 32 make all kinds of cuts."""
  root = tmp_path / "docs"
  (root / "sub").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i, n in enumerate(LENGTHS):
    text = "".join(rng.choice(list("abcdefgh ü\n"), n))
    (root / ("sub" if i % 2 else "") / f"{i:02}.txt").write_text(text, "utf-8")
  return root


@pytest.fixture
def held(tmp_path):
  """Validation files apart, so that `docs` are all training data."""
  path = tmp_path / "held"
  path.mkdir()
  for i, n in enumerate((40, 3, 77, 30)):
    (path / f"{i}.txt").write_text("xyz"[i % 3] * n)
  return path


def config(**keys):
  c = data.data_config()
  c.seq_len, c.shuffle_tokens = 32, 0
  c.update(keys)
  return c


def iterate(c, split="train", **kwargs):
  return data.make_iterator(c, split=split, **{"batch_size": 4, "seed": 0} | kwargs)


def take(it, n):
  return [next(it) for _ in range(n)]


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for k in x:
      np.testing.assert_array_equal(x[k], y[k], err_msg=k)


def contents(root):
  return sorted(p.read_bytes() for p in root.rglob("*.txt"))


def targets_of(batches):
  return np.concatenate([b["targets"][b["weights"] > 0] for b in batches])


def documents_of(targets):
  """The documents in a stream of targets; what follows the last end of a document is left out."""
  ends = np.flatnonzero(targets == EOS)
  return [
    targets[a:b].astype(np.uint8).tobytes() for a, b in zip([0, *ends + 1], ends, strict=False)
  ]


def check_batch(b, rows, seq_len):
  """What holds of every batch of text, token by token."""
  shape = (rows, seq_len)
  for key in ("inputs", "targets", "segment_ids", "positions"):
    assert b[key].shape == shape and b[key].dtype == np.int32, key
  assert b["weights"].shape == shape and b["weights"].dtype == np.float32
  assert b["index"].shape == (rows,) and b["index"].dtype == np.int32
  for r in range(rows):
    x, y, w, s, p = (b[k][r] for k in ("inputs", "targets", "weights", "segment_ids", "positions"))
    for t in range(seq_len):
      assert w[t] == (s[t] > 0)
      if not s[t]:
        assert x[t] == y[t] == p[t] == 0 and not s[t:].any()
        continue
      same = t > 0 and s[t - 1] == s[t]
      assert p[t] == (p[t - 1] + 1 if same else 0)
      assert s[t] == (s[t - 1] if same else (s[t - 1] if t else 0) + 1)
      if same:
        assert x[t] == y[t - 1] and y[t - 1] != EOS  # The next token, within one document.
      else:
        assert x[t] == BOS or t == 0  # A document's start, or its continuation at a row's start.


def test_packing_invariants(docs, held):
  c = config(train=str(docs), validation=str(held))
  for b in take(iterate(c), 15):
    check_batch(b, 4, 32)
    assert (b["segment_ids"] > 0).all()  # No padding while documents go on.
  last = list(iterate(c, "validation"))
  for b in last:
    check_batch(b, 4, 32)


def test_every_document_once_an_epoch(docs, held):
  c = config(train=str(docs), validation=str(held))
  total = sum(len(d) + 1 for d in contents(docs))
  targets = targets_of(take(iterate(c), 3 * total // (4 * 32) + 1))
  found = documents_of(targets)[: 3 * len(LENGTHS)]
  epochs = [found[i : i + len(LENGTHS)] for i in range(0, len(found), len(LENGTHS))]
  assert [sorted(e) for e in epochs] == [contents(docs)] * 3
  assert epochs[0] != epochs[1] != epochs[2]  # Shuffled anew: equal by chance once in 14!.


def test_row_shuffle_keeps_every_row(docs, held):
  """Shuffled rows are the packed rows, in another order within windows."""
  c = config(train=str(docs), validation=str(held))

  def rows(batches):
    return [tuple(r) for b in batches for r in b["inputs"]]

  plain = rows(take(iterate(c), 16))
  c.shuffle_tokens = 16 * 32
  mixed = rows(take(iterate(c), 16))
  for i in range(0, 64, 16):
    assert sorted(plain[i : i + 16]) == sorted(mixed[i : i + 16])
  assert plain != mixed


def test_validation_is_finite_fixed_and_complete(docs, held):
  c = config(train=str(docs), validation=str(held), shuffle_tokens=1024)
  batches = list(iterate(c, "validation"))
  assert_same(batches, list(iterate(c, "validation", seed=5)))
  c.shuffle_tokens = 0
  assert sorted(documents_of(targets_of(iterate(c, "validation")))) == contents(held)
  padding = ~batches[-1]["segment_ids"].any(1)
  assert padding.any() and (batches[-1]["index"][padding] == -1).all()
  assert (batches[-1]["index"][~padding] >= 0).all()


def test_validation_again_by_rewinding(docs, held):
  it = iterate(config(train=str(docs), validation=str(held)), "validation")
  start = it.get_state()
  first = list(it)
  it.set_state(start)
  assert_same(first, list(it))


@pytest.mark.parametrize("shuffle_tokens", [0, 320])
def test_resume_is_exact(docs, held, shuffle_tokens):
  c = config(train=str(docs), validation=str(held), shuffle_tokens=shuffle_tokens)
  it, states, batches = iterate(c, seed=3), [], []
  assert isinstance(it, grain.DatasetIterator)
  for _ in range(24):
    states.append(json.dumps(it.get_state()))  # As orbax stores it: tuples come back as lists.
    batches.append(next(it))
  for step in range(0, 20):
    again = iterate(c, seed=3)
    again.set_state(json.loads(states[step]))
    assert json.dumps(again.get_state()) == states[step]
    assert_same(take(again, 4), batches[step : step + 4])


def test_resume_where_documents_fill_rows(tmp_path, held):
  """Every row ends with a document: the packer holds no remainder at any checkpoint."""
  root = tmp_path / "even"
  root.mkdir()
  for i in range(8):
    (root / f"{i}.txt").write_text(chr(ord("a") + i) * 31)
  c = config(train=str(root), validation=str(held))
  it, states, batches = iterate(c, batch_size=1), [], []
  for _ in range(20):
    states.append(json.dumps(it.get_state()))
    batches.append(next(it))
  for step in range(16):
    again = iterate(c, batch_size=1)
    again.set_state(json.loads(states[step]))
    assert_same(take(again, 4), batches[step : step + 4])


def test_resume_within_one_iterator(docs, held):
  it = iterate(config(train=str(docs), validation=str(held)))
  take(it, 5)
  state = it.get_state()
  ahead = take(it, 5)
  it.set_state(state)
  assert_same(ahead, take(it, 5))


@pytest.mark.parametrize(
  ("change", "word"), [({"seq_len": 16}, "seq_len"), ({"train": "other"}, "records")]
)
def test_resume_refuses_other_data(docs, held, change, word):
  state = iterate(config(train=str(docs), validation=str(held))).get_state()
  if "train" in change:
    (docs / "new.txt").write_text("one more")
    change = {}
  other = iterate(config(train=str(docs), validation=str(held), **change))
  with pytest.raises(UserError, match=word):
    other.set_state(state)


def test_resume_after_the_data_moved(docs, held, tmp_path):
  c = config(train=str(docs), validation=str(held))
  it = iterate(c)
  next(it)
  state = it.get_state()
  expected = next(it)
  docs.rename(tmp_path / "moved")
  again = iterate(config(train=str(tmp_path / "moved"), validation=str(held)))
  again.set_state(state)
  assert_same([next(again)], [expected])


def test_seed_decides_the_order(docs, held):
  c = config(train=str(docs), validation=str(held))
  assert_same(take(iterate(c, seed=1), 4), take(iterate(c, seed=1), 4))
  assert (next(iterate(c, seed=1))["inputs"] != next(iterate(c, seed=2))["inputs"]).any()


def test_processes_share_the_documents(docs, held):
  c = config(train=str(docs), validation=str(held))
  per_epoch = len(LENGTHS) // 2
  total = sum(len(d) + 1 for d in contents(docs))
  seen = []
  for p in range(2):
    it = iterate(c, share=(p, 2))
    batches = take(it, total // 64 + 1)
    assert batches[0]["inputs"].shape == (2, 32)
    seen += documents_of(targets_of(batches))[:per_epoch]
  assert sorted(seen) == contents(docs)


def test_validation_batches_do_not_depend_on_processes(docs, held):
  c = config(train=str(docs), validation=str(held))
  whole = list(iterate(c, "validation"))
  parts = [list(iterate(c, "validation", share=(p, 2))) for p in range(2)]
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
  assert_same(whole, joined)


def test_index_names_the_first_document(docs, held):
  c = config(train=str(docs), validation=str(held))
  for b in take(iterate(c), 8):
    for row in range(4):
      name = data.record_name(c, "train", b["index"][row])
      text = open(name, "rb").read() + bytes([0])  # A byte for the end of the document.
      n = int((b["segment_ids"][row] == 1).sum())
      ids = b["targets"][row, :n]
      assert bytes(np.where(ids == EOS, 0, ids).astype(np.uint8)) in text


@pytest.mark.parametrize("seq_len", [2, 9])
def test_long_file_is_read_in_pieces(tmp_path, monkeypatch, seq_len):
  """Pieces of a long file lose and repeat nothing, and cut no character in two."""
  monkeypatch.setattr("attnlab.data.text.PIECE_BYTES", 50)
  text = "aü€😀\n" * 200
  (tmp_path / "one.txt").write_text(text, "utf-8")
  c = config(train=str(tmp_path / "one.txt"), validation_fraction=0.25, seq_len=seq_len)
  parts = {}
  for split in ("train", "validation"):
    source = data.open_source(c, split)
    parts[split] = [source.text(i) for i in range(len(source))]
    assert len(source) > 1
  assert "".join(parts["train"] + parts["validation"]) == text
  assert 0.2 < sum(map(len, parts["validation"])) / len(text) < 0.3


def test_split_is_the_same_everywhere_and_stable():
  names = [f"{i}.txt" for i in range(1000)]
  one = files.in_validation(names, [1] * 1000, 0.1, "train")
  assert 60 < one.sum() < 140  # Binomial(1000, 0.1) +- 4 sigma.
  more = files.in_validation([*names, "new.txt"], [1] * 1001, 0.1, "train")
  np.testing.assert_array_equal(one, more[:-1])  # Nothing moves when data is added.
  rows = files.in_validation(["a.jsonl"], [10_000], 0.1, "train")
  assert 880 < rows.sum() < 1120
  # Written down, so that another machine or version cannot choose otherwise unnoticed.
  modules = ["abc.py", "argparse.py", "ast.py", "asyncio/events.py", "base64.py", "bdb.py"]
  mask = files.in_validation(modules, [1] * 6, 0.5, "train")
  assert [m for m, v in zip(modules, mask, strict=True) if v] == [
    "argparse.py",
    "base64.py",
    "bdb.py",
  ]


def test_split_never_leaves_a_side_empty():
  for names in (["a", "b"], ["x", "y", "z"]):
    for fraction in (1e-9, 1 - 1e-9):
      mask = files.in_validation(names, [1] * len(names), fraction, "train")
      assert 0 < mask.sum() < len(names)


def test_default_is_the_standard_library():
  c = data.data_config()
  names, size = {}, 0
  for split in ("train", "validation"):
    source = data.open_source(c, split)
    names[split] = {source.name(i) for i in range(len(source))}
    assert all(n.endswith(".py") for n in names[split])
    size += sum(len(source.text(i)) for i in range(len(source)))
  assert not names["train"] & names["validation"]
  everything = {n.replace("\\", "/") for n in names["train"] | names["validation"]}
  assert any(n.endswith("/argparse.py") for n in everything)
  assert not any("/test/" in n or "site-packages" in n or "/idlelib/" in n for n in everything)
  assert size > 4_000_000
  b = next(data.make_iterator(c, split="train", batch_size=8, seed=0))
  check_batch(b, 8, c.seq_len)
  assert "self" in data.tokenizer(c).decode(targets_of([b]))


def test_task_batches(tmp_path):
  c = config(name="task", task="mqar", task_args={"vocab_size": 64, "num_kv_pairs": 4})
  c.task_args.train_examples, c.task_args.validation_examples = 10, 7
  it, states, batches = iterate(c), [], []
  for _ in range(8):
    states.append(json.dumps(it.get_state()))
    batches.append(next(it))
  again = iterate(c)
  again.set_state(json.loads(states[3]))
  assert_same(take(again, 5), batches[3:])
  index = np.concatenate([b["index"] for b in batches])
  assert sorted(index[:10]) == sorted(index[10:20]) == list(range(10))
  assert list(index[:10]) != list(index[10:20])
  held = list(iterate(c, "validation"))
  assert [list(b["index"]) for b in held] == [[0, 1, 2, 3], [4, 5, 6, -1]]
  assert held[-1]["weights"][-1].sum() == 0
  assert_same(held, list(iterate(c, "validation", seed=9)))
  halves = [list(iterate(c, "validation", share=(p, 2))) for p in range(2)]
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
  assert_same(held, joined)
  assert data.tokenizer(c).vocab_size == 64


def test_garbage_waits_for_nobody(docs):
  """An iterator is collected while its threads need a lock that the collecting thread may hold; another stops them."""

  def reading():
    return {t for t in threading.enumerate() if t.name.startswith("grain-thread-prefetch")}

  others = reading()  # of iterators that other tests hold
  left = [iterate(config(train=str(docs)))]
  collected = threading.Thread(target=left.clear, daemon=True)
  with concurrent.futures.thread._global_shutdown_lock:
    left[0]._parent.start_prefetch()
    collected.start()
    collected.join(10)
    waited = collected.is_alive()
  assert not waited
  ours = reading() - others
  assert ours
  iterate(config(train=str(docs)))
  assert not ours & reading()


@pytest.mark.slow
def test_workers_resume_exactly(docs, held):
  c = config(train=str(docs), validation=str(held), workers=2, shuffle_tokens=128)
  it = iterate(c)
  states, batches = [], []
  for _ in range(12):
    states.append(json.dumps(it.get_state()))
    batches.append(next(it))
  for b in batches:
    check_batch(b, 4, 32)
  counts = collections.Counter(documents_of(targets_of(batches)))
  assert len(counts) > 5
  it.close()
  again = iterate(c)
  again.set_state(json.loads(states[7]))
  assert_same(take(again, 5), batches[7:])
  again.close()
