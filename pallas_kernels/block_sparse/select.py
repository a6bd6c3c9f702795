"""The choice of blocks: exact, deterministic, and never of a later block or another document's."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def select_blocks(
  scores: Float[Array, "B G T N"],
  first: Int[Array, "B T"],
  complete: Int[Array, "B T"],
  current: Int[Array, "B T"],
  *,
  top_k: int,
  initial: int = 0,
  local: int = 0,
) -> Int[Array, "B G T S"]:
  """The blocks with the largest scores, besides forced ones, as ``block_sparse_attention`` takes them.

  Args:
    scores: of scored blocks, those of all documents of a row one after another (``Layout.table``).
    first: the number among them of the first block of each query's document.
    complete: how many of its document's blocks may be chosen by score: those that have a score and lie before it.
    current: the number within the document of the block that the query is in; negative: there is none to choose.
    top_k: how many blocks a query has, forced ones among them.
    initial, local: so many of the document's first, and of its last blocks up to the current one, are always chosen.

  Returns:
    Numbers within the document, ascending, -1 at the end where there are fewer than ``min(top_k, N + local)``. Of equal
    scores the lower number is taken. No gradient.

  Raises:
    ValueError: more blocks are forced than may be chosen.
  """
  if top_k < max(1, initial + local):
    raise ValueError(f"top_k = {top_k} is less than the {initial} + {local} that are always chosen")
  scores = jax.lax.stop_gradient(scores)
  B, G, T, N = scores.shape
  slots = jnp.arange(N) - first[..., None]
  end = jnp.minimum(complete, current + 1 - local)
  candidate = (slots >= initial) & (slots < end[..., None])
  count = min(top_k - initial - local, N)
  parts = []  # none of them empty: compiled for several devices, arrays of no elements have crashed XLA (jax 0.11.2)
  if count:
    values = jnp.where(candidate[:, None], scores, -jnp.inf)
    values, best = jax.lax.top_k(values, count)  # of equal ones the first comes first
    parts.append(jnp.where(values > -jnp.inf, best - first[:, None, :, None], -1))
  if local:
    recent = current[..., None] - jnp.arange(local)
    parts.append(
      jnp.where(recent >= initial, recent, -1)
    )  # where they meet, a block is forced once
  if initial:
    head = jnp.arange(initial)
    parts.append(jnp.where(head <= current[..., None], head, -1))
  parts = [
    x if x.ndim == 4 else jnp.broadcast_to(x[:, None], (B, G, T, x.shape[-1])) for x in parts
  ]
  chosen = jnp.concatenate(parts, axis=-1).astype(jnp.int32)
  last = jnp.iinfo(jnp.int32).max
  chosen = jnp.sort(jnp.where(chosen < 0, last, chosen), axis=-1)
  return jnp.where(chosen == last, -1, chosen)


def over_queries(fn: Callable[..., Any], rows: int, *args: Any, checkpoint: bool = True) -> Any:
  """``fn`` of some queries at a time, so that what it holds of every key is held for those alone.

  Args:
    fn: a function of arrays [B, rows, ...] to a tree of such arrays.
    rows: how many queries at a time.
    args: trees of arrays [B, T, ...]. The last part is padded with zeros.
    checkpoint: compute ``fn`` again in the backward pass. False: it has no gradient.

  Returns:
    The results for all T queries.
  """
  T = jax.tree.leaves(args)[0].shape[1]
  rows = min(rows, T)
  count = -(-T // rows)
  if count == 1:
    return fn(*args) if checkpoint else jax.lax.stop_gradient(fn(*args))

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, count * rows - T)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, rows, *x.shape[2:]), 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]

  chunks = jax.tree.map(cut, args)
  leaves, tree = jax.tree.flatten(chunks)
  one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in leaves]
  traced = jax.make_jaxpr(lambda *xs: fn(*jax.tree.unflatten(tree, xs)), return_shape=True)
  program, shapes = traced(*one)
  inputs = program.consts, leaves
  if not checkpoint:
    inputs = jax.tree.map(jax.lax.stop_gradient, inputs)
  outs = _recomputed(program.jaxpr, *(x for xs in inputs for x in _split(xs)))
  return jax.tree.map(join, jax.tree.unflatten(jax.tree.structure(shapes), outs))


# jax.checkpoint in a loop in a loop (of layers) keeps, of every chunk, what does not depend on what is differentiated,
# such as masks over all keys (jax 0.11.2); so does a loop whose results alone have no gradient. Here the backward pass
# has inputs and cotangents, and nothing else.


def _split(xs):
  """Those that have a gradient, and the others, with None in their places."""
  has = [jnp.issubdtype(x.dtype, jnp.inexact) for x in xs]
  return tuple([x if h == kind else None for x, h in zip(xs, has, strict=True)] for kind in (1, 0))


def _joined(xs, others):
  return [y if x is None else x for x, y in zip(xs, others, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(jaxpr, consts, other_consts, xs, others):
  consts = _joined(consts, other_consts)
  run = lambda chunk: jax.core.eval_jaxpr(jaxpr, consts, *_joined(*chunk))  # noqa: E731
  return jax.lax.map(run, (xs, others))


def _recomputed_forward(jaxpr, *args):
  return _recomputed(jaxpr, *args), args


def _recomputed_backward(jaxpr, args, cotangents):
  consts, other_consts, xs, others = args
  has = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in jaxpr.outvars]
  cotangents = [c for c, h in zip(cotangents, has, strict=True) if h]

  def one(sums, chunk):
    xs, others, cotangents = chunk

    def run(consts, xs):
      out = jax.core.eval_jaxpr(jaxpr, _joined(consts, other_consts), *_joined(xs, others))
      return [y for y, h in zip(out, has, strict=True) if h]

    dconsts, dxs = jax.vjp(run, consts, xs)[1](cotangents)
    return jax.tree.map(lambda s, d: s + d.astype(s.dtype), sums, dconsts), dxs

  # Sums of many chunks: of bfloat16 in float32.
  wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
  sums, dxs = jax.lax.scan(one, jax.tree.map(wide, consts), (xs, others, cotangents))
  return jax.tree.map(lambda d, x: d.astype(x.dtype), sums, consts), None, dxs, None


_recomputed.defvjp(_recomputed_forward, _recomputed_backward)
