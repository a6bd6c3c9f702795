"""A window of exact attention, and a linear state of what lies before it, in one sum (LoLCATs, arXiv:2410.10254)."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import references
from attnlab.mixers.attention import axes_of, document_ids, together
from attnlab.mixers.base import MixerOutput, register
from attnlab.mixers.softmax import SoftmaxAttention
from attnlab.mixers.sparse import Place, extend_tails
from attnlab.nn import param
from pallas_kernels import linear_attention, merge_attention


@register(
  "window_linear",
  family="linear",
  paper="arXiv:2410.10254",
  title="a window exactly, what lies before it as a linear state",
)
class WindowLinear(SoftmaxAttention):
  """Near tokens have the weights ``gamma exp(q . k / sqrt(K))``, far ones ``phi(q) . phi(k)``, and one sum of both is
  the denominator (section 3.3). phi is ``softmax([W x; -W x])``; W, for q and k, and gamma are each head's own.

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
    orthogonal = jax.nn.initializers.orthogonal(self.K**-0.25)
    self.q_features = param(a, orthogonal, shape, axes)
    self.k_features = param(b, orthogonal, shape, axes)
    self.log_gamma = param(b, jax.nn.initializers.zeros, (self.H,), ("heads",))

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
    weights = [put(p) for p in (self.q_features, self.k_features, self.log_gamma)]
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
    *features, log_gamma = weights
    w, k, v = self.config.window, tokens["k"], tokens["v"]
    place = Place.of(where, B, T)
    o, lse = place.full(q, k, v, window=w)
    near = o, lse + log_gamma
    # The token that leaves the window as each query comes; none that is of another document.
    if state is None:
      k, v = (jnp.pad(y, ((0, 0), (w, 0), (0, 0), (0, 0)))[:, :T] for y in (k, v))
    else:
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
  """``softmax([W x; -W x])`` of each head, float32: [B, T, H, 2 K]."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  y = jnp.einsum("bthk,hkj->bthj", x.astype(dtype), w.astype(dtype), precision="highest")
  return jax.nn.softmax(jnp.concatenate([y, -y], axis=-1), axis=-1)
