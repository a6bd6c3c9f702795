"""Test-time training: a state that is a small model, trained token by token. In XLA."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

State = tuple[tuple[Array, Array, Array, Array], ...]

# Chunks that the backward pass computes again from one kept state.
_GROUP = 8
_einsum = functools.partial(jnp.einsum, precision="highest")
gelu = functools.partial(jax.nn.gelu, approximate=True)


def norm(z: Float[Array, "... K"], scale: Float[Array, "... K"], bias: Float[Array, "... K"]):
  """LayerNorm over channels."""
  z = z - jnp.mean(z, axis=-1, keepdims=True)
  return z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + 1e-6) * scale + bias


def empty_state(batch: int, layers, dtype: jax.typing.DTypeLike = jnp.float32) -> State:
  """A document's before its first token, for layers (W, b) as ``ttt`` takes them."""
  zeros = [[jnp.zeros((batch, *x.shape), dtype) for x in layer] for layer in layers]
  return tuple((W, b, W, b) for W, b in zeros)


def ttt(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H K"],
  rate: Float[Array, "B T H"],
  place: Float[Array, "B T H"],
  step: Float[Array, "H b"],
  scale: Float[Array, "H K"],
  bias: Float[Array, "H K"],
  W1: Float[Array, "H K M"],
  b1: Float[Array, "H M"],
  W2: Float[Array, "H M K"] | None = None,
  b2: Float[Array, "H K"] | None = None,
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  initial_state: State | None = None,
  return_state: bool = False,
  chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H K"], State | None]:
  """TTT-Linear, or TTT-MLP where there is a second layer (arXiv:2407.04620, section 2 and appendix A).

  Each head has a model ``f``: ``z = x W1 + b1``, or ``gelu(x W1 + b1) W2 + b2``, and then ``x + norm(z)``. Of each
  token it learns to give the value for the key, by the gradient of ``|f(k) - v|^2 / 2`` at the parameters that there
  were before the token's mini-batch of ``b``, and gives ``f(q)`` with the parameters after it:

      W_t = W_0 - step[t] sum_{s <= t} rate_s dl_s/dW,        t and s in one mini-batch, W_0 of the one before.

  Sums of a mini-batch are products of matrices (its dual form). Documents of a row may begin anywhere.

  Args:
    q, k, v: in any floating dtype; computed in float32 at least.
    rate: of learning from each token.
    place: of each token in its mini-batch, from 0: its position in its document modulo ``b``. No gradient.
    step: what the sums are multiplied by at each place; a finished mini-batch's, for the next, by the last.
    scale, bias: of the norm.
    W1, b1, W2, b2: what each document begins with.
    segment_ids: documents packed in a row: a row's first continues the initial state.
    initial_state: of each layer the difference of its matrix and bias from W and b, and the sums of the mini-batch
      under way; [B, H, ...], zeros at a document's start. Without it, and without segment_ids, every row begins at
      place 0.
    return_state: whether the last token's is returned.
    chunk_size: tokens at a time, at most ``b``, which is the default.

  Returns:
    The outputs in v's dtype, and the state in float32 (float64 for float64 inputs), or None.
  """
  B, T, H, _ = k.shape
  dtype = jnp.promote_types(v.dtype, jnp.float32)
  size = step.shape[-1]
  C = min(chunk_size or size, size, T)
  layers = [(W1, b1)] if W2 is None else [(W1, b1), (W2, b2)]
  state = empty_state(B, layers, dtype) if initial_state is None else initial_state
  ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
  # Whether every chunk is a mini-batch.
  whole = segment_ids is None and initial_state is None and C in (size, T)

  # Tokens that fill the last chunks: of the last document, learning nothing.
  count = -(-T // C)
  group = min(_GROUP, count)
  groups = -(-count // group)

  def chunks(x, fill=None):
    """[B, T, ...] -> [groups, group, B, C, ...]."""
    more = [(0, 0), (0, groups * group * C - T)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, more, "edge") if fill is None else jnp.pad(x, more, constant_values=fill)
    x = jnp.moveaxis(x.reshape(B, groups * group, C, *x.shape[2:]), 1, 0)
    return x.reshape(groups, group, *x.shape[1:])

  by_head = [jnp.moveaxis(chunks(x.astype(dtype), 0), 4, 3) for x in (q, k, v, rate)]
  # What follows the last token begins nothing.
  by_head.append(jnp.moveaxis(chunks(jax.lax.stop_gradient(place).astype(dtype), 0.5), 4, 3))
  tokens = (*by_head, chunks(ids))
  constants = jax.tree.map(lambda x: x.astype(dtype), (layers, step, scale, bias))

  @jax.checkpoint
  def some(carry, tokens):
    return jax.lax.scan(jax.checkpoint(functools.partial(_chunk, constants, whole)), carry, tokens)

  (state, _), o = jax.lax.scan(
    some, (jax.tree.map(lambda x: x.astype(dtype), state), ids[:, 0]), tokens
  )
  o = jnp.moveaxis(o.reshape(-1, *o.shape[2:]), (0, 2), (1, 3))  # [B, chunks, C, H, K]
  o = o.reshape(B, -1, H, q.shape[-1])[:, :T].astype(v.dtype)
  return o, state if return_state else None


def _chunk(constants, whole: bool, carry, tokens):
  """A chunk of at most a mini-batch.

  Its tokens are of three kinds: those of a mini-batch that began before it (``old``), of the same document's next one,
  which begins in it (``new``), and of documents that begin in it. No other mini-batch begins in it.
  """
  layers, step, scale, bias = constants
  (state, last_id), (q, k, v, rate, place, ids) = carry, tokens
  before = jnp.concatenate([last_id[:, None], ids[:, :-1]], axis=1)
  document = jnp.cumsum(ids != before, axis=1)[:, None]
  batch = jnp.cumsum((place == 0) | (ids != before)[:, None], axis=2)
  old, new = ((document == 0) & (batch == 0)), ((document == 0) & (batch > 0))
  together = jnp.tril(batch[..., :, None] == batch[..., None, :])

  def learn(where, state):
    """Each layer's inputs, and the gradients of its results, with the state where it is the token's, else zeros."""
    where, x, results, inputs = where[..., None], k, [], []
    for (W, b), (D, d, *_) in zip(layers, state, strict=True):
      inputs.append(x)
      z = _einsum("bhci,hio->bhco", x, W) + b[:, None]
      results.append(z + where * (_einsum("bhci,bhio->bhco", x, D) + d[:, :, None]))
      x = gelu(results[-1])
    y, pull = jax.vjp(lambda z: norm(z, scale[:, None], bias[:, None]), results[-1])
    gradients = list(pull(k + y - v))
    for (W, _), (D, *_), z in zip(layers[:0:-1], state[:0:-1], results[-2::-1], strict=True):
      g = gradients[0]
      g = _einsum("bhco,hio->bhci", g, W) + where * _einsum("bhco,bhio->bhci", g, D)
      gradients = [*jax.vjp(gelu, z)[1](g), *gradients]
    return inputs, gradients

  def added(sums, inputs, gradients, where):
    """Sums over tokens ``where``."""
    out = []
    for (G, g), x, dz in zip(sums, inputs, gradients, strict=True):
      dz = (rate * where)[..., None] * dz
      out.append((G + _einsum("bhci,bhco->bhio", x, dz), g + jnp.sum(dz, axis=2)))
    return out

  sums = [layer[2:] for layer in state]
  if whole:
    learnt = [], []
  else:
    learnt = learn(old, state)
    sums = added(sums, *learnt, old)
  then = tuple(
    (D - step[:, -1, None, None] * G, d - step[:, -1, None] * g)
    for (D, d, *_), (G, g) in zip(state, sums, strict=True)
  )
  inputs, gradients = now = learn(new, then)
  if not whole:
    inputs, gradients = jax.tree.map(lambda a, b: jnp.where(new[..., None], b, a), learnt, now)

  # Places are one for all heads.
  at = jnp.take_along_axis(step[None], place[:, 0].astype(jnp.int32)[:, None], axis=2)
  x = q
  for (W, b), (D, d, G, g), (D_, d_), y, dz in zip(
    layers, state, then, inputs, gradients, strict=True
  ):
    z = _einsum("bhci,hio->bhco", x, W) + b[:, None]
    z += new[..., None] * (_einsum("bhci,bhio->bhco", x, D_) + d_[:, :, None])
    weights = together * (_einsum("bhci,bhji->bhcj", x, y) + 1)
    learned = _einsum("bhcj,bhjo->bhco", weights, rate[..., None] * dz)
    if not whole:
      z += old[..., None] * (_einsum("bhci,bhio->bhco", x, D) + d[:, :, None])
      learned += old[..., None] * (_einsum("bhci,bhio->bhco", x, G) + g[:, :, None])
    z -= at[..., None] * learned
    x = gelu(z)
  o = q + norm(z, scale[:, None], bias[:, None])

  was, begun = (m[:, :, -1] for m in (old, new))
  ends = added(
    [jax.tree.map(lambda x: _keep(was, x), layer[2:]) for layer in state],
    *(inputs, gradients, batch == batch[:, :, -1:]),
  )
  state = tuple(
    (_keep(was, D) + _keep(begun, D_), _keep(was, d) + _keep(begun, d_), *end)
    for (D, d, *_), (D_, d_), end in zip(state, then, ends, strict=True)
  )
  return (state, ids[:, -1]), o


def _keep(where, x):
  """x [B, H, ...] where it is so [B, H], else zeros."""
  return jnp.where(where.reshape(*where.shape, *[1] * (x.ndim - 2)), x, 0)
