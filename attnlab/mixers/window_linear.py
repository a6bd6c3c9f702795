"""A window of exact attention, and a linear state of what lies before it, in one sum (LoLCATs, arXiv:2410.10254)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import references
from attnlab.mixers.attention import axes_of, document_ids, together
from attnlab.mixers.base import MixerOutput, register
from attnlab.mixers.softmax import SoftmaxAttention
from attnlab.mixers.sparse import Place, extend_tails
from attnlab.nn import param
from pallas_kernels import linear_attention, merge_attention

# Queries whose logits with the window are there at a time, where the window is not longer.
_QUERIES = 128


@register(
  "window_linear",
  family="linear",
  paper="arXiv:2410.10254",
  title="a window exactly, what lies before it as a linear state",
)
class WindowLinear(SoftmaxAttention):
  """Near tokens have the weights ``gamma exp(l - c)``, ``l = q . k / sqrt(K)`` with c the greatest l of the window, far
  ones ``phi(q) . phi(k)``, and one sum of both is the denominator (section 3.3).

  phi is ``[softmax(W x); softmax(-W x)]``; W, for q and k, and ``gamma = sigmoid(w)`` are each head's own. As in the
  authors' code gradients go through c too.

  The cache is the window's tokens, and the sum of ``phi(k) [v; 1]`` over those that have left it.
  """

  reference = references.window_linear
  in_parts = False

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SoftmaxAttention.Config):
    """Attributes:
    window: tokens that are seen exactly, the query's own included.
    """

    window: int = 64

  def __init__(self, config, layer, key):
    super().__init__(config, layer, key)
    if self.Hkv != self.H or config.sinks:
      raise UserError(
        f"mixer {self.name!r}: num_kv_heads={self.Hkv} must be num_heads={self.H}, and sinks=False"
      )
    a, b = jax.random.split(jax.random.fold_in(key, 1))
    shape, axes = (self.H, self.K, self.K), ("heads", None, None)
    self.q_features = param(a, self.orthogonal, shape, axes)
    self.k_features = param(b, self.orthogonal, shape, axes)
    self.raw_gamma = param(b, jax.nn.initializers.zeros, (self.H,), ("heads",))

  @staticmethod
  def orthogonal(key, shape, dtype):
    """A matrix for each head, such that products of features at the start are like the logits."""
    init = jax.nn.initializers.orthogonal(shape[-1] ** -0.25)
    return jax.vmap(lambda key: init(key, shape[1:], dtype))(jax.random.split(key, shape[0]))

  def core_flops(self, length, decode):
    """Of the window; the state's reading and writing. The features' matrices are parameters."""
    w = min(self.config.window, length)
    seen = w if decode else w - w * (w - 1) / 2 / length
    return self.H * (4.0 * self.K * seen + 8.0 * self.K * (self.K + 1))

  def init_cache(self, batch, max_len, dtype=jnp.float32):
    w, shape = self.config.window, (self.H, self.K)
    tail = jnp.zeros((batch, w, *shape), dtype)
    return {
      "tail": {"k": tail, "v": tail, "ids": jnp.zeros((batch, w, 1), jnp.int32)},
      "state": jnp.zeros((batch, self.H, 2 * self.K, self.K + 1), jnp.float32),
    }

  def __call__(self, x, ctx, cache=None):
    q, k, v = self.heads_of(x, ctx)
    tokens, where, state = {"k": k, "v": v}, together(ctx), None
    if cache is not None:
      own = {"ids": document_ids(ctx)[..., None]}
      tokens, tail = extend_tails(cache["tail"], tokens | own)
      ids = tokens.pop("ids")[..., 0]
      # The tail has the positions before the first token's; those that are not filled have the id of padding.
      w = self.config.window
      where = {"query_positions": w + jnp.arange(x.shape[1]), "key_segment_ids": ids}
      where["segment_ids"] = ids[:, w:]
      state = cache["state"]
    put = lambda p: sharding.put(p[...], *p.get_metadata()["axes"])  # noqa: E731
    weights = [put(p) for p in (self.q_features, self.k_features, self.raw_gamma)]
    heads, state_axes = ("batch", None, "heads", None), None
    if state is not None:
      state_axes = ("batch", "heads", None, None)
    axes = (
      heads,
      {"k": heads, "v": heads},
      [("heads", None, None), ("heads", None, None), ("heads",)],
      axes_of(where),
      state_axes,
    )
    run = sharding.local(self.core, axes, (heads, state_axes))
    o, state = run(q, tokens, weights, where, state)
    cache = None if cache is None else {"tail": tail, "state": state}
    return MixerOutput(self.output(o, x), cache)

  def core(self, q, tokens, weights, where, state):
    B, T = q.shape[:2]
    *features, raw_gamma = weights
    w, k, v = self.config.window, tokens["k"], tokens["v"]
    place = Place.of(where, B, T)
    o, lse = place.full(q, k, v, window=w, with_lse=True)
    if state is None:
      k, v = (jnp.pad(y, ((0, 0), (w, 0), (0, 0), (0, 0))) for y in (k, v))
    top = greatest_logit(q, k, jnp.minimum(place.layout.within + 1, w))
    near = o, lse - top + jax.nn.log_sigmoid(raw_gamma)
    # The token that leaves the window as each query comes; none that is of another document.
    k, v = k[:, :T], v[:, :T]
    leaves = (place.layout.within >= w)[..., None, None]
    phi_q, phi_k = (feature_map(y, f) for y, f in zip((q, k), features, strict=True))
    dtype = phi_k.dtype
    phi_k = jnp.where(leaves, phi_k, 0)
    values = jnp.concatenate([v.astype(dtype), jnp.ones((*v.shape[:3], 1), dtype)], axis=-1)
    sums, state = linear_attention(
      phi_q,
      phi_k,
      values,
      scale=1.0,
      segment_ids=where.get("segment_ids") if state is None else None,
      initial_state=state,
      return_state=state is not None,
    )
    total = sums[..., -1]
    some = total > 0
    total = jnp.where(some, total, 1)
    far = sums[..., :-1] / total[..., None], jnp.where(some, jnp.log(total), -jnp.inf)
    return merge_attention(near, far)[0], state


def feature_map(x, w):
  """``[softmax(W x); softmax(-W x)]`` of each head, float32: [B, T, H, 2 K]."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  y = jnp.einsum("bthk,hkj->bthj", x.astype(dtype), w.astype(dtype), precision="highest")
  return jnp.concatenate([jax.nn.softmax(y, axis=-1), jax.nn.softmax(-y, axis=-1)], axis=-1)


def greatest_logit(
  q: Float[Array, "B T H K"], k: Float[Array, "B S H K"], count: Int[Array, "B T"]
) -> Float[Array, "B T H"]:
  """The greatest ``q . k / sqrt(K)`` of each query with the last ``count`` keys up to its own, in float32.

  Args:
    k: keys, those of the queries behind ``S - T`` earlier ones: at most so many of these are seen.
    count: 0: nothing is seen, and any number is given.
  """
  B, T, H, K = q.shape
  before = k.shape[1] - T
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  size = min(max(before, _QUERIES), T)
  blocks = -(-T // size)
  pad = lambda x: jnp.pad(x, ((0, 0), (0, blocks * size - T)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
  q_, k_, count_ = (jax.lax.stop_gradient(pad(x)) for x in (q, k, count))
  ahead = jnp.arange(before + size) - before - jnp.arange(size)[:, None]  # of a key, of its query

  def of_block(i):
    own, keys, seen = (
      jax.lax.dynamic_slice_in_dim(x, i * size, n, axis=1)
      for x, n in ((q_, size), (k_, before + size), (count_, size))
    )
    logits = jnp.einsum("bthk,bshk->bhts", own, keys, preferred_element_type=dtype)
    visible = (ahead <= 0) & (ahead > -seen[:, None, :, None])
    best = jnp.argmax(jnp.where(visible, logits, -jnp.inf), axis=-1)
    return i * size + jnp.swapaxes(best, 1, 2)

  best = jnp.moveaxis(jax.lax.map(of_block, jnp.arange(blocks)), 0, 1).reshape(B, -1, H)[:, :T]
  # The key again, for the gradient, and for no other rounding than attention's.
  key = jnp.take_along_axis(k, best[..., None], axis=1)
  return K**-0.5 * jnp.sum(q.astype(dtype) * key.astype(dtype), axis=-1)
