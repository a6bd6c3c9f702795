"""JSON lines, Parquet, token shards and tokenizers; and everything that a user can get wrong."""

import json
import pickle

import numpy as np
import pytest

from attnlab import data, tokenizer
from attnlab.data.files import find
from attnlab.data.parquet import ShuffleBlocks
from attnlab.data.source import shifted
from attnlab.data.text import JsonLines
from attnlab.errors import UserError

TEXTS = [f"document {i}: " + "x" * (7 * i % 50) for i in range(60)]


def config(**keys):
  c = data.data_config()
  c.seq_len, c.shuffle_tokens = 32, 0
  c.update(keys)
  return c


def texts_of(c, split):
  source = data.open_source(c, split)
  return [source.text(i) for i in range(len(source))]


def batches_of(c, split="validation", n=None):
  it = data.make_iterator(c, split=split, batch_size=2, seed=0)
  return list(it) if n is None else [next(it) for _ in range(n)]


def decoded(c, batches):
  """The documents of some batches, by the tokenizer's own ends."""
  ids = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
  tok = data.tokenizer(c)
  ends = np.flatnonzero(ids == tok.eos_id)
  return [tok.decode(ids[a:b]) for a, b in zip([0, *ends + 1], ends, strict=False)]


def write_jsonl(path, texts, key="text"):
  path.write_text("".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)))
  return str(path)


def write_records(path, records):
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return str(path)


# --- JSON lines ---------------------------------------------------------------------------------


def test_jsonl(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS, 'line\nbreak, ünï, \\ and "'], "body")
  with open(path, "a") as f:
    f.write("\n\r\n" + json.dumps({"body": "the last, without a line break"}))
  c = config(train=path, text_key="body", validation_fraction=0.3)
  train, held = texts_of(c, "train"), texts_of(c, "validation")
  expected = [*TEXTS, 'line\nbreak, ünï, \\ and "', "the last, without a line break"]
  assert sorted(train + held) == sorted(expected)
  assert not set(train) & set(held) and 5 < len(held) < 35
  assert sorted(decoded(c, batches_of(c))) == sorted(held)
  assert data.record_name(c, "train", 0) == f"{path}:{1 + expected.index(train[0])}"


@pytest.mark.parametrize("read", [1, 4, 1 << 24])
def test_jsonl_blank_lines(tmp_path, monkeypatch, read):
  """Whatever blanks are in them, and wherever a read of the file ends."""
  monkeypatch.setattr("attnlab.data.text._READ_BYTES", read)
  lines = ["  ", '{"text": "one"}', "", "\t\r", "   ", ' {"text": "two"} ', " ", " "]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  (tmp_path / "b.jsonl").write_text("\n \n")
  (tmp_path / "c.jsonl").write_text("")
  (tmp_path / "d.jsonl").write_text('{"text": "three"}\n{"text": "four"}')
  source = JsonLines(find(f"{tmp_path}/*.jsonl", "train"), "text", tokenizer.ByteTokenizer())
  assert [source.text(i) for i in range(len(source))] == ["one", "two", "three", "four"]
  assert [source.name(i).rpartition("/")[2] for i in (0, 1, 3)] == [
    "a.jsonl:2",
    "a.jsonl:6",
    "d.jsonl:2",
  ]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"id": 3}', r"a\.jsonl:3 has no field 'text' .*\['id'\]"),
    ('{"text": 3}', r"a\.jsonl:3: field 'text' .* is a int"),
    ('["text"]', r"a\.jsonl:3 is not a JSON object but a list"),
    ('{"text": ', r"a\.jsonl:3 is not JSON"),
    ("3", r"a\.jsonl:3 is not a JSON object but a int"),
  ],
)
def test_jsonl_bad_line(tmp_path, line, message):
  path = tmp_path / "a.jsonl"
  path.write_text('{"text": "one"}\n\n' + line + '\n{"text": "two"}\n')
  with pytest.raises(UserError, match=message):
    batches_of(config(train=str(path)), "train", 1)


def test_jsonl_bad_line_past_the_check(tmp_path, monkeypatch):
  """What is not searched beforehand is named when it is read."""
  monkeypatch.setattr("attnlab.data.text.CHECK_JSON_BYTES", 0)
  path = tmp_path / "late.jsonl"
  path.write_text('{"text": "one"}\n' * 20 + '{"id": 3}\n' * 20)
  with pytest.raises(UserError, match=r"late\.jsonl:\d+ has no field 'text'"):
    batches_of(config(train=str(path)), "train", 20)


# --- Parquet ------------------------------------------------------------------------------------


def test_parquet(tmp_path):
  pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  for i in range(2):
    table = pa.table({"n": list(range(30)), "text": TEXTS[30 * i : 30 * i + 30]})
    pq.write_table(table, tmp_path / f"{i}.parquet", row_group_size=7)
  c = config(train=str(tmp_path), validation_fraction=0.3)
  train, held = texts_of(c, "train"), texts_of(c, "validation")
  assert sorted(train + held) == sorted(TEXTS) and not set(train) & set(held)
  assert sorted(decoded(c, batches_of(c))) == sorted(held)
  it = data.make_iterator(c, split="train", batch_size=2, seed=0)
  head = [next(it) for _ in range(12)]
  state = json.loads(json.dumps(it.get_state()))
  tail = [next(it) for _ in range(40)]
  found = decoded(c, head + tail)
  assert sorted(found[: len(train)]) == sorted(train)  # One epoch, then another order.
  assert found[: len(train)] != found[len(train) : 2 * len(train)]
  again = data.make_iterator(c, split="train", batch_size=2, seed=0)
  again.set_state(state)
  for a, b in zip([next(again) for _ in range(40)], tail, strict=True):
    np.testing.assert_array_equal(a["inputs"], b["inputs"])
  source = pickle.loads(pickle.dumps(data.open_source(c, "train")))  # As worker processes get it.
  assert source.text(3) == train[3]
  assert "row group" in source.name(3)
  with pytest.raises(UserError, match=r"no column 'body'.*\['n', 'text'\]"):
    data.open_source(config(train=str(tmp_path), text_key="body"), "train")
  with pytest.raises(UserError, match=r"column 'n' .* is int64, not string"):
    data.open_source(config(train=str(tmp_path), text_key="n"), "train")


def test_broken_parquet(tmp_path):
  pytest.importorskip("pyarrow")
  (tmp_path / "a.parquet").write_bytes(b"not this")
  with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file"):
    data.open_source(config(train=str(tmp_path)), "train")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
  monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
  (tmp_path / "a.parquet").write_bytes(b"?")
  with pytest.raises(UserError, match="pip install pyarrow"):
    data.open_source(config(train=str(tmp_path)), "train")


def test_shuffle_blocks_is_a_permutation_that_keeps_to_blocks():
  import grain

  blocks = np.array([1, 5, 3, 8])
  shuffled = ShuffleBlocks(grain.MapDataset.range(17), blocks, seed=0)
  epochs = [[shuffled[i] for i in range(17 * e, 17 * e + 17)] for e in range(3)]
  assert all(sorted(e) == list(range(17)) for e in epochs)
  assert epochs[0] != epochs[1] != epochs[2]
  block_of = np.repeat(np.arange(4), blocks)
  for epoch in epochs:
    visits = block_of[epoch]
    assert (np.diff(visits) != 0).sum() == 3  # Each block is opened once.


# --- token shards -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_flat_shards(tmp_path, monkeypatch, kind):
  """Every token is a target once, predicted from the one before it; segments begin at separators."""
  monkeypatch.setattr("attnlab.data.tokens.PIECE_TOKENS", 50)
  rng = np.random.default_rng(0)
  shards = []
  for i in range(6):
    ids = rng.integers(1, 5000, 3000).astype(np.uint16)
    ids[rng.integers(0, 3000, 60)] = 0
    shards.append(ids)
    np.save(tmp_path / f"{i}.npy", ids) if kind == "npy" else ids.tofile(tmp_path / f"{i}.bin")
  c = config(name="tokens", train=str(tmp_path), tokenizer="ids", vocab_size=5000, eos_id=0)
  c.validation_fraction = 0.4
  assert data.tokenizer(c).vocab_size == 5000
  names = {s: [data.open_source(c, s).name(0)] for s in ("train", "validation")}
  assert names["train"] != names["validation"]
  pairs, expected = [], []
  for split in ("train", "validation"):
    source = data.open_source(c, split)
    pairs += [tuple(p) for i in range(len(source)) for p in source.pairs(i)]
  for ids in shards:
    expected += list(zip([0, *ids[:-1]], ids, strict=True))
  assert sorted(pairs) == sorted((int(a), int(b)) for a, b in expected)
  for b in batches_of(c):
    for x, y, s, p in zip(
      *(b[k] for k in ("inputs", "targets", "segment_ids", "positions")), strict=True
    ):
      for t in range(1, 32):
        if s[t] and s[t] == s[t - 1]:
          assert x[t] == y[t - 1] != 0 and p[t] == p[t - 1] + 1
        elif s[t]:
          assert s[t] == s[t - 1] + 1 and p[t] == 0
  state_it = data.make_iterator(c, split="train", batch_size=2, seed=0)
  head = [next(state_it) for _ in range(9)]
  state = json.loads(json.dumps(state_it.get_state()))
  after = next(state_it)
  again = data.make_iterator(c, split="train", batch_size=2, seed=0)
  again.set_state(state)
  np.testing.assert_array_equal(next(again)["inputs"], after["inputs"])
  assert len(head) == 9


def test_flat_shard_alone_is_cut_at_a_document(tmp_path):
  ids = np.arange(1, 1001, dtype=np.int32)
  ids[[100, 870, 950]] = 0
  np.save(tmp_path / "one.npy", ids)
  c = config(name="tokens", train=str(tmp_path / "one.npy"), tokenizer="ids", vocab_size=2000)
  c.eos_id, c.validation_fraction = 0, 0.15
  train, held = (data.open_source(c, s) for s in ("train", "validation"))
  targets = [np.concatenate([s.pairs(i)[:, 1] for i in range(len(s))]) for s in (train, held)]
  np.testing.assert_array_equal(targets[0], ids[:871])
  np.testing.assert_array_equal(targets[1], ids[871:])


@pytest.mark.parametrize("bos", [False, True])
def test_flat_shards_begin_documents_as_texts_do(tmp_path, monkeypatch, bos):
  """With the tokenizer's bos, which prompts begin with too, whether the shards have it or not."""
  monkeypatch.setattr("attnlab.data.tokens.PIECE_TOKENS", 7)
  texts = ["one", "", "three hundred", "four"]
  tok = tokenizer.ByteTokenizer()
  ids = [[tok.bos_id] * bos + tok.encode(t).tolist() + [tok.eos_id] for t in texts]
  for name in ("train", "validation"):
    np.save(tmp_path / f"{name}.npy", np.concatenate(ids).astype(np.uint16))
  c = config(name="tokens", train=f"{tmp_path}/train.npy", validation=f"{tmp_path}/validation.npy")
  source = data.open_source(c, "train")
  pairs = np.concatenate([source.pairs(i) for i in range(len(source))])
  expected = [shifted(tok.encode(t), tok.bos_id, tok.eos_id) for t in texts]
  np.testing.assert_array_equal(pairs, np.concatenate(expected))
  assert source.start_id == tok.bos_id


def test_array_record_text(tmp_path):
  for i in range(3):
    texts = TEXTS[20 * i : 20 * i + 20]
    write_records(tmp_path / f"{i}.array_record", [t.encode() for t in texts])
  c = config(name="tokens", train=str(tmp_path), validation_fraction=0.3)
  held = decoded(c, batches_of(c))
  size = sum(len(data.open_source(c, "train").pairs(i)) for i in range(60 - len(held)))
  train = decoded(c, batches_of(c, "train", size // 64 + 2))[: 60 - len(held)]
  assert sorted(train + held) == sorted(TEXTS)
  source = data.open_source(c, "train")
  assert pickle.loads(pickle.dumps(source)).name(0) == source.name(0)


@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1, 3)])
def test_array_record_shards_may_be_empty(tmp_path, empty):
  """Those that are not lose no record, and keep their names."""
  texts, wanted = iter(TEXTS), []
  for i in range(4):
    kept = [] if i in empty else [next(texts), next(texts)]
    path = write_records(tmp_path / f"{i}.array_record", [t.encode() for t in kept])
    wanted += [(f"{path} record {n}", t) for n, t in enumerate(kept)]
  held = write_records(tmp_path / "held.arrayrecord", [b"held"])
  c = config(name="tokens", train=str(tmp_path / "*.array_record"), validation=held)
  source = data.open_source(c, "train")
  tokens = [source.pairs(i)[:-1, 1] for i in range(len(source))]
  found = [(source.name(i), bytes(t.astype(np.uint8)).decode()) for i, t in enumerate(tokens)]
  assert found == wanted


def test_array_record_tokens(tmp_path):
  rng = np.random.default_rng(0)
  documents = [rng.integers(3, 90, n).astype("<i4") for n in (5, 40, 1, 0, 33, 64)]
  # With and without the separator that the format leaves open: read alike.
  records = [np.append(d, 1) if i % 2 else d for i, d in enumerate(documents)]
  path = write_records(tmp_path / "a.arrayrecord", [r.astype("<i4").tobytes() for r in records])
  other = write_records(tmp_path / "b.arrayrecord", [np.arange(5, 9, dtype="<i4").tobytes()])
  c = config(name="tokens", record="tokens", train=other, validation=path, tokenizer="ids")
  c.vocab_size, c.eos_id = 90, 1
  found = [tuple(int(i) for i in d.split()) for d in decoded(c, batches_of(c))]
  assert sorted(found) == sorted(tuple(d.tolist()) for d in documents)


# --- tokenizers ---------------------------------------------------------------------------------


def train_tokenizer(path, eos="<|endoftext|>"):
  tokenizers = pytest.importorskip("tokenizers")
  tok = tokenizers.Tokenizer(tokenizers.models.BPE())
  tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tok.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=[eos],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tok.train_from_iterator(TEXTS, trainer)
  tok.save(str(path))
  return str(path)


def test_bytes_tokenizer():
  tok = tokenizer.load("bytes")
  text = "aü€😀\n"
  ids = tok.encode(text)
  assert bytes(ids.astype(np.uint8)) == text.encode() and tok.decode(ids) == text
  assert tok.decode([*ids[:2], tok.bos_id, tok.eos_id, 319, -5]) == "a\ufffd"  # Broken, no error.
  assert tok.vocab_size % 64 == 0 and max(tok.bos_id, tok.eos_id, tok.pad_id) < tok.vocab_size
  assert tok.token_bytes().sum() == 256


def test_json_tokenizer(tmp_path):
  path = train_tokenizer(tmp_path / "tokenizer.json")
  tok = tokenizer.load(path)
  assert tok.vocab_size == 320 and tok.bos_id == tok.eos_id == 0
  for text in (TEXTS[3], "ünï <|endoftext|> 😀\n"):
    ids = tok.encode(text)
    assert tok.eos_id not in ids and tok.decode(ids) == text
    assert tok.token_bytes()[ids].sum() == len(text.encode())
  assert tok.decode([0, 5, 319, 999, -1]) == tok.decode([5])
  copy = pickle.loads(pickle.dumps(tok))
  np.testing.assert_array_equal(copy.encode(TEXTS[5]), tok.encode(TEXTS[5]))
  write_jsonl(tmp_path / "a.jsonl", TEXTS)
  c = config(train=str(tmp_path / "a.jsonl"), tokenizer=path, validation_fraction=0.3)
  assert sorted(decoded(c, batches_of(c))) == sorted(texts_of(c, "validation"))
  assert tokenizer.load(path, eos_id=7).eos_id == 7


def test_json_tokenizer_specials(tmp_path):
  path = train_tokenizer(tmp_path / "tokenizer.json", eos="<end>")
  with pytest.raises(UserError, match="which token ends a text.*'<end>'"):
    tokenizer.load(path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
  assert tokenizer.load(path).eos_id == 0
  with pytest.raises(UserError, match="config.data.eos_id=300"):
    tokenizer.load(path, eos_id=300)


def test_tokenizer_missing_or_broken(tmp_path, monkeypatch):
  pytest.importorskip("tokenizers")
  with pytest.raises(UserError, match="no such file"):
    batches_of(config(tokenizer=str(tmp_path / "no.json")), "train", 1)
  (tmp_path / "bad.json").write_text('{"version": "1.0"')
  with pytest.raises(UserError, match="is not a tokenizer.json"):
    tokenizer.load(str(tmp_path / "bad.json"))
  monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
  with pytest.raises(UserError, match="pip install tokenizers"):
    tokenizer.load(str(tmp_path / "bad.json"))


def test_id_tokenizer():
  tok = tokenizer.load("ids", eos_id=2, vocab_size=50)
  assert tok.decode([3, 14, 15]) == "3 14 15" and list(tok.encode("3 14 15")) == [3, 14, 15]
  for bad in ("3 x", "50"):
    with pytest.raises(UserError):
      tok.encode(bad)
  with pytest.raises(UserError, match="config.data.vocab_size and config.data.eos_id"):
    tokenizer.load("ids")


# --- bad input ----------------------------------------------------------------------------------


def bad(tmp_path, what):
  """A config of something wrong, and what the message must say."""
  good = tmp_path / "good.txt"
  good.write_text("some text of some length " * 20)
  other = tmp_path / "other.txt"
  other.write_text("some more text")
  empty = tmp_path / "empty"
  empty.mkdir()
  match what:
    case "empty directory":
      return {"train": str(empty)}, "directory holds no files"
    case "only hidden files":
      (empty / ".hidden").write_text("x")
      return {"train": str(empty)}, "directory holds no files"
    case "glob":
      return {"train": str(tmp_path / "*.rst")}, r"no file matches"
    case "no file":
      return {"train": str(tmp_path / "nothing.txt")}, "no such file or directory"
    case "validation path":
      return {"train": str(good), "validation": str(tmp_path / "no")}, r"data\.validation=.*no such"
    case "same file":
      return {"train": str(tmp_path / "*.txt"), "validation": str(good)}, "is in both"
    case "dangling link":
      (empty / "link.txt").symlink_to(tmp_path / "gone")
      return {"train": str(empty)}, r"cannot read .*link\.txt: No such file"
    case "not UTF-8":
      (empty / "a.txt").write_text("fine")
      (empty / "b.txt").write_bytes("ü".encode() * 10 + b"\xff\xfe")
      return {"train": str(empty)}, r"b\.txt is not UTF-8: byte 0xff at offset 20"
    case "cut UTF-8":
      (empty / "a.txt").write_text("fine")
      (empty / "b.txt").write_bytes(b"abc" + "€".encode()[:2])
      return {"train": str(empty)}, r"b\.txt is not UTF-8: byte 0xe2 at offset 3"
    case "all empty":
      (empty / "a.txt").touch()
      return {"train": str(empty), "validation": str(good)}, "empty"
    case "nothing but empty":
      (empty / "a.txt").touch()
      return {"train": str(empty)}, "too few to keep some for validation"
    case "one line":
      path = write_jsonl(tmp_path / "one.jsonl", ["alone"])
      return {"train": path}, "too few to keep some for validation"
    case "mixed kinds":
      write_jsonl(tmp_path / "a.jsonl", TEXTS)
      return {"train": str(tmp_path)}, r"several kinds: JSON lines .*text files"
    case "seq_len":
      return {"seq_len": 1}, r"seq_len=1: at least 2"
    case "type":
      return {"validation": 3}, r"config\.data\.validation=3 is a int, not a str"
    case "source":
      return {"name": "txt"}, "unknown source .* 'txt': did you mean 'text'"
    case "task":
      return {"name": "task", "task": "mqra"}, "unknown task .* 'mqra': did you mean 'mqar'"
    case "task key":
      args = {"num_kv_pair": 4}
      return {"name": "task", "task_args": args}, "'num_kv_pair': did you mean 'num_kv_pairs'"
    case "task type":
      args = {"num_kv_pairs": "4"}
      return {"name": "task", "task_args": args}, "num_kv_pairs='4': .* takes a int"
    case "task fit":
      return {"name": "task", "seq_len": 30}, "at least 4 [*] num_kv_pairs = 32"
    case "no shards":
      return {"name": "tokens"}, "needs config.data.train"
    case "not a shard":
      return {"name": "tokens", "train": str(good)}, r"good\.txt is no shard"
    case "id past vocabulary":
      np.save(tmp_path / "a.npy", np.array([1, 2, 257, 3, 400, 257, 5], np.uint16))
      return {"name": "tokens", "train": str(tmp_path / "a.npy")}, r"400 at position 4 .* 320"
    case "no separator":
      np.save(tmp_path / "a.npy", np.ones(100, np.uint16))
      return {"name": "tokens", "train": str(tmp_path / "a.npy")}, "no separator 257"
    case "float shard":
      np.save(tmp_path / "a.npy", np.ones(100))
      return {"name": "tokens", "train": str(tmp_path / "a.npy")}, "float64 of shape"
    case "broken npy":
      (tmp_path / "a.npy").write_bytes(b"\x93NUMPY nothing")
      return {"name": "tokens", "train": str(tmp_path / "a.npy")}, r"a\.npy cannot be read"
    case "odd bin":
      (tmp_path / "a.bin").write_bytes(b"123")
      return {"name": "tokens", "train": str(tmp_path / "a.bin")}, r"a\.bin cannot be read"
    case "dtype":
      (tmp_path / "a.bin").write_bytes(b"1234")
      return {"name": "tokens", "train": str(tmp_path / "a.bin"), "token_dtype": "int8"}, "uint16"
    case "broken array record":
      (tmp_path / "a.array_record").write_bytes(b"not this")
      return {"name": "tokens", "train": str(tmp_path / "a.array_record")}, "array_record"
    case "array record not text":
      write_records(tmp_path / "a.array_record", [b"\xff\xff\xff\xff"] * 3)
      return {"name": "tokens", "train": str(tmp_path / "a.array_record")}, "record 2 is not UTF-8"
    case "array record not tokens":
      write_records(tmp_path / "a.array_record", [b"some text"] * 3)
      path = str(tmp_path / "a.array_record")
      return {"name": "tokens", "train": path, "record": "tokens"}, "not whole int32 tokens"


@pytest.mark.parametrize(
  "what",
  [
    *("empty directory", "only hidden files", "glob", "no file", "validation path", "same file"),
    *("dangling link", "not UTF-8", "cut UTF-8", "all empty", "nothing but empty", "one line"),
    *("mixed kinds", "seq_len", "type", "source", "task", "task key", "task type", "task fit"),
    *("no shards", "not a shard", "id past vocabulary", "no separator", "float shard"),
    *("broken npy", "odd bin", "dtype", "broken array record", "array record not text"),
    "array record not tokens",
  ],
)
def test_bad_input_is_one_clear_error(tmp_path, what):
  keys, message = bad(tmp_path, what)
  c = dict(config()) | keys
  with pytest.raises(UserError, match=message) as caught:
    data.make_iterator(c, split="train", batch_size=2, seed=0)
  assert "\n" not in str(caught.value)


def test_unknown_key():
  with pytest.raises(UserError, match="'config.data.seqlen': did you mean 'config.data.seq_len'"):
    data.tokenizer(dict(config()) | {"seqlen": 3})


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"batch_size": 3, "share": (0, 2)}, "batch_size=3 is not a multiple of 2"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"share": (1, 1)}, r"share=\(1, 1\)"),
    ({"seed": -1}, "seed=-1"),
    ({"split": "test"}, "unknown split 'test'"),
    ({"batch_size": 600, "share": (0, 600)}, "cannot be shared among 600"),
  ],
)
def test_bad_arguments(keys, message):
  with pytest.raises(UserError, match=message):
    data.make_iterator(config(), **{"split": "train", "batch_size": 2, "seed": 0} | keys)


def test_bad_file_past_the_check(tmp_path, monkeypatch):
  """The error of a file that is read only in training comes out of the iterator as it is."""
  monkeypatch.setattr("attnlab.data.text.CHECK_TEXT_BYTES", 0)
  for i in range(4):
    (tmp_path / f"{i}.txt").write_bytes(b"good " * 10 + b"\x80" * (i == 2))
  (tmp_path / "held").mkdir()
  (tmp_path / "held" / "a.txt").write_text("held")
  c = config(train=str(tmp_path / "*.txt"), validation=str(tmp_path / "held"))
  with pytest.raises(UserError, match=r"2\.txt is not UTF-8: byte 0x80 at offset 50"):
    batches_of(c, "train", 10)


def test_offset_of_a_bad_byte_far_into_a_file(tmp_path):
  path = tmp_path / "long.txt"
  path.write_bytes("€".encode() * 500_000 + b"\xff" + b"a" * 10)  # Cuts a character at 1 MiB.
  with pytest.raises(UserError, match="byte 0xff at offset 1500000"):
    data.open_source(config(train=str(path)), "train")
