"""Native sparse attention (arXiv:2502.11089)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import sparse_references
from attnlab.mixers.attention import append_to_ring, attend, new_cache, together
from attnlab.mixers.base import MixerOutput, register
from attnlab.mixers.infllm2 import check_sizes, overlapping
from attnlab.mixers.sparse import SparseMixer, by_document, extend_tails
from attnlab.nn import Linear, fan_in, param, rope_heads
from attnlab.settings import Natural
from pallas_kernels.block_sparse import over_queries, select_blocks
from pallas_kernels.pool_attention import pool_attention, pool_weights, weights_at_a_time


class NSABase(SparseMixer):
  """Three branches, weighed by gates: attention to summaries of pools, to the blocks that these make look important,
  and to a window (equation 5)."""

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(SparseMixer.Config):
    """The paper's sizes (section 4.1).

    Attributes:
      block_size: l', tokens of a block.
      top_k: n, blocks of a query, forced ones among them.
      initial, local: blocks always chosen at the document's start, and up to the query's own.
      window: how many tokens the third branch sees.
    """

    block_size: int = 64
    top_k: int = 16
    initial: Natural = 1
    local: int = 2
    window: int = 512

  @classmethod
  def pool_sizes(cls, config: Config) -> tuple[int, int]:
    """l and d: tokens of a pool, and from one pool to the next."""
    raise NotImplementedError

  def __init__(self, config, layer, key):
    self.pool_size, self.pool_stride = self.pool_sizes(config)
    check_sizes(self.name, config, self.pool_size, self.pool_stride)
    if config.sinks:
      raise UserError(
        f"mixer {self.name!r}: its three branches have softmaxes of their own; sinks=True is not possible"
      )
    super().__init__(config, layer, key)
    self.branch_proj = Linear(jax.random.fold_in(key, 8), layer.d_model, self.H * 3)

  def gate_input(self, x):
    """What the gates are projected from."""
    return x

  def gates(self, x):
    """Of the three branches: [B, T, H, 3], float32."""
    gates = sharding.split(self.branch_proj(self.gate_input(x)), self.H, 3)
    return jax.nn.sigmoid(gates.astype(jnp.float32))

  def pool_shapes(self, max_len):
    shape = (max(max_len // self.pool_stride, 1), self.Hkv, self.K)
    return {"k": shape, "v": shape}

  def core_flops(self, length, decode):
    """Of three attentions; the first one's weights are the scores."""
    c = self.config

    def attention(most, keys):
      w = min(most, keys)
      return 4.0 * self.H * self.K * (w if decode else w - w * (w - 1) / 2 / keys)

    branches = attention(c.block_size * c.top_k, length) + attention(c.window, length)
    return branches + attention(length, length) / self.pool_stride

  def compressed(self, place, q, pools):
    """Attention to the pools, and the blocks that it points to (equations 7 to 11)."""
    c = self.config
    # How often each pool that reaches into a block counts in equation 9.
    ones = np.ones(c.block_size // self.pool_stride), np.ones(self.pool_size // self.pool_stride)
    times = jnp.asarray(np.convolve(*ones), jnp.float32)

    keys, scale = pools.values["k"], self.K**-0.5

    def choose(q, lse, first, complete, within):
      p = by_document(pool_weights(q, keys, first, complete, scale=scale, lse=lse), first)
      scores = overlapping(p, self.pool_size, self.pool_stride, c.block_size) @ times.astype(
        p.dtype
      )
      current, zero = within // c.block_size, jnp.zeros_like(first)
      forced = dict(initial=c.initial, local=c.local)
      chosen = select_blocks(scores, zero, current + 1, current, top_k=c.top_k, **forced)
      return chosen.swapaxes(1, 2)

    places = pools.first, pools.complete
    o, lse = pool_attention(q, keys, pools.values["v"], *places, scale=scale)
    args = q, lse, *places, place.layout.within
    chosen = over_queries(choose, weights_at_a_time(q, keys), *args, checkpoint=False)
    return o, chosen.swapaxes(1, 2)


class PoolMLP(nnx.Module):
  """``W_2 silu(W_1 [x_1 + e_1; ...; x_l + e_l])``: one vector for the l vectors of a pool and their places in it."""

  def __init__(self, key, size: int, channels: int):
    a, b, c = jax.random.split(key, 3)
    normal = jax.nn.initializers.normal(0.02)
    self.places = param(a, normal, (size, channels), (None, None), weight_decay=False)
    self.up = param(b, fan_in(), (size * channels, channels), (None, None))
    self.down = param(c, fan_in(), (channels, channels), (None, None))

  def weights(self):
    return {name: sharding.put(getattr(self, name)[...], None, None) for name in _MLP}

  @staticmethod
  def apply(weights, x):
    """[B, n, size, heads, K] -> [B, n, heads, K]."""
    places, up, down = (weights[name].astype(x.dtype) for name in _MLP)
    x = jnp.moveaxis(x + places[:, None], 2, 3)
    return jax.nn.silu(x.reshape(*x.shape[:3], -1) @ up) @ down


_MLP = ("places", "up", "down")


@register(
  "nsa",
  family="sparse",
  paper="arXiv:2502.11089",
  title="compressed, selected and window attention, gated",
  variants={"gqa": dict(num_heads=4, num_kv_heads=2, qk_norm=True)},
)
class NativeSparseAttention(NSABase):
  """As in the paper: each branch has keys and values of its own, a pool's summary is an MLP of its tokens and their
  places in it, and the gates are sigmoids of an MLP of the input (its width the paper does not say: as many as gates).

  Selected and window keys have RoPE; pools are summarised, and compared with the query, without it, as their places
  are learned: the paper does not say.
  """

  reference = sparse_references.nsa

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(NSABase.Config):
    """Attributes:
    pool_size: l, tokens of a pool, a multiple of pool_stride.
    pool_stride: d, tokens from one pool to the next; block_size is a multiple of it too.
    """

    pool_size: int = 32
    pool_stride: int = 16

  @classmethod
  def pool_sizes(cls, config):
    return config.pool_size, config.pool_stride

  def __init__(self, config, layer, key):
    super().__init__(config, layer, key)
    keys = jax.random.split(jax.random.fold_in(key, 2), 6)
    for i, name in enumerate(("k_pool", "v_pool", "k_near", "v_near")):
      setattr(self, f"{name}_proj", Linear(keys[i], layer.d_model, self.Hkv * self.K))
    self.k_mlp = PoolMLP(keys[4], self.pool_size, self.K)
    self.v_mlp = PoolMLP(keys[5], self.pool_size, self.K)
    up, proj = jax.random.split(jax.random.fold_in(key, 3))
    self.branch_up = Linear(up, layer.d_model, self.H * 3, ("embed", None))
    self.branch_proj = Linear(proj, self.H * 3, self.H * 3, (None, "heads"))

  def gate_input(self, x):
    return jax.nn.silu(self.branch_up(x))

  def core_flops(self, length, decode):
    # The MLPs' matrices are parameters, counted once a token; a pool of each key head ends every stride.
    matrices = 2 * (self.pool_size + 1) * self.K**2
    return super().core_flops(length, decode) + 2.0 * matrices * (self.Hkv / self.pool_stride - 1)

  def weights(self):
    return {"k_mlp": self.k_mlp.weights(), "v_mlp": self.v_mlp.weights()}

  def init_cache(self, batch, max_len, dtype=jnp.float32):
    """Selected keys and values whole, the window's in a ring, of the pools' what the next pool needs."""
    shape = (self.Hkv, self.K)
    tail = jnp.zeros((batch, self.pool_size - 1, *shape), dtype)
    near = new_cache(batch, self.config.window, {"k": shape, "v": shape}, dtype)
    cache = super().init_cache(batch, max_len, dtype)
    return cache | {"near": near, "tail": {"k_pool": tail, "v_pool": tail}}

  def __call__(self, x, ctx, cache=None):
    c = self.config

    def projected(name, norm=None):
      y = getattr(self, f"{name}_proj")(x)
      return y if norm is None else norm.heads(y)

    def turned(y):
      return rope_heads(y, ctx.positions, self.K, c.rope_theta, c.rope_fraction, c.rope_scaling)

    def heads(y):
      return sharding.split(y, y.shape[-1] // self.K, self.K)

    plain = projected("q", self.q_norm)
    k, k_near = (projected(name, self.k_norm) for name in ("k", "k_near"))
    q, k, k_near = (heads(turned(y)) for y in (plain, k, k_near))
    plain, near = heads(plain), {"k": k_near, "v": heads(projected("v_near"))}
    pool = {"k_pool": projected("k_pool", self.k_norm), "v_pool": projected("v_pool")}
    pool = {name: heads(y) for name, y in pool.items()}
    where = together(ctx)
    if cache is not None:
      ring, near, where = append_to_ring(cache["near"], near, ctx)
      pool, tail = extend_tails(cache["tail"], pool)
      cache = cache | {"near": ring, "tail": tail}
    near = attend(q, near["k"], near["v"], where, window=c.window)
    gates = self.gates(x)
    signals = {"plain": plain, "gates": gates}
    new = {"k": k, "v": heads(projected("v"))}
    o, cache, aux = self.sparse(q, signals, new, pool, ctx, cache)
    o = o + (gates[..., 2:] * near).astype(o.dtype)
    return MixerOutput(self.output(o, x), cache, aux)

  def summarise(self, place, tokens, cache, weights):
    positions = place.layout.positions

    def pools(tokens):
      return {n: PoolMLP.apply(weights[f"{n}_mlp"], tokens[f"{n}_pool"]) for n in ("k", "v")}

    tokens = {name: tokens[name] for name in ("k_pool", "v_pool")}
    offset = positions[0] - self.pool_size + 1  # of the tail, behind which the new tokens are
    return place.pools(pools, tokens, self.pool_size, self.pool_stride, cache, offset)

  def mix(self, place, q, signals, tokens, pools, weights):
    o, chosen = self.compressed(place, signals["plain"], pools)
    selected = place.attend(q, tokens["k"], tokens["v"], chosen, self.config.block_size)[0]
    gates = signals["gates"]
    return (gates[..., :1] * o + gates[..., 1:2] * selected).astype(q.dtype), {}
