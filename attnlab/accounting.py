"""What a config costs: parameters, FLOPs, cache bytes, bytes a decoded token. From shapes alone; nothing is allocated.

    python -m attnlab.accounting --config=configs/kimi_linear.py:paper --lengths=4096,131072,1048576

FLOPs are model FLOPs: two a multiply-add of what the mathematics needs. Masked halves count half, recomputation in the
backward pass and elementwise work nothing, and a backward pass twice the forward.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

from attnlab import cli
from attnlab.config import resolve
from attnlab.mixers import Mixer
from attnlab.model import Model
from attnlab.nn import is_matrix


@dataclasses.dataclass(frozen=True)
class Costs:
  """The figures of one config at one length of context.

  Attributes:
    length: tokens of context.
    parameters: all that are trained.
    active_parameters: those that a token meets: of routed experts, its own.
    train_flops: a token, forward and backward, mean over a sequence of this length.
    prefill_flops: a token, forward, mean over a prompt of this length.
    decode_flops: of the token after this length.
    cache_bytes: states, keys and values of one sequence, of all layers.
    decode_bytes: read for one token: the cache (of sparse attention what it selects, and what it selects by), and the
      active parameters in the activations' dtype over the batch.
    batch: sequences that share one reading of the parameters.
  """

  length: int
  parameters: int
  active_parameters: int
  train_flops: float
  prefill_flops: float
  decode_flops: float
  cache_bytes: int
  decode_bytes: float
  batch: int


def costs(model: ConfigDict, length: int, batch: int = 1) -> Costs:
  """All figures of a config's ``model`` section (vocab_size resolved)."""
  prefill = _matmul_flops(model) + _core_flops(model, length, decode=False)
  cache = cache_bytes(model, length)
  weights = active_parameters(model) * jnp.dtype(model.dtype).itemsize
  return Costs(
    length=length,
    parameters=parameters(model),
    active_parameters=active_parameters(model),
    train_flops=3 * prefill,
    prefill_flops=prefill,
    decode_flops=_matmul_flops(model) + _core_flops(model, length, decode=True),
    cache_bytes=cache,
    decode_bytes=cache - _unread_bytes(model, length) + weights / batch,
    batch=batch,
  )


def train_flops_per_token(config: ConfigDict) -> float:
  """Model FLOPs of one token of training under a whole config, at its sequence length."""
  return costs(config.model, config.data.seq_len).train_flops


def parameters(model: ConfigDict) -> int:
  """The number of trained values."""
  return sum(math.prod(p.get_value().shape) for p in _params(model))


def active_parameters(model: ConfigDict) -> int:
  """The number of trained values that one token meets. A row of an embedding counts as one row."""
  total = 0.0
  for p in _params(model):
    total += math.prod(p.get_value().shape) * _share(model, p)
  if not model.tie_embeddings:
    total -= (model.vocab_size - 1) * model.d_model
  return round(total)


def cache_bytes(model: ConfigDict, length: int, batch: int = 1) -> int:
  """Bytes of the cache of ``batch`` sequences of ``length`` tokens, without the model's own position counter."""
  cache = jax.eval_shape(lambda m: m.init_cache(batch, length), _abstract(model))
  layers = {k: v for k, v in cache.items() if k != "position"}
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(layers))


def _unread_bytes(model: ConfigDict, length: int) -> int:
  """Of one sequence's cache, what decoding a token leaves alone: keys and values that sparse mixers do not select."""
  total = 0
  for mixer, layers in mixers_of(model):
    if selected := mixer.selected(length):
      cache = jax.eval_shape(lambda m: m.init_cache(1, length, jnp.dtype(model.dtype)), mixer)
      for path, entries in selected.items():
        x = functools.reduce(lambda part, key: part[key], path.split("/"), cache)
        unread = max(x.shape[1] - entries, 0)
        total += layers * unread * math.prod(x.shape[2:]) * x.dtype.itemsize
  return total


def _abstract(model: ConfigDict) -> Model:
  return _abstract_of(model.to_json_best_effort(sort_keys=True))


@functools.lru_cache(maxsize=8)
def _abstract_of(model_json: str) -> Model:
  return jax.eval_shape(lambda: Model(ConfigDict(json.loads(model_json)), jax.random.key(0)))


def _params(model: ConfigDict) -> list[nnx.Param]:
  leaves = jax.tree.leaves(_abstract(model), is_leaf=lambda x: isinstance(x, nnx.Variable))
  return [x for x in leaves if isinstance(x, nnx.Param)]


def _share(model: ConfigDict, p: nnx.Param) -> float:
  """The share of a parameter that one token meets."""
  return model.mlp.top_k / model.mlp.experts if "experts" in p.get_metadata()["axes"] else 1.0


def _matmul_flops(model: ConfigDict) -> float:
  """Two a value of every matrix that a token is multiplied by; the head is one, the embedding is looked up."""
  total = 2.0 * model.vocab_size * model.d_model
  for p in _params(model):
    if is_matrix(p):
      total += 2.0 * math.prod(p.get_value().shape) * _share(model, p)
  return total


def mixers_of(model: ConfigDict) -> Iterator[tuple[Mixer, int]]:
  """Every distinct mixer of a model, abstract, and how many layers it stands for."""
  return _abstract(model).mixers()


def _core_flops(model: ConfigDict, length: int, decode: bool) -> float:
  return sum(n * mixer.core_flops(length, decode) for mixer, n in mixers_of(model))


def table(model: ConfigDict, lengths: Sequence[int], batch: int = 1) -> str:
  """The figures at several lengths, as text."""
  rows = [costs(model, n, batch) for n in lengths]
  head = f"parameters {rows[0].parameters:,}, active a token {rows[0].active_parameters:,}\n"
  columns = (
    "length",
    "train FLOPs",
    "prefill FLOPs",
    "decode FLOPs",
    "cache bytes",
    "decode bytes",
  )
  lines = ["".join(f"{c:>16}" for c in columns)]
  for r in rows:
    values = (r.train_flops, r.prefill_flops, r.decode_flops, r.cache_bytes, r.decode_bytes)
    lines.append(f"{r.length:>16,}" + "".join(f"{v:>16.4g}" for v in values))
  note = f"FLOPs and bytes are a token; decode bytes at batch {batch}; cache bytes a sequence.\n"
  return head + "\n".join(lines) + "\n" + note


def main(_) -> None:
  config = resolve(cli.config())
  print(table(config.model, cli.lengths(), flags.FLAGS.batch), end="")


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_list("lengths", ["4096", "131072", "1048576"], "Tokens of context.")
  flags.DEFINE_integer("batch", 1, "Sequences that share one reading of the parameters.", 1)
  cli.run(main)
