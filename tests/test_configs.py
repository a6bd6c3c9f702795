"""Every config file: loads, is checked, and its model has a finite loss and gradients that reach every parameter."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attnlab.config import check, load, resolve
from attnlab.mixers import mixers
from attnlab.mixers.__main__ import BEGIN, END, table
from attnlab.model import Model

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(
  p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("base", "__init__")
)


def batch_of(config, rows=1, length=16):
  tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, config.model.vocab_size)
  same = jnp.ones((rows, length), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(length), same.shape)
  return dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], weights=same.astype(jnp.float32),
              segment_ids=same, positions=positions)  # fmt: skip


@pytest.mark.parametrize("name", [*CONFIGS, "kda_dsa.py:shared"])
def test_config_traces(name):
  """The default size: the whole training loss and its gradient trace, with one gradient a parameter."""
  config = resolve(load(str(ROOT / f"configs/{name if '.py' in name else name + '.py'}")))
  check(config)
  model = jax.eval_shape(lambda: Model(config.model, jax.random.key(0)))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  loss = lambda p, b: nnx.merge(graphdef, p, rest).loss(b)  # noqa: E731
  shapes = jax.eval_shape(lambda p, b: jax.value_and_grad(loss, has_aux=True)(p, b),
                          params, jax.eval_shape(lambda: batch_of(config)))  # fmt: skip
  (value, metrics), grads = shapes
  assert value.shape == () and {"nll", "accuracy", "weight"} <= set(metrics)
  assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_makes_its_claim(name):
  """The command, the number that it gives, and how long it takes where."""
  text = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
  command = f"python -m attnlab.train --config=configs/{name}.py"
  _, first, *others = text.split(command)
  result = first.partition("\n")[2]
  assert re.search(r"\d+\.\d+ bits per byte|\d+ % of", result), result
  assert re.search(r"(minute|minutes|seconds) on two CPU cores", result), result
  for other in others:  # larger ones: a result, or that there is none yet
    assert re.search(r"not run here|\d+\.\d+ bits per byte|\d+ %", other), other


@pytest.mark.parametrize("name", mixers())
def test_every_mixer_has_a_config(name):
  assert name in CONFIGS


def test_the_readme_lists_every_mixer():
  """`python -m attnlab.mixers README.md` refreshes it."""
  text = (ROOT / "README.md").read_text()
  assert text.split(BEGIN)[1].split(END)[0].strip() == table()
