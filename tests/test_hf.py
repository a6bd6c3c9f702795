"""Checkpoints of Hugging Face's own models, made by tests/hf/make.py, against the logits that its library gives."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from attnlab import sharding
from attnlab.accounting import parameters
from attnlab.checkpoint import paths
from attnlab.config import load as load_config
from attnlab.config import resolve
from attnlab.errors import UserError
from attnlab.hf import files
from attnlab.hf.family import HFConfig, families, family
from attnlab.hf.load import configured, read, with_model
from attnlab.hf.save import fitting, write
from attnlab.state import make_init
from configs.base import base

CHECKPOINTS = Path(__file__).parent / "hf"
NAMES = sorted(p.parent.name for p in CHECKPOINTS.glob("*/expected.npz"))
# What is opened of a checkpoint serves all its tests.
FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(f"hf {name}")) for name in NAMES]


def config() -> ConfigDict:
  c = base()
  c.data.seq_len, c.train.batch_size = 32, 8
  return c


def opened(directory: Path, sizes: dict[str, int] = {"data": 1}):  # noqa: B006
  """A checkpoint's config, mesh, structure and {"params", "rest"}."""
  kind, c = configured(directory, config())
  c = resolve(c)
  mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
  with jax.set_mesh(mesh):
    graph, _, shapes = make_init(c, optax.identity(), mesh)
    like = shapes["model"] | {"rest": filled(shapes["model"]["rest"], np.zeros)}
    return c, mesh, graph, read(directory, kind, c.model, like)


def filled(shapes, make):
  """Arrays of some shapes and shardings, without the program that draws a model's first parameters."""
  return jax.tree.map(lambda x: jax.device_put(make(x.shape).astype(x.dtype), x.sharding), shapes)


@pytest.fixture(scope="module")
def model():
  """What is opened of a checkpoint by its name, once."""
  return functools.cache(lambda name: opened(CHECKPOINTS / name))


@pytest.fixture
def copy(tmp_path):
  """A copy of a checkpoint, to be spoilt."""

  def make(name: str = "qwen3") -> Path:
    return shutil.copytree(CHECKPOINTS / name, tmp_path / name)

  return make


def expected(name: str) -> tuple[np.ndarray, np.ndarray]:
  """Ids and the logits of them."""
  with np.load(CHECKPOINTS / name / "expected.npz") as arrays:
    return arrays["ids"].astype(np.int32), arrays["logits"]


def close(logits, want: np.ndarray) -> None:
  # Float32 on both sides, sums in other orders, through seven layers at the most.
  np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_every_family_has_a_checkpoint():
  kinds = {json.loads((CHECKPOINTS / n / "config.json").read_text())["model_type"] for n in NAMES}
  assert kinds == set(families())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name, model):
  """Of whole rows; and of a prompt in a cache, then a token at a time."""
  (_, mesh, graph, state), (ids, want) = model(name), expected(name)
  with jax.set_mesh(mesh):
    m = nnx.merge(graph, state["params"], state["rest"])
    close(jax.jit(lambda m, ids: m.forward(ids))(m, ids), want)
    logits, cache = jax.jit(lambda m, ids: m.prefill(ids, m.init_cache(2, 32)))(m, ids[:, :16])
    close(logits, want[:, 15])
    step = jax.jit(lambda m, token, cache: m.decode_step(token, cache))
    for t in range(16, 19):
      logits, cache = step(m, ids[:, t], cache)
      close(logits, want[:, t])


@pytest.mark.parametrize("name", FAMILIES)
def test_back(name, model, tmp_path):
  """What is written is what was read: every tensor to the last bit, and a config.json that says the same model."""
  c, _, _, state = model(name)
  write(c, state, tmp_path / "out", model_type=name)
  was, now = (load_file(p / "model.safetensors") for p in (CHECKPOINTS / name, tmp_path / "out"))
  was = {family(name).canonical(key): x for key, x in was.items()}
  assert was.keys() == now.keys()
  for key, x in was.items():
    np.testing.assert_array_equal(now[key].view(np.uint16), x.view(np.uint16), err_msg=key)
  said = [
    json.loads((p / "config.json").read_text()) for p in (CHECKPOINTS / name, tmp_path / "out")
  ]
  models = [with_model(base(), family(name).model(HFConfig(values))).model for values in said]
  assert models[0].to_dict() == models[1].to_dict()
  for key in ("model_type", "architectures", "bos_token_id", "eos_token_id"):
    assert said[0][key] == said[1][key], key


@pytest.mark.xdist_group("hf kimi_linear")
@pytest.mark.parametrize("sizes", [dict(data=2, model=2), dict(data=4)], ids=str)
def test_on_a_mesh(sizes, model):
  """Devices that share a model's parameters are given their parts."""
  _, _, _, want = model("kimi_linear")
  _, mesh, _, got = opened(CHECKPOINTS / "kimi_linear", sizes)
  assert any(not x.is_fully_replicated for x in jax.tree.leaves(got))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_read_once(name, monkeypatch):
  """Whether several devices have parts of one, several layers are one parameter, or several parameters one tensor."""
  count: dict[str, int] = {}
  get = files.Tensors.__getitem__

  def counted(self, key):
    count[key] = count.get(key, 0) + 1
    return get(self, key)

  monkeypatch.setattr(files.Tensors, "__getitem__", counted)
  opened(CHECKPOINTS / name, {"data": 4})
  assert count.keys() == load_file(CHECKPOINTS / name / "model.safetensors").keys()
  assert set(count.values()) == {1}


# What a published config.json has of what matters, and the parameters that are published (some rounded; None: unknown).
PUBLISHED = {
  "Llama-2-7B": (
    dict(
      model_type="llama",
      hidden_size=4096,
      num_hidden_layers=32,
      num_attention_heads=32,
      intermediate_size=11008,
      vocab_size=32000,
      rms_norm_eps=1e-5,
      hidden_act="silu",
      tie_word_embeddings=False,
      rope_scaling=None,
    ),
    6_738_415_616,
  ),
  "Mistral-7B-v0.3": (
    dict(
      model_type="mistral",
      hidden_size=4096,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=8,
      intermediate_size=14336,
      vocab_size=32768,
      rms_norm_eps=1e-5,
      rope_theta=1e6,
      sliding_window=None,
    ),
    7_248_023_552,
  ),
  "Qwen3-0.6B": (
    dict(
      model_type="qwen3",
      hidden_size=1024,
      num_hidden_layers=28,
      num_attention_heads=16,
      num_key_value_heads=8,
      head_dim=128,
      intermediate_size=3072,
      vocab_size=151936,
      rms_norm_eps=1e-6,
      rope_theta=1000000,
      tie_word_embeddings=True,
      use_sliding_window=False,
      sliding_window=None,
    ),
    596_049_920,
  ),
  "Qwen3-Next-80B-A3B": (
    dict(
      model_type="qwen3_next",
      hidden_size=2048,
      num_hidden_layers=48,
      full_attention_interval=4,
      num_attention_heads=16,
      num_key_value_heads=2,
      head_dim=256,
      partial_rotary_factor=0.25,
      rope_theta=10000000,
      intermediate_size=5120,
      num_experts=512,
      num_experts_per_tok=10,
      moe_intermediate_size=512,
      shared_expert_intermediate_size=512,
      norm_topk_prob=True,
      linear_num_key_heads=16,
      linear_num_value_heads=32,
      linear_key_head_dim=128,
      linear_value_head_dim=128,
      linear_conv_kernel_dim=4,
      vocab_size=151936,
      rms_norm_eps=1e-6,
    ),
    80e9,
  ),
  "Qwen3.5-35B-A3B": (
    dict(
      model_type="qwen3_5_moe_text",
      hidden_size=2048,
      num_hidden_layers=40,
      full_attention_interval=4,
      num_attention_heads=16,
      num_key_value_heads=2,
      head_dim=256,
      rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25),
      num_experts=256,
      num_experts_per_tok=8,
      moe_intermediate_size=512,
      shared_expert_intermediate_size=512,
      linear_num_key_heads=16,
      linear_num_value_heads=32,
      linear_key_head_dim=128,
      linear_value_head_dim=128,
      linear_conv_kernel_dim=4,
      vocab_size=248320,
      rms_norm_eps=1e-6,
    ),
    35e9,
  ),
  "GLM-5": (
    dict(
      model_type="glm_moe_dsa",
      hidden_size=6144,
      num_hidden_layers=78,
      num_attention_heads=64,
      kv_lora_rank=512,
      q_lora_rank=2048,
      qk_nope_head_dim=192,
      qk_rope_head_dim=64,
      v_head_dim=256,
      rope_parameters=dict(rope_type="default", rope_theta=1e6),
      index_topk=2048,
      index_head_dim=128,
      index_n_heads=32,
      intermediate_size=12288,
      moe_intermediate_size=2048,
      n_routed_experts=256,
      n_shared_experts=1,
      num_experts_per_tok=8,
      first_k_dense_replace=3,
      routed_scaling_factor=2.5,
      n_group=1,
      topk_group=1,
      vocab_size=154880,
      rms_norm_eps=1e-5,
    ),
    744e9,
  ),
  "Ling-3.0-Flash": (
    dict(
      model_type="bailing_hybrid",
      hidden_size=2560,
      num_hidden_layers=42,
      layer_group_size=6,
      num_attention_heads=32,
      kv_lora_rank=512,
      q_lora_rank=None,
      qk_nope_head_dim=128,
      qk_rope_head_dim=64,
      v_head_dim=128,
      rope_theta=6e6,
      head_dim=128,
      short_conv_kernel_size=4,
      kda_safe_gate=True,
      kda_lower_bound=-5.0,
      intermediate_size=6144,
      moe_intermediate_size=768,
      num_experts=512,
      num_experts_per_token=8,
      num_shared_experts=1,
      num_expert_group=8,
      topk_group=4,
      first_k_dense_replace=2,
      routed_scaling_factor=2.5,
      moe_renormalize=True,
      vocab_size=157184,
      rms_norm_eps=1e-6,
    ),
    None,
  ),
  "Kimi-Linear-48B-A3B": (
    dict(
      model_type="kimi_linear",
      hidden_size=2304,
      num_hidden_layers=27,
      num_attention_heads=32,
      num_key_value_heads=32,
      kv_lora_rank=512,
      q_lora_rank=None,
      qk_nope_head_dim=128,
      qk_rope_head_dim=64,
      v_head_dim=128,
      mla_use_nope=True,
      linear_attn_config=dict(
        full_attn_layers=[4, 8, 12, 16, 20, 24, 27],
        kda_layers=[i for i in range(1, 27) if i % 4],
        head_dim=128,
        num_heads=32,
        short_conv_kernel_size=4,
      ),
      intermediate_size=9216,
      num_experts=256,
      num_experts_per_token=8,
      moe_intermediate_size=1024,
      num_shared_experts=1,
      first_k_dense_replace=1,
      moe_layer_freq=1,
      routed_scaling_factor=2.446,
      moe_renormalize=True,
      moe_router_activation_func="sigmoid",
      num_expert_group=1,
      topk_group=1,
      vocab_size=163840,
      rms_norm_eps=1e-5,
      hidden_act="silu",
    ),
    48e9,
  ),
}


@pytest.mark.parametrize("name", [n for n, (_, count) in PUBLISHED.items() if count])
def test_published_sizes(name):
  values, count = PUBLISHED[name]
  model = with_model(base(), family(values["model_type"]).model(HFConfig(values))).model
  assert parameters(model) == pytest.approx(count, rel=0.025 if count % 1e9 == 0 else 0)


@pytest.mark.parametrize(
  "file, name",
  [
    ("qwen3_next", "Qwen3-Next-80B-A3B"),
    ("kimi_linear", "Kimi-Linear-48B-A3B"),
    ("ling", "Ling-3.0-Flash"),
  ],
)
def test_configs_are_the_published(file, name):
  """Our config of the published size is the one that its config.json makes."""
  ours = load_config(f"configs/{file}.py:paper")
  kind, said, _ = fitting(ours)
  values, _ = PUBLISHED[name]
  assert kind.model_type == values["model_type"]
  published = with_model(base(), kind.model(HFConfig(values))).model
  assert said.to_dict() == published.to_dict()


@pytest.mark.parametrize("file", ["qwen3_next", "kimi_linear", "ling"])
def test_models_of_our_own_are_written(file, tmp_path):
  """One of our configs goes out and comes back."""
  c = resolve(load_config(f"configs/{file}.py"))
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  with jax.set_mesh(mesh):
    _, _, shapes = make_init(c, optax.identity(), mesh)
    numbers = lambda shape: np.random.default_rng(0).normal(size=shape)  # noqa: E731
    state = {"params": filled(shapes["model"]["params"], numbers)}
    state["rest"] = filled(shapes["model"]["rest"], np.zeros)
  write(c, state, tmp_path, dtype="float32")
  _, _, _, again = opened(tmp_path)
  # Embeddings are multiplied by a root on the way out and divided by it on the way in; norms lose one and get it back,
  # half of float32's last digit at two, 2^-24, and the last norm, of tied embeddings, 8 times that.
  again, state = (dict(zip(paths(s), jax.tree.leaves(s), strict=True)) for s in (again, state))
  assert again.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_allclose(again[name], x, rtol=3e-7, atol=8 * 2**-24, err_msg=name)


@pytest.mark.parametrize("pattern, layers", [("softmax | softmax", 3), ("softmax + softmax", 3)])
def test_layers_are_where_the_models_pattern_has_them(pattern, layers, tmp_path):
  """A config.json says a pattern in its own way, in which other layers may be in the scan."""
  c = resolve(
    load_config("configs/softmax.py", {"model.pattern": pattern, "model.num_layers": layers})
  )
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  with jax.set_mesh(mesh):
    _, _, shapes = make_init(c, optax.identity(), mesh)
  state = {"params": filled(shapes["model"]["params"], np.random.default_rng(0).standard_normal)}
  write(c, state | {"rest": shapes["model"]["rest"]}, tmp_path, dtype="float32")
  ours = dict(zip(paths(state["params"]), jax.tree.leaves(state["params"]), strict=True))
  k = "mixer.k_proj.kernel"
  want = {
    "softmax | softmax": [
      (f"blocks.layers.0.{k}", 0),
      (f"blocks.layers.0.{k}", 1),
      (f"tail.0.{k}",),
    ],
    "softmax + softmax": [
      (f"blocks.layers.0.{k}", 0),
      (f"blocks.layers.1.{k}", 0),
      (f"tail.0.{k}",),
    ],
  }[pattern]
  theirs = load_file(tmp_path / "model.safetensors")
  for i, (path, *row) in enumerate(want):
    x = np.asarray(ours[path])[tuple(row)]
    np.testing.assert_array_equal(theirs[f"model.layers.{i}.self_attn.k_proj.weight"], x.T)


def change(directory: Path, **values) -> None:
  """Sets keys of a config.json; None: without it."""
  path = directory / "config.json"
  old = json.loads(path.read_text()) | values
  path.write_text(json.dumps({k: v for k, v in old.items() if v is not None}))


def without(directory: Path, name: str) -> None:
  tensors = load_file(directory / "model.safetensors")
  del tensors[name]
  save_file(tensors, directory / "model.safetensors")


def added(directory: Path, name: str, x: np.ndarray) -> None:
  tensors = load_file(directory / "model.safetensors")
  save_file(tensors | {name: x}, directory / "model.safetensors")


ONES = np.ones((16, 16), np.float32)


@pytest.mark.parametrize(
  "spoil, words",
  [
    (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    (lambda d: (d / "config.json").write_text("{"), "not readable as JSON"),
    (lambda d: change(d, model_type="qwen4"), "unknown model_type 'qwen4': did you mean 'qwen3'"),
    (lambda d: change(d, hidden_size=None), "has no 'hidden_size'"),
    (lambda d: change(d, hidden_act="gelu"), "hidden_act = 'gelu' is not known here"),
    (lambda d: change(d, attention_bias=True), "attention_bias = True"),
    (lambda d: change(d, rope_parameters=dict(rope_type="longrope")), "'longrope' is not known"),
    (
      lambda d: change(d, rope_parameters=dict(rope_type="yarn", factor=2, attention_factor=1)),
      "attention_factor = 1 is not known",
    ),
    (lambda d: change(d, use_sliding_window=True, sliding_window=8), "sliding_window"),
    (lambda d: change(d, num_hidden_layers=3), "has no tensor model.layers.2.input_layernorm"),
    (lambda d: change(d, intermediate_size=32), r"makes blocks.*config.json \(32, 16\)"),
    (lambda d: change(d, vocab_size=64), "vocab_size = 64 is below the data's 259 ids"),
    (lambda d: (d / "model.safetensors").unlink(), r"has no \*.safetensors"),
    (lambda d: (d / "model.safetensors").write_bytes(b"nothing"), "model.safetensors: "),
    (lambda d: without(d, "lm_head.weight"), "has no tensor lm_head.weight"),
    (
      lambda d: added(d, "model.layers.0.self_attn.q_proj.bias", ONES[0]),
      "a tensor that is not known here, model.layers.0.self_attn.q_proj.bias",
    ),
    (lambda d: added(d, "lm_head.weight", ONES.astype(np.int8)), "is quantised"),
  ],
)
def test_what_is_wrong_is_told(spoil, words, copy):
  directory = copy()
  spoil(directory)
  with pytest.raises(UserError, match=words):
    opened(directory)


def test_a_checkpoint_without_a_tokenizer(copy):
  """Is of bytes if so many ids are, and otherwise wants one to be named."""
  directory, c = copy(), config()
  assert configured(directory, c)[1].data.tokenizer == "bytes"
  change(directory, vocab_size=32000)
  with pytest.raises(UserError, match=r"no tokenizer.json, and its 32000 .*config.data.tokenizer"):
    configured(directory, c)
  c.data.tokenizer = "other/tokenizer.json"
  assert configured(directory, c)[1].data.tokenizer == "other/tokenizer.json"
  (directory / "tokenizer.json").write_text("{}")
  c.data.tokenizer = "bytes"
  assert configured(directory, c)[1].data.tokenizer == str(directory / "tokenizer.json")


def test_blocks_of_float8(copy):
  """As DeepSeek's are kept: numbers of 8 bits, and a scale for each block of some rows and columns."""
  directory, block = copy(), (5, 7)
  tensors, want = load_file(directory / "model.safetensors"), {}
  for name, x in list(tensors.items()):
    if "_proj" not in name:
      continue
    counts = [-(-n // size) for n, size in zip(x.shape, block, strict=True)]
    scales = np.random.default_rng(0).uniform(0.01, 0.03, counts).astype(np.float32)
    low = (x.astype(np.float32) * 40).astype(ml_dtypes.float8_e4m3fn)
    each = [[scales[i // 5, j // 7] for j in range(x.shape[1])] for i in range(x.shape[0])]
    want[name] = low.astype(np.float32) * np.array(each)
    tensors |= {name: low, f"{name}_scale_inv": scales}
  save_file(tensors, directory / "model.safetensors")
  change(directory, quantization_config=dict(quant_method="fp8", weight_block_size=block))
  read = files.Tensors(directory)
  assert not [name for name in read.names if "scale" in name]
  for name, x in want.items():
    np.testing.assert_array_equal(read[name], x)
  _, _, _, state = opened(directory)
  k = want["model.layers.1.self_attn.k_proj.weight"].T
  at = state["params"]["blocks"]["layers"][0]["mixer"]["k_proj"]["kernel"]
  np.testing.assert_array_equal(at[...][1], k)


def test_tensors_of_no_use_are_left(copy):
  """Of layers that predict further tokens, and of tables."""
  directory = copy()
  added(directory, "model.layers.2.eh_proj.weight", ONES)
  added(directory, "mtp.fc.weight", ONES)
  opened(directory)
  tied = copy("llama")
  added(tied, "lm_head.weight", ONES)
  opened(tied)


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_beside_a_model_of_pictures(name, copy, model):
  """Of a model of text and pictures text is a part; and its experts may share tensors."""
  directory = copy(name)
  tensors = load_file(directory / "model.safetensors")
  for layer in range(4 * ("moe" in name)):
    at = f"model.layers.{layer}.mlp.experts"
    of = {
      kind: np.stack([tensors.pop(f"{at}.{e}.{kind}_proj.weight") for e in range(4)])
      for kind in ("gate", "up", "down")
    }
    tensors[f"{at}.gate_up_proj"] = np.concatenate([of["gate"], of["up"]], axis=1)
    tensors[f"{at}.down_proj"] = of["down"]
  tensors = {k.replace("model.", "model.language_model.", 1): x for k, x in tensors.items()}
  others = dict.fromkeys(("model.visual.blocks.0.mlp.linear_fc1.weight", "mtp.fc.weight"), ONES)
  save_file(tensors | others, directory / "model.safetensors")
  text = json.loads((directory / "config.json").read_text())
  tied = {"tie_word_embeddings": text.pop("tie_word_embeddings")}
  whole = dict(model_type=name.removesuffix("_text"), text_config=text, vision_config={}) | tied
  (directory / "config.json").write_text(json.dumps(whole))
  (was, _, _, want), (now, _, _, got) = model(name), opened(directory)
  assert now.model.to_dict() == was.model.to_dict()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def test_names_of_the_hub(monkeypatch, tmp_path):
  hub = pytest.importorskip("huggingface_hub")
  monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
  assert files.locate("org/name") == tmp_path / "org/name"

  def fails(name, **_):
    raise OSError("no network")

  monkeypatch.setattr(hub, "snapshot_download", fails)
  with pytest.raises(UserError, match="could not be fetched: no network"):
    files.locate("org/name")
  with pytest.raises(UserError, match="is no directory"):
    files.locate("./nowhere")


@pytest.mark.parametrize(
  "overrides, words",
  [
    ({"model.pattern": "gla"}, "no family has these mixers alone"),
    (
      {"model.mixers.softmax.sinks": True},
      "llama has no place for config.model.mixers.softmax.sinks",
    ),
    ({"model.pattern": "softmax + softmax(qk_norm=True)"}, "settings of their own"),
    ({"model.mlp.hidden": 0}, "llama has no place for config.model.mlp.hidden = 0"),
    ({"model.pattern": "mla", "model.mixers.mla.rope_dim": 0}, "no place for rope_dim = 0"),
    ({"model.pattern": "dsa"}, "without q_lora_rank"),
    ({"model.pattern": "kda + mla"}, "no place for config.model.tie_embeddings = True"),
    ({"model.pattern": "mamba2"}, "mamba2 has no place for config.model.mlp.hidden = 192, only"),
  ],
)
def test_what_cannot_be_written(overrides, words):
  with pytest.raises(UserError, match=words):
    fitting(load_config("configs/softmax.py", overrides))


def test_files_of_some_size(monkeypatch, model, tmp_path):
  """A checkpoint of several files, with their index, is the same."""
  c, _, _, state = model("qwen3")
  monkeypatch.setattr(files, "_SHARD", 6000)
  size = write(c, state, tmp_path)
  names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
  assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == size
  whole = load_file(CHECKPOINTS / "qwen3" / "model.safetensors")
  assert index["weight_map"].keys() == whole.keys()
  tensors = files.Tensors(tmp_path)
  for name, x in whole.items():
    np.testing.assert_array_equal(tensors[name], x.astype(np.float32))
  with pytest.raises(UserError, match="holds a checkpoint already"):
    write(c, state, tmp_path)


def test_the_commands(tmp_path):
  """In, two updates more under the run's own config.json, and out; then in again where a run is."""
  # One device, as on a laptop.
  environment = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

  def command(module: str, *args: str) -> str:
    done = subprocess.run(
      [sys.executable, "-m", f"attnlab.{module}", *args],
      capture_output=True,
      text=True,
      cwd=CHECKPOINTS.parent.parent,
      env=environment,
    )
    return done.stdout if done.returncode == 0 else done.stderr

  run = tmp_path / "run"
  read = ["hf", f"--source={CHECKPOINTS / 'qwen3'}", f"--workdir={run}"]
  small = ["--config.data.seq_len=32", "--config.train.steps=2", "--config.train.eval_batches=1"]
  told = command(*read, "--config=configs/quickstart.py", *small)
  assert "2 layers, 1*softmax" in told and "bytes" in told
  command("train", f"--config={run / 'config.json'}", "--config.train.sample_every=0")
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert max(line["step"] for line in lines) == 2
  assert "of bfloat16" in command("hf", f"--workdir={run}", f"--export={tmp_path / 'out'}")
  assert (tmp_path / "out" / "model.safetensors").exists()
  assert "holds a run already" in command(*read)
  assert "give --source" in command("hf", f"--workdir={run}")
