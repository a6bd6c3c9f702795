"""Generates text from a run's checkpoint.

  python -m attnlab.generate --workdir=runs/kda --prompt='def main(' --temperature=0.7
  python -m attnlab.generate --workdir=runs/kda --prompt='import ' --prompt='class A:' --max_tokens=64

Prompts of different lengths are read together, the shorter ones padded on the left. --temperature=0
takes the likeliest token each time. At the end it prints how fast prompts were read (prefill) and
tokens made (decode), compilation left out. For a task or bare token shards a prompt is ids, '3 14 15'.
"""

import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree
from ml_collections import ConfigDict

from attnlab import cli, data, metrics, sharding
from attnlab.errors import UserError
from attnlab.state import load_model, reading_mesh, run_config
from attnlab.tokenizer import Tokenizer


def pad_left(
  prompts: Sequence[Sequence[int]],
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
  """Prompts as one array, and segment ids: 0 on the padding at the left, 1 on the prompt."""
  length = max(map(len, prompts))
  tokens, segment_ids = np.zeros((2, len(prompts), length), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, length - len(prompt) :] = prompt
    segment_ids[row, length - len(prompt) :] = 1
  return tokens, segment_ids


def sample(
  key: Array,
  logits: Float[Array, "B V"],
  temperature: Float[Array, " B"],
  top_k: int = 0,
  top_p: float = 1.0,
) -> Int[Array, " B"]:
  """One token of each row.

  Args:
    key: a PRNG key.
    logits: of the next token.
    temperature: 0: the likeliest token, whatever the other arguments say.
    top_k: only among so many of the likeliest; 0: all.
    top_p: only among the likeliest whose probabilities, at this temperature, first reach this sum
      (nucleus sampling, arXiv:1904.09751); 1: all.
  """
  warm = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
  if 0 < top_k < logits.shape[1]:
    least = jax.lax.top_k(warm, top_k)[0][:, -1:]
    warm = jnp.where(warm < least, -jnp.inf, warm)
  if top_p < 1:
    falling = jnp.sort(warm, axis=1, descending=True)
    p = jax.nn.softmax(falling, axis=1)
    inside = jnp.cumsum(p, axis=1) - p < top_p  # The first is always in.
    least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=1, keepdims=True)
    warm = jnp.where(warm < least, -jnp.inf, warm)
  drawn = jax.random.categorical(key, warm, axis=1)
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=1)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_len"))
def prefill(
  graphdef: nnx.GraphDef,
  model: PyTree,
  tokens: Int[Array, "B T"],
  segment_ids: Int[Array, "B T"],
  *,
  max_len: int,
) -> tuple[Float[Array, "B V"], PyTree]:
  """Reads prompts: the logits after them, and a cache for up to max_len tokens in all."""
  model = nnx.merge(graphdef, model["params"], model["rest"])
  cache = model.init_cache(tokens.shape[0], max_len)
  return model.prefill(tokens, cache, segment_ids)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_tokens", "top_k", "top_p", "eos_id"))
def decode(
  graphdef: nnx.GraphDef,
  model: PyTree,
  logits: Float[Array, "B V"],
  cache: PyTree,
  key: Array,
  temperature: Float[Array, " B"],
  *,
  max_tokens: int,
  top_k: int,
  top_p: float,
  eos_id: int,
) -> tuple[Int[Array, "B N"], Int[Array, ""]]:
  """Generates after `prefill` until all rows have ended or have max_tokens.

  Returns:
    The tokens, eos_id from a row's end on, and how many were generated in each row.
  """
  model = nnx.merge(graphdef, model["params"], model["rest"])

  def pick(key: Array, logits: Array, ended: Bool[Array, " B"]) -> Array:
    token = sample(key, sharding.put(logits, None, None), temperature, top_k, top_p)
    return jnp.where(ended, eos_id, token)

  def unfinished(carry) -> Bool[Array, ""]:
    count, _, _, _, ended, _ = carry
    return (count < max_tokens) & ~ended.all()

  def step(carry):
    count, key, logits, cache, ended, out = carry
    key, now = jax.random.split(key)
    token = pick(now, logits, ended)
    out = out.at[:, count].set(token)
    logits, cache = model.decode_step(token, cache)
    return count + 1, key, logits, cache, ended | (token == eos_id), out

  rows = temperature.shape[0]
  zero = jnp.zeros((), jnp.int32)
  start = (zero, key, logits, cache, jnp.zeros(rows, bool), jnp.full((rows, max_tokens), eos_id))
  count, *_, out = jax.lax.while_loop(unfinished, step, start)
  return out, count


def generate(
  graphdef: nnx.GraphDef,
  model: PyTree,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  *,
  max_tokens: int,
  temperature: float | Sequence[float] = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
) -> list[str]:
  """Continues prompts. What comes does not depend on how long the others of the list are.

  Args:
    graphdef, model: the model, {"params", "rest"}.
    tokenizer: its tokenizer.
    prompts: texts; each is the beginning of a document.
    max_tokens: at most so many are generated; a document may end before.
    temperature: one for all prompts, or one for each.
    top_k, top_p: see `sample`.
    seed: of what is drawn.

  Returns:
    What follows each prompt.
  """
  tokens, segment_ids = _encode(tokenizer, prompts)
  logits, cache = prefill(
    graphdef, model, tokens, segment_ids, max_len=tokens.shape[1] + max_tokens
  )
  out, _ = decode(
    graphdef,
    model,
    logits,
    cache,
    jax.random.key(seed),
    jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), len(prompts)),
    max_tokens=max_tokens,
    top_k=top_k,
    top_p=top_p,
    eos_id=tokenizer.eos_id,
  )
  return [_text(tokenizer, row) for row in np.asarray(out)]


def samples(
  config: ConfigDict, graphdef: nnx.GraphDef, model: PyTree, step: int
) -> list[dict[str, Any]]:
  """What a run shows of itself: each of its prompts continued greedily and at its temperature."""
  c = config.train
  temperatures = [0.0, c.sample_temperature] if c.sample_temperature else [0.0]
  prompts = [p for p in c.sample_prompts for _ in temperatures]
  heat = temperatures * len(c.sample_prompts)
  if not prompts or not c.sample_tokens:
    return []
  tokenizer = data.tokenizer(config.data)
  texts = generate(
    graphdef,
    model,
    tokenizer,
    prompts,
    max_tokens=c.sample_tokens,
    temperature=heat,
    seed=config.seed + step,
  )
  return [
    {"prompt": p, "temperature": t, "text": text}
    for p, t, text in zip(prompts, heat, texts, strict=True)
  ]


def _encode(tokenizer: Tokenizer, prompts: Sequence[str]):
  """Prompts as they were trained on: after what begins a document, where there are documents."""
  begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
  rows = [begin + tokenizer.encode(p).tolist() for p in prompts]
  if not all(rows):
    raise UserError("a task's rows begin with no id of their own: give ids, --prompt='3 14 15'")
  return pad_left(rows)


def _text(tokenizer: Tokenizer, ids: Int[np.ndarray, " N"]) -> str:
  ended = np.flatnonzero(ids == tokenizer.eos_id)
  return tokenizer.decode(ids[: ended[0]] if ended.size else ids)


def main(_) -> None:
  f = flags.FLAGS
  if not 0 < f.top_p <= 1:
    raise UserError(f"--top_p={f.top_p} must lie in (0, 1]")
  config, mesh = run_config(f.workdir), reading_mesh()
  step, graphdef, model = load_model(f.workdir, config, mesh, f.step)
  with jax.set_mesh(mesh):
    tokenizer = data.tokenizer(config.data)
    tokens, segment_ids = _encode(tokenizer, f.prompt)
    read = functools.partial(prefill, graphdef, model, max_len=tokens.shape[1] + f.max_tokens)
    write = functools.partial(
      decode,
      graphdef,
      model,
      key=jax.random.key(f.seed),
      temperature=jnp.full(len(f.prompt), f.temperature),
      max_tokens=f.max_tokens,
      top_k=f.top_k,
      top_p=f.top_p,
      eos_id=tokenizer.eos_id,
    )
    jax.block_until_ready(write(*read(tokens, segment_ids)))  # Compiles.
    began = time.perf_counter()
    prompt = jax.block_until_ready(read(tokens, segment_ids))
    middle = time.perf_counter()
    out, count = jax.device_get(write(*prompt))
    end = time.perf_counter()
  for text, row in zip(f.prompt, out, strict=True):
    print(f"--- {text!r}")
    print(text + _text(tokenizer, row))
  reading, writing = tokens.size / (middle - began), count * len(f.prompt) / (end - middle)
  print(
    f"--- checkpoint {step}: prefill {metrics.human(reading)} tokens/s,"
    f" decode {metrics.human(writing)} tokens/s in {len(f.prompt)} row(s)",
    file=sys.stderr,
  )


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
  flags.DEFINE_multi_string("prompt", [""], "Text to continue; may be given more than once.")
  flags.DEFINE_integer("max_tokens", 256, "Generated at most.", lower_bound=1)
  flags.DEFINE_float("temperature", 0.8, "0: the likeliest token.", lower_bound=0)
  flags.DEFINE_integer("top_k", 0, "Only among so many of the likeliest; 0: all.", lower_bound=0)
  flags.DEFINE_float("top_p", 1.0, "Only among the likeliest of this probability in all; 1: all.")
  flags.DEFINE_integer("seed", 0, "Of what is drawn.")
  flags.DEFINE_integer("step", None, "Of the checkpoint. Default: the newest.", lower_bound=0)
  cli.run(main)
