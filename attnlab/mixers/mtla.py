"""Multi-head temporal latent attention: one latent for several tokens (MTLA, arXiv:2505.13544)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.mixers import references
from attnlab.mixers.attention import gated, new_cache
from attnlab.mixers.base import Cache, Context, Layer, MixerOutput, register
from attnlab.mixers.mla import MultiHeadLatentAttention
from attnlab.mixers.sparse import SparseCore, extend_tails
from attnlab.nn import Linear
from attnlab.settings import Natural
from pallas_kernels.block_sparse import merge_attention
from pallas_kernels.pool_attention import pool_attention

_zeros = jax.nn.initializers.zeros


@register(
  "mtla",
  family="softmax",
  paper="arXiv:2505.13544",
  title="latent attention, one latent for several tokens",
  variants={"three_nope": dict(compress=3, q_lora_rank=8, rope_dim=0, output_gate="head")},
)
class MultiHeadTemporalLatentAttention(SparseCore, MultiHeadLatentAttention):
  """Latent attention that keeps one latent for each chunk of tokens: the sum of theirs, each weighted by a gate.

  A token sees the chunks before its own, and of its own what is there so far: the sum up to itself. Queries meet
  latents as they are (``MultiHeadLatentAttention.absorbed``), in training too, as in the authors' code.
  """

  reference = references.temporal_latent_attention
  Hkv = 1
  head_axis = "heads"

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(MultiHeadLatentAttention.Config):
    """Sizes, by default the authors'.

    Attributes:
      compress: tokens of a chunk.
    """

    compress: int = 2
    kv_lora_rank: int = 256
    nope_dim: int = 64
    rope_dim: Natural = 32
    value_dim: int = 64

  def __init__(self, config: Config, layer: Layer, key: Array):
    super().__init__(config, layer, key)
    rank, few = config.kv_lora_rank, max(1, config.kv_lora_rank // 4)
    a, b = jax.random.split(jax.random.fold_in(key, 8))
    self.chunk_proj = Linear(a, rank, few, (None, None), bias=_zeros)
    self.token_proj = Linear(b, rank, few, (None, None), bias=_zeros)

  def core_flops(self, length: int, decode: bool) -> float:
    """Of the logits and the weighted sum over chunks, in latent space."""
    c = self.config
    seen = length / c.compress / (1 if decode else 2)
    return 2.0 * self.H * (2 * c.kv_lora_rank + c.rope_dim) * seen

  def init_cache(
    self, batch: int, max_len: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> Cache:
    """Latents of chunks, each with its last token's key with RoPE, and the tokens of one that is not complete."""
    c = self.config
    width, slots = c.kv_lora_rank + c.rope_dim, max(max_len // c.compress, 1)
    return new_cache(batch, max_len, {}, dtype) | {
      "pools": {"latent": jnp.zeros((batch, slots, 1, width), dtype)},
      "tail": {"latent": jnp.zeros((batch, c.compress - 1, 1, width), dtype)},
    }

  def __call__(
    self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None = None
  ) -> MixerOutput:
    c = self.config
    q, latent = self.projected(x, ctx)
    content, rest = jnp.split(latent, [c.kv_lora_rank], axis=-1)
    content = (self.gate(content, ctx.positions) * content).astype(x.dtype)
    tokens = {"latent": jnp.concatenate([content, rest], axis=-1)[:, :, None]}
    if cache is not None:
      tokens, tail = extend_tails(cache["tail"], tokens)
      cache = cache | {"tail": tail}
    own = {"own": self.so_far(tokens["latent"], ctx.positions)}
    o, cache, _ = self.sparse(self.into_latent(q), own, {}, tokens, ctx, cache)
    o = self.out_of_latent(o)
    return MixerOutput(self.out_proj.of_heads(gated(o, x, self.gate_proj)), cache)

  def gate(
    self, content: Float[Array, "B T R"], positions: Int[Array, "B T"]
  ) -> Float[Array, "B T 1"]:
    """A token's weight in its chunk: the sigmoid of a product of its latent with the chunk's number, as sines."""
    number = (positions // self.config.compress)[..., None].astype(jnp.float32)
    rank = content.shape[-1]
    angle = number * 10000.0 ** (-2 * jnp.arange((rank + 1) // 2) / rank)
    sines = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    sines = sines.reshape(*angle.shape[:2], -1)[..., :rank].astype(content.dtype)
    product = self.chunk_proj(sines).astype(jnp.float32) * self.token_proj(content)
    return jax.nn.sigmoid(jnp.sum(product, axis=-1, keepdims=True))

  def so_far(
    self, latents: Float[Array, "B S 1 L"], positions: Int[Array, "B T"]
  ) -> Float[Array, "B T 1 L"]:
    """What of each token's chunk is there at the token: the sum of contents, and its own key with RoPE.

    Args:
      latents: of the tokens, behind those of an earlier call, if there was one.
    """
    T, rank = positions.shape[1], self.config.kv_lora_rank
    before = latents.shape[1] - T
    place = (positions % self.config.compress)[..., None, None]
    content = latents[:, before:, :, :rank].astype(jnp.float32)
    padded = jnp.pad(latents[..., :rank], ((0, 0), (self.config.compress, 0), (0, 0), (0, 0)))
    for i in range(1, self.config.compress):
      start = before + self.config.compress - i
      content += jnp.where(place >= i, padded[:, start : start + T], 0)
    return jnp.concatenate([content.astype(latents.dtype), latents[:, before:, :, rank:]], axis=-1)

  def summarise(self, place, tokens, cache, weights):
    m, rank = self.config.compress, self.config.kv_lora_rank

    def entries(chunks):
      x = chunks["latent"]
      content = jnp.sum(x[..., :rank].astype(jnp.float32), axis=2).astype(x.dtype)
      return {"latent": jnp.concatenate([content, x[:, :, -1, :, rank:]], axis=-1)}

    return place.pools(entries, tokens, m, m, cache, place.layout.positions[0] - (m - 1))

  def mix(self, place, q, signals, tokens, pools, weights):
    own, latents = signals["own"], pools.values["latent"].astype(q.dtype)
    far = pool_attention(q, latents, latents, pools.first, pools.complete, scale=self.scale)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logit = self.scale * jnp.sum(q.astype(dtype) * own, axis=-1)
    # The last token of a chunk sees it whole: as the chunk that it is.
    last = place.layout.within % self.config.compress == self.config.compress - 1
    near = jnp.broadcast_to(own, q.shape), jnp.where(last[..., None], -jnp.inf, logit)
    return merge_attention(near, far)[0], {}
