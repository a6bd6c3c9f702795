"""Accounting against the arrays and the programs it speaks of."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict

from attnlab import accounting, cli
from attnlab.errors import UserError
from attnlab.mixers import mixers
from attnlab.model import Model
from configs.base import base

TINY = {"num_heads": 2, "head_dim": 8, "state_dim": 8, "window": 16, "kv_lora_rank": 8}
TINY |= {"nope_dim": 8, "rope_dim": 4, "value_dim": 8}


def tiny(pattern: str, **model) -> ConfigDict:
  """A small model section; every mixer of it with small heads."""
  c = base().model
  c.update(dict(pattern=pattern, num_layers=4, d_model=32, vocab_size=64, dtype="bfloat16"))
  c.mlp.hidden = 48
  c.update(model)
  settings = {}
  for name, cls in mixers().items():
    fields = cls.Config.__dataclass_fields__
    settings[name] = {k: v for k, v in TINY.items() if k in fields}
  c.mixers = ConfigDict(settings)
  return c


@pytest.fixture(scope="module")
def mixture() -> ConfigDict:
  c = tiny("2*kda + 1*softmax | mla", num_layers=6, tie_embeddings=False)
  c.mlp.update(dict(experts=4, top_k=2, shared_experts=1, expert_hidden=16, dense_layers=1))
  return c


def test_parameters_are_those_of_the_model(mixture):
  model = Model(mixture, jax.random.key(0))
  arrays = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert accounting.parameters(mixture) == sum(x.size for x in arrays)
  unused = 5 * 2 * 3 * 32 * 16  # five layers leave two of four experts, of three matrices each
  rows = 63 * 32  # all rows of the embedding but one
  expected = accounting.parameters(mixture) - unused - rows
  assert accounting.active_parameters(mixture) == expected


@pytest.mark.parametrize("name", mixers())
def test_cache_bytes_are_those_of_the_arrays(name):
  c = tiny(name)
  cache = jax.eval_shape(lambda: Model(c, jax.random.key(0)).init_cache(2, 40))
  del cache["position"]
  arrays = jax.tree.leaves(cache)
  assert accounting.cache_bytes(c, 40, batch=2) == sum(x.size * x.dtype.itemsize for x in arrays)


def test_cache_of_known_mechanisms():
  """The formulas of the papers: 2 T Hkv d for attention, 2 w for a window, H K V in float32 for a state."""
  T, e = 1024, 2
  grows = {
    n: accounting.cache_bytes(tiny(n), 2 * T) - accounting.cache_bytes(tiny(n), T)
    for n in ("softmax", "swa", "mla", "kda")
  }
  ids = 4 * 4 * T  # segment ids of the cached tokens, in each of four layers
  assert grows["softmax"] == 4 * 2 * T * 2 * 8 * e + ids
  assert grows["mla"] == 4 * T * (8 + 4) * e + ids
  assert grows["swa"] == grows["kda"] == 0
  conv = 3 * (3 * 2 * 8) * e
  assert accounting.cache_bytes(tiny("kda"), T) == 4 * (2 * 8 * 8 * 4 + conv)


def dot_flops(jaxpr) -> float:
  """Two a multiply-add of every dot in a program, loops counted as often as they run."""
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += times * dot_flops(inner)
  return total


def test_matrices_cost_what_the_program_multiplies():
  """Of a model with no core to speak of: a window of one token leaves matrices and the head."""
  c = tiny("swa", dtype="float32")
  c.mixers.swa.window = 1
  T = 64
  model = jax.eval_shape(lambda: Model(c, jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
  counted = dot_flops(jax.make_jaxpr(lambda m, t: m.forward(t))(model, tokens).jaxpr) / T
  costs = accounting.costs(c, T)
  assert costs.train_flops == 3 * costs.prefill_flops
  # The blocks of the attention's program are wider than the window: at most a tenth more.
  assert costs.prefill_flops <= counted <= 1.1 * costs.prefill_flops + 4 * 4 * 2 * 16 * 64


@pytest.mark.parametrize(
  "name",
  "softmax swa fox mla mtla deltaformer simplicial linear_attention mamba2 mamba3 gated_deltanet gated_delta_product"
  " kda rwkv6 rwkv7 window_linear moba nsa_fla hca csa".split(),
)
def test_decoding_costs_what_xla_counts(name):
  """One layer, at sizes at which matrices matter more than what is elementwise, which XLA counts too: to 7.5 %. MLA's
  values are its latents with the rotated key beside them, a third more here. NSA's weights of pools share a product
  with the attention to them, which is found once compiled. Of a loop XLA counts one turn: of 2-simplicial attention's
  second tokens there is one.
  """
  c = tiny(name, num_layers=1, d_model=256, vocab_size=256, dtype="float32")
  c.mlp.hidden, (B, length) = 512, (4, 1024)
  sizes = dict(num_heads=4, window=64, second_window=1, block_size=16, top_k=4)
  sizes |= dict.fromkeys(("head_dim", "value_dim", "state_dim", "kv_lora_rank", "nope_dim"), 64)
  fields = mixers()[name].Config.__dataclass_fields__
  c.mixers[name] = {k: v for k, v in (sizes | {"rope_dim": 32}).items() if k in fields}
  model = jax.eval_shape(lambda: Model(c, jax.random.key(0)))
  cache = jax.eval_shape(lambda m: m.init_cache(B, length), model)
  tokens = jax.ShapeDtypeStruct((B,), jnp.int32)
  program = (
    jax.jit(lambda m, t, cache: m.decode_step(t, cache)).lower(model, tokens, cache).compile()
  )
  counted, told = program.cost_analysis()["flops"] / B, accounting.costs(c, length).decode_flops
  assert told <= counted <= (1.12 if name in ("mla", "mtla") else 1.08) * told


@pytest.mark.parametrize("name", ["kda", "mamba2", "gated_delta_product"])
def test_taps_are_no_matrix(name):
  """A parameter of two axes, by which no token is multiplied."""
  few, many = (accounting.costs(tiny(f"{name}(conv_size={n})"), 64) for n in (2, 9))
  assert many.parameters > few.parameters and many.prefill_flops == few.prefill_flops


@pytest.mark.parametrize("name", mixers())
def test_flops_grow_as_the_mechanism_says(name):
  """Linear mixers cost the same at any length; softmax grows with it, a window does not, log-linear ones with its
  logarithm."""
  c = tiny(name)
  a, b = accounting.costs(c, 4096), accounting.costs(c, 8192)
  assert a.prefill_flops > 0 and a.decode_flops > 0
  if name in ("softmax", "fox", "mla", "mtla", "deltaformer"):
    assert b.decode_flops > a.decode_flops and b.prefill_flops > a.prefill_flops
  elif name.startswith("log_linear"):
    before = accounting.costs(c, 2048)
    for kind in ("decode_flops", "prefill_flops", "cache_bytes"):
      x, y, z = (getattr(costs, kind) for costs in (before, a, b))
      assert z - y == pytest.approx(y - x) and z > y
  elif mixers()[name].family != "sparse":
    assert b.decode_flops == a.decode_flops
    assert b.prefill_flops == pytest.approx(a.prefill_flops, rel=0.01)  # a window's first tokens


@pytest.mark.parametrize("batch", [1, 16])
def test_decode_reads_the_weights_once_a_batch(mixture, batch):
  costs = accounting.costs(mixture, 1024, batch)
  weights = accounting.active_parameters(mixture) * 2
  assert costs.decode_bytes == accounting.cache_bytes(mixture, 1024) + weights / batch


def test_sparse_attention_reads_what_it_selects():
  """NSA's paper, Table 4: memory access at decoding, in tokens' worth; MoBA's likewise."""
  heads = "num_heads=64, num_kv_heads=4, head_dim=128"
  nsa = tiny(f"nsa({heads}, block_size=64, top_k=16, window=512, pool_size=32, pool_stride=16)")
  a_token = 2 * 4 * 128 * 2  # keys and values of four heads, bfloat16

  def cache_read(model, length):
    costs = accounting.costs(model, length)
    ids = 4 * (
      4 * length + 4
    )  # each token's document, and how many there are, in each of four layers
    return (costs.decode_bytes - costs.parameters * 2 - ids) / 4

  for length, tokens in ((8192, 2048), (16384, 2560), (32768, 3584), (65536, 5632)):
    got = cache_read(nsa, length) / a_token
    assert tokens <= got <= tokens + 64  # what the next pool needs, and the window's ids
  moba = tiny(f"moba({heads}, block_size=512, top_k=3)")
  assert (
    cache_read(moba, 32768) == (3 * 512 + 32768 / 512 / 2) * a_token
  )  # of blocks their mean keys


@pytest.mark.parametrize("name", mixers())
def test_decoding_reads_no_more_than_there_is(name):
  selects = mixers()[name].family == "sparse" and name != "hca"  # which reads all that it keeps
  for length in (8, 1 << 16):
    costs = accounting.costs(tiny(name), length)
    read = costs.decode_bytes - costs.active_parameters * 2
    assert 0 < read <= costs.cache_bytes
  assert (read < costs.cache_bytes) == selects


@pytest.mark.parametrize("name, total, active", [
  ("kimi_linear", 48e9, 3e9), ("qwen3_next", 80e9, 3e9), ("gpt_oss_swa", 20.9e9, 3.6e9),
  ("minimax_01", 456e9, 45.9e9),
])  # fmt: skip
def test_paper_sizes(name, total, active):
  """What the models' names and papers say; the active ones count embeddings and head differently."""
  from attnlab.config import load, resolve

  model = resolve(load(f"configs/{name}.py:paper")).model
  assert accounting.parameters(model) == pytest.approx(total, rel=0.03)
  assert accounting.active_parameters(model) == pytest.approx(active, rel=0.2)


@pytest.mark.parametrize(
  "given, lengths, words",
  [
    (None, ["4096"], "--config is missing"),
    (base(), ["4k"], "--lengths=4k must be numbers"),
    (base(), ["16", "0"], "--lengths=16,0 must be numbers"),
  ],
)
def test_what_the_command_wants_is_told(monkeypatch, given, lengths, words):
  flags = SimpleNamespace(config=given, lengths=lengths, batch=1)
  monkeypatch.setattr(cli.flags, "FLAGS", flags)
  with pytest.raises(UserError, match=words):
    accounting.main(None)
