"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab import sharding
from attnlab.mixers import references
from attnlab.mixers.attention import Where, all_parts, append, axes_of, gated, new_cache, together
from attnlab.mixers.base import Cache, Context, Layer, Mixer, MixerOutput, register
from attnlab.nn import Linear, RMSNorm
from attnlab.settings import Natural, RopeScaling
from pallas_kernels.rope import rope
from pallas_kernels.softmax_attention import softmax_attention


@register(
  "mla",
  family="softmax",
  paper="arXiv:2405.04434",
  title="latent attention: low-rank keys and values",
  variants={
    "q_lora_nope": dict(q_lora_rank=8, rope_dim=0),
    "gated": dict(output_gate="head"),
    "yarn": dict(rope_scaling=("yarn", 4.0, 16, 1.0, 4.0)),
  },
)
class MultiHeadLatentAttention(Mixer):
  """Keys and values of all heads come from one latent vector a token, which is all that is cached.

  A head's key has two parts, ``W_uk c`` of the latent ``c = RMSNorm(W_dkv x)``, without position, and ``RoPE(W_kr x)``,
  shared by all heads. The second is left out where ``rope_dim`` is 0.
  """

  reference = references.latent_attention
  in_parts = True

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Sizes, by default DeepSeek-V2's, but for its latent of queries (1536 channels), which small models do without.

    Attributes:
      num_heads: None: ``d_model / nope_dim``.
      kv_lora_rank: channels of the latent.
      q_lora_rank: channels of a latent for queries, None: without.
      nope_dim: channels of a head's q and k without position.
      rope_dim: channels with RoPE, of which all heads share the key's; 0: none.
      rope: whether they are rotated at all (Kimi Linear keeps them, unrotated).
      value_dim: channels of a head's v.
      rope_theta: the base of RoPE.
      rope_scaling: of its frequencies, for texts longer than those of the first training: ("llama3" or "yarn", factor,
        length of those, and the turns within it below and above which a pair is wholly changed or kept)
        (pallas_kernels/rope/frequencies.py); None: none. YaRN's factor on logits (arXiv:2309.00071, eq. 22) is not in
        it: in a model that is read (attnlab.hf) it is in the weights.
      latent_eps: of the latents' norms; None: the model's norm_eps.
      output_gate: "head": ``sigmoid(W_g x)``, a number for each head, on what it gives (arXiv:2505.06708; Ling 3.0).
    """

    num_heads: int | None = None
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    nope_dim: int = 128
    rope_dim: Natural = 64
    rope: bool = True
    value_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    latent_eps: float | None = None
    output_gate: Literal["none", "head"] = "none"

  def __init__(self, config: Config, layer: Layer, key: Array):
    c, D = config, layer.d_model
    self.config = config
    self.H = H = self.heads(c, D)
    self.scale = (c.nope_dim + c.rope_dim) ** -0.5
    keys = jax.random.split(key, 7)
    q_inputs, eps = c.q_lora_rank or D, c.latent_eps or layer.norm_eps
    if c.q_lora_rank:
      self.q_down = Linear(keys[0], D, c.q_lora_rank, ("embed", None))
      self.q_norm = RMSNorm(c.q_lora_rank, eps)
    q_axes = (None if c.q_lora_rank else "embed", "heads")
    self.q_up = Linear(keys[1], q_inputs, H * (c.nope_dim + c.rope_dim), q_axes)
    self.kv_down = Linear(keys[2], D, c.kv_lora_rank, ("embed", None))
    self.kv_norm = RMSNorm(c.kv_lora_rank, eps)
    if c.rope_dim:
      self.k_rope = Linear(keys[3], D, c.rope_dim, ("embed", None))
    self.k_up = Linear(keys[4], c.kv_lora_rank, H * c.nope_dim, (None, "heads"))
    self.v_up = Linear(keys[5], c.kv_lora_rank, H * c.value_dim, (None, "heads"))
    self.out_proj = Linear(keys[6], H * c.value_dim, D, ("heads", "embed"))
    gate = jax.random.fold_in(key, 7)
    self.gate_proj = None if c.output_gate == "none" else Linear(gate, D, H)

  @staticmethod
  def heads(config: Config, d_model: int) -> int:
    """How many there are."""
    return config.num_heads or max(1, d_model // config.nope_dim)

  def core_flops(self, length: int, decode: bool) -> float:
    """Of the logits and the weighted sum; in latent space where a token is decoded."""
    c = self.config
    if decode:
      return 2.0 * self.H * (2 * c.kv_lora_rank + c.rope_dim) * length
    return self.H * (c.nope_dim + c.rope_dim + c.value_dim) * (length + 1.0)

  def init_cache(
    self, batch: int, max_len: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> Cache:
    """``latent`` is c, then the key with RoPE."""
    kept = {"latent": (self.config.kv_lora_rank + self.config.rope_dim,)}
    return new_cache(batch, max_len, kept, dtype)

  def absorbs(self, T: int) -> bool:
    """Whether T tokens had better attend in latent space: there each costs more, but no key need be expanded."""
    c = self.config
    expand = c.kv_lora_rank * (c.nope_dim + c.value_dim)
    return T * (2 * c.kv_lora_rank - c.nope_dim - c.value_dim) <= expand

  def __call__(
    self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None = None
  ) -> MixerOutput:
    q, latent = self.projected(x, ctx)
    if cache is None:
      o = self.expanded(q, latent, together(ctx), ctx.parts)
    else:
      cache, where = append(cache, {"latent": latent}, ctx)
      attend = self.absorbed if self.absorbs(x.shape[1]) else self.expanded
      o = attend(q, cache["latent"].astype(x.dtype), where)
    return MixerOutput(self.out_proj.of_heads(gated(o, x, self.gate_proj)), cache)

  def query_input(self, x: Float[Array, "B T D"]) -> Array:
    """What queries are projected from: the tokens, or their latent."""
    return x if self.config.q_lora_rank is None else self.q_norm(self.q_down(x))

  def projected(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, Array]:
    """Queries [B, T, H, nope_dim + rope_dim] and latents [B, T, kv_lora_rank + rope_dim]."""
    c = self.config
    q = self.q_up.to_heads(self.query_input(x), self.H)
    latent = self.kv_norm(self.kv_down(x))
    if c.rope_dim:
      k_rope = self.k_rope(x)
      if c.rope:
        # By XLA, as parts of something: a kernel would have them cut out first.
        turn = functools.partial(
          rope, positions=ctx.positions, theta=c.rope_theta, scaling=c.rope_scaling, backend="xla"
        )
        q = jnp.concatenate([q[..., : c.nope_dim], turn(q[..., c.nope_dim :])], axis=-1)
        k_rope = turn(k_rope[:, :, None])[:, :, 0]
      latent = jnp.concatenate([latent, k_rope], axis=-1)
    return q, latent

  def expanded(
    self,
    q: Float[Array, "B T H K"],
    latent: Float[Array, "B S L"],
    where: Where,
    parts: int = 1,
  ) -> Float[Array, "B T H V"]:
    """Multi-head attention with the keys and values that the latents stand for."""
    c = self.config
    content = latent[..., : c.kv_lora_rank]
    k_rope = latent[..., c.kv_lora_rank :] if c.rope_dim else None
    k, v = (up.to_heads(content, self.H) for up in (self.k_up, self.v_up))

    def core(q, k, k_rope, v, where):
      if k_rope is not None:
        k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], c.rope_dim))
        k = jnp.concatenate([k, k_rope], axis=-1)
      if parts > 1:
        k, v, where = all_parts(k, v, where)
      return softmax_attention(q, k, v, scale=self.scale, **where)[0]

    heads, shared = ("batch", None, "heads", None), ("batch", None, None) if c.rope_dim else None
    run = sharding.local(core, (heads, heads, shared, heads, axes_of(where)), heads)
    return run(q, k, k_rope, v, where)

  def absorbed(
    self, q: Float[Array, "B T H K"], latent: Float[Array, "B S L"], where: Where
  ) -> Float[Array, "B T H V"]:
    """The same, as multi-query attention on the latents: ``q . (W_uk c) = (W_uk^T q) . c``, and W_uv after the sum."""

    def core(q, latent, where):
      # The latents are values as they are, without a copy that leaves out the key's part with RoPE.
      kv = latent[:, :, None]
      return softmax_attention(q, kv, kv, scale=self.scale, **where)[0]

    heads = ("batch", None, "heads", None)
    run = sharding.local(core, (heads, ("batch", None, None), axes_of(where)), heads)
    return self.out_of_latent(run(self.into_latent(q), latent, where))

  def into_latent(self, q: Float[Array, "B T H K"]) -> Float[Array, "B T H L"]:
    """Queries as the latents are keys to them."""
    c = self.config

    def core(q, k_up):
      k_up = k_up.reshape(c.kv_lora_rank, -1, c.nope_dim)
      q_latent = jnp.einsum("bthn,rhn->bthr", q[..., : c.nope_dim], k_up)
      return jnp.concatenate([q_latent, q[..., c.nope_dim :]], axis=-1)

    return self._by_heads(core, q, self.k_up)

  def out_of_latent(self, o: Float[Array, "B T H L"]) -> Float[Array, "B T H V"]:
    """The heads' values, from sums of latents."""
    c = self.config

    def core(o, v_up):
      v_up = v_up.reshape(c.kv_lora_rank, -1, c.value_dim)
      return jnp.einsum("bthr,rhv->bthv", o[..., : c.kv_lora_rank], v_up)

    return self._by_heads(core, o, self.v_up)

  def _by_heads(self, core, x, up: Linear):
    heads = ("batch", None, "heads", None)
    # Where heads cannot be split over devices their columns must not be either.
    columns = (None, "heads" if self.H % sharding.size("heads") == 0 else None)
    return sharding.local(core, (heads, columns), heads)(x, up.kernel[...].astype(x.dtype))
