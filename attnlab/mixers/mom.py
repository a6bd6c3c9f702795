"""Mixture-of-Memories (arXiv:2502.13685)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, register
from attnlab.mixers.gated_deltanet import GatedDeltaNet
from attnlab.mixers.gates import inverse_softplus_step, log_uniform_rate, softplus_decay, step_size
from attnlab.mixers.linear import LinearMixer
from attnlab.nn import Linear, l2norm_heads, param
from attnlab.settings import Natural, Range
from pallas_kernels import mixture_of_memories


@register(
  "mom",
  family="linear",
  paper="arXiv:2502.13685",
  title="several gated delta-rule states a head; a router chooses which a token writes and reads",
  variants={"unshared": dict(shared=0, memories=3)},
)
class MixtureOfMemories(LinearMixer):
  """Gated DeltaNet with ``memories`` states a head, of which a token writes and reads ``top_k``, weighted by a router,
  and ``shared`` ones besides, with weight 1.

  Each state has its own keys, values and gates; a convolution is over all tokens, those of other states included.
  Products are those of all states: what is not routed to one leaves it as it was.
  """

  erase = "key"
  core = staticmethod(mixture_of_memories)
  reference = linear_references.mixture_of_memories
  output_only = frozenset({"probability", "used"})

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(LinearMixer.Config):
    """Attributes:
    memories, top_k: that the router chooses among, and how many.
    shared: memories of every token.
    balance: weight of the loss that keeps memories equally used.
    """

    head_dim: int | None = 256
    expand_k: float = 0.75
    expand_v: float = 1.5
    memories: int = 4
    top_k: int = 2
    shared: Natural = 1
    balance: Annotated[float, Range(least=0)] = 0.01

  @property
  def steps(self):
    return self.config.memories + self.config.shared

  def make_projections(self, layer: Layer, keys):
    c, D = self.config, layer.d_model
    if self.Hv != self.H:
      raise UserError(f"mixer {self.name!r}: has as many heads of values as of keys")
    if c.top_k > c.memories:
      raise UserError(f"mixer {self.name!r}: top_k={c.top_k} of memories={c.memories}")
    M = self.steps
    widths = dict(q=self.H * self.K, k=self.H * M * self.K, v=self.H * M * self.V)
    self.make_convolved(D, keys, widths)
    more = jax.random.split(jax.random.fold_in(keys[0], 1), 5)
    self.router = Linear(more[0], D, c.memories, ("embed", None))
    self.a_proj = Linear(more[1], D, self.H * M)
    self.b_proj = Linear(more[2], D, self.H * M)
    self.A_log = param(more[3], log_uniform_rate(0, 16), (self.H,), ("heads",))
    self.dt_bias = param(more[4], inverse_softplus_step(), (self.H,), ("heads",))

  def init_state(self, batch):
    return jnp.zeros((batch, self.H, self.steps, self.K, self.V), jnp.float32)

  def signals(self, x, recent, ctx):
    c, M = self.config, self.steps
    q, k = (l2norm_heads(self.project(name, x, recent), self.K) for name in ("q", "k"))
    # In float32 at least: a tie broken by rounding would change a token's memories.
    with jax.default_matmul_precision("highest"):
      logits = self.router(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    probability = jax.nn.softmax(logits)
    most, chosen = jax.lax.top_k(probability, c.top_k)
    weights = most / jnp.sum(most, axis=-1, keepdims=True)
    route = jnp.sum(jax.nn.one_hot(chosen, c.memories) * weights[..., None], axis=-2)
    used = route > 0
    route = jnp.pad(route, ((0, 0), (0, 0), (0, c.shared)), constant_values=1)
    route = jnp.broadcast_to(route[:, :, None], (*route.shape[:2], self.H, M))
    a, b = (sharding.split(p(x), self.H, M) for p in (self.a_proj, self.b_proj))
    A_log, dt_bias = (sharding.put(p[...], "heads")[:, None] for p in (self.A_log, self.dt_bias))
    return dict(
      q=sharding.split(q, self.H, self.K),
      k=sharding.split(k, self.H, M, self.K),
      v=self.project("v", x, recent, self.H, M, self.V),
      g=softplus_decay(a, A_log, dt_bias),
      beta=step_size(b, False),
      route=sharding.put(route, "batch", None, "heads", None),
      probability=probability,
      used=used,
    )

  def scalars(self, signals, ctx):
    """Experts' balance loss (arXiv:2101.03961, eq. 4), and the greatest load (1 when all get the same)."""
    c = self.config
    load = jnp.mean(signals["used"], axis=(0, 1)) * (c.memories / c.top_k)
    loss = jnp.sum(load * jnp.mean(signals["probability"], axis=(0, 1)))
    return {"memory_balance_loss": c.balance * loss, "memory_load_max": load.max()}

  @staticmethod
  def equation(S, q, k, v, g, beta, route):
    """Gated DeltaNet's update of each state that the token is routed to; o_t = sum_m route_m S_m^T q_t (section 3)."""
    new, o = [], 0.0
    for S_m, k_m, v_m, g_m, b_m, r_m in zip(S, k, v, g, beta, route, strict=True):
      then, _ = GatedDeltaNet.equation(S_m, q, k_m, v_m, g_m, b_m)
      new.append(jnp.where(r_m > 0, then, S_m))
      o += r_m * new[-1].T @ (q * q.shape[0] ** -0.5)
    return jnp.stack(new), o
