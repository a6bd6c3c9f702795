"""Native sparse attention as flash-linear-attention has it (github.com/fla-org/native-sparse-attention)."""

from attnlab.mixers import sparse_references
from attnlab.mixers.base import register
from attnlab.mixers.nsa import NSABase


@register(
  "nsa_fla",
  family="sparse",
  paper="arXiv:2502.11089",
  title="NSA with shared keys and values, mean pools",
  variants={"gqa": dict(num_heads=4, num_kv_heads=2)},
)
class NativeSparseAttentionFLA(NSABase):
  """Differs from the paper: one set of keys and values for the three branches, with RoPE, and a pool is a block,
  summarised by its mean. It takes the mean of a group's weights for their sum, which chooses the same blocks."""

  reference = sparse_references.nsa_fla

  @classmethod
  def pool_sizes(cls, config):
    return config.block_size, config.block_size

  def signals(self, x, ctx):
    return {"gates": self.gates(x)}

  def summarise(self, place, tokens, cache, weights):
    size = self.config.block_size
    kv = {name: tokens[name] for name in ("k", "v")}
    mean = lambda blocks: {n: x.mean(axis=2) for n, x in blocks.items()}  # noqa: E731
    return place.pools(mean, kv, size, size, cache)

  def mix(self, place, q, signals, tokens, pools, weights):
    k, v = tokens["k"], tokens["v"]
    o, chosen = self.compressed(place, q, pools)
    branches = (
      o,
      place.attend(q, k, v, chosen, self.config.block_size)[0],
      place.full(q, k, v, window=self.config.window)[0],
    )
    gates = signals["gates"]
    return sum(gates[..., i : i + 1] * o for i, o in enumerate(branches)).astype(q.dtype), {}
