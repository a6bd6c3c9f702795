"""Mamba-3 (arXiv:2603.15569)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab import sharding
from attnlab.errors import UserError
from attnlab.mixers import linear_references
from attnlab.mixers.base import Layer, Mixer, register
from attnlab.mixers.gates import inverse_softplus_step
from attnlab.mixers.linear import LinearMixer
from attnlab.mixers.mamba2 import inner_heads
from attnlab.nn import Linear, RMSNorm, param
from attnlab.settings import Fraction
from pallas_kernels import mamba3, segments
from pallas_kernels.rotation import cumulative_angle, rotate


@register(
  "mamba3",
  family="linear",
  paper="arXiv:2603.15569",
  title="trapezoidal step, rotating state",
  variants={
    "mimo": dict(rank=3),
    "groups": dict(num_heads=4, groups=2, rope_fraction=1.0),
  },
)
class Mamba3(LinearMixer):
  """Mamba-2 with a step that weighs the last two writes, a state that rotates, and (rank > 1) several inputs a head.

  No convolution and no activation on x, B, C; B and C are normalised and get a bias a head.
  """

  reference = linear_references.mamba3
  qkv_activation = None
  output_rank = 2

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config(Mixer.Config):
    """Attributes:
    num_heads: heads of x; None: expand * d_model / head_dim.
    head_dim: channels of an x head.
    state_dim: channels of B and C.
    groups: how many B and C there are; divides num_heads.
    rank: inputs and outputs of a head, the R of the MIMO form; 1: SISO. The paper's MIMO models have 4.
    expand: channels of x over d_model.
    rope_fraction: of the state that rotates.
    step_min, step_max: the step Delta at first, log-uniform. An angle is at most pi Delta: what must turn the state
      half-way round learns that from a step near 1 much sooner.
    """

    num_heads: int | None = None
    head_dim: int = 64
    state_dim: int = 128
    groups: int = 1
    rank: int = 1
    expand: float = 2.0
    rope_fraction: Fraction = 0.5
    step_min: float = 1e-3
    step_max: float = 0.1

  @classmethod
  def sizes(cls, config: Config, d_model: int):
    heads = config.num_heads or inner_heads(cls, config.expand * d_model, config.head_dim)
    if heads % config.groups:
      raise UserError(
        f"mixer {cls.name!r}: groups={config.groups} does not divide num_heads={heads}"
      )
    return heads, config.state_dim, heads, config.head_dim

  def make_projections(self, layer: Layer, keys):
    D, c, R = layer.d_model, self.config, self.config.rank
    keys = jax.random.split(keys[0], 8)
    ones = jax.nn.initializers.ones
    self.angles = int(self.K * c.rope_fraction) // 2
    self.x_proj = Linear(keys[0], D, self.H * self.V)
    for key, name in zip(keys[1:3], "BC", strict=True):
      width = c.groups * R * self.K
      setattr(self, f"{name}_proj", Linear(key, D, width, ("embed", None)))
      setattr(self, f"{name}_norm", RMSNorm(self.K, layer.norm_eps))
      bias = param(key, ones, (self.H, R, self.K), ("heads", None, None), weight_decay=False)
      setattr(self, f"{name}_bias", bias)
    self.dt_proj = Linear(keys[3], D, self.H)
    self.A_proj = Linear(keys[4], D, self.H)
    self.trap_proj = Linear(keys[5], D, self.H)
    if self.angles:  # Without rotation there is nothing to project to.
      self.theta_proj = Linear(keys[6], D, self.angles, ("embed", None))
    step = inverse_softplus_step(c.step_min, c.step_max)
    self.dt_bias = param(keys[7], step, (self.H,), ("heads",))
    self.D = param(keys[7], ones, (self.H,), ("heads",))
    if R > 1:
      shape, axes = (self.H, R, self.V), ("heads", None, None)
      for name, value in dict(x=1 / R, z=1.0, o=1 / R).items():
        init = jax.nn.initializers.constant(value)
        setattr(self, f"mimo_{name}", param(keys[7], init, shape, axes, weight_decay=False))

  def make_norm(self, layer: Layer):
    return None

  def _ranks(self, y: Float[Array, "B T H P"], name: str) -> Float[Array, "B T H R P"]:
    """The R inputs of each head: its channels under R weightings."""
    y = y[..., None, :]
    if self.config.rank == 1:
      return y
    weights = sharding.put(getattr(self, f"mimo_{name}")[...], "heads", None, None)
    return y * weights.astype(y.dtype)

  @property
  def steps(self) -> int:
    return self.config.rank

  def signals(self, x, recent, ctx):
    c = self.config

    def per_head(name):  # B and C: [B, T, H, R, N]
      y = getattr(self, f"{name}_proj")(x)
      y = y.reshape(*y.shape[:2], c.groups, c.rank, self.K)
      y = jnp.repeat(getattr(self, f"{name}_norm")(y), self.H // c.groups, axis=2)
      y = sharding.put(y, "batch", None, "heads", None, None)
      bias = sharding.put(getattr(self, f"{name}_bias")[...], "heads", None, None)
      return y + bias.astype(y.dtype)

    dt, A, trap = (
      getattr(self, f"{name}_proj")(x).astype(jnp.float32) for name in ("dt", "A", "trap")
    )
    dt = jax.nn.softplus(dt + sharding.put(self.dt_bias[...], "heads"))
    theta = jnp.zeros((*x.shape[:2], 0), jnp.float32)
    if self.angles:
      theta = self.theta_proj(x).astype(jnp.float32)
    theta = jnp.broadcast_to(theta[:, :, None], (*theta.shape[:2], self.H, self.angles))
    return dict(
      C=per_head("C"),
      B=per_head("B"),
      x=self._ranks(sharding.split(self.x_proj(x), self.H, self.V), "x"),
      g=dt * jnp.minimum(-jax.nn.softplus(A), -1e-4),
      dt=dt,
      trap=jax.nn.sigmoid(trap),
      theta=sharding.put(theta, "batch", None, "heads", None),
    )

  def output(self, o, x, signals):
    """``W_o sum_r w_r (o_r + D x_r) * silu(z_r)``."""
    D = sharding.put(self.D[...], "heads")[:, None, None]
    z = self._ranks(sharding.split(self.gate_proj(x), self.H, self.V), "z")
    y = (o + D * signals["x"]) * jax.nn.silu(z.astype(jnp.float32))
    if self.config.rank > 1:
      y = y * sharding.put(self.mimo_o[...], "heads", None, None)
    return self.out_proj(sharding.merge(jnp.sum(y, axis=3).astype(x.dtype), 2))

  def init_state(self, batch: int):
    """S, the last token's B (rotated) and x, and the angle so far; float32."""
    R, H = self.config.rank, self.H
    shapes = ((self.K, self.V), (R, self.K), (R, self.V), (self.angles,))
    return tuple(jnp.zeros((batch, H, *shape), jnp.float32) for shape in shapes)

  @staticmethod
  def core(
    C, B, x, g, dt, trap, theta, *, segment_ids=None, initial_state=None, axis_name=None, **options
  ):
    """``pallas_kernels.mamba3`` of B and C rotated by the angle ``phi_t = phi_{t-1} + pi tanh(theta_t) dt_t``."""
    turn = jnp.pi * jnp.tanh(theta) * dt[..., None]
    if initial_state is not None:
      *initial_state, phi = initial_state
      turn = turn.at[:, 0].add(phi.astype(turn.dtype))
    starts = None if segment_ids is None else segments.starts(segment_ids, axis_name)
    phi = cumulative_angle(turn, starts, axis_name)
    C, B = (rotate(y, phi[..., None, :], interleaved=y.shape[3] == 1) for y in (C, B))
    y, state = mamba3(
      C,
      B,
      x,
      g,
      dt,
      trap,
      segment_ids=segment_ids,
      initial_state=initial_state,
      axis_name=axis_name,
      **options,
    )
    if state is None:
      return y, None
    S, last_B, last_x = state
    return y, (S, last_B.astype(S.dtype), last_x.astype(S.dtype), phi[:, -1])

  @staticmethod
  def equation(state, C, B, x, g, dt, trap, theta):
    """h_t = alpha h_{t-1} + beta B_{t-1} x_{t-1}^T + gamma B_t x_t^T, y_t = h_t^T C_t, for B and C rotated by phi_t.

    alpha = exp(Delta A), beta = (1 - lambda) Delta alpha, gamma = lambda Delta; sums over the ranks.
    """
    S, last_B, last_x, phi = state
    phi = (phi + jnp.pi * jnp.tanh(theta) * dt + jnp.pi) % (2 * jnp.pi) - jnp.pi
    N, R = B.shape[1], B.shape[0]
    rotation = jnp.eye(N)
    for i, angle in enumerate(phi):
      j, k = (2 * i, 2 * i + 1) if R == 1 else (i, i + N // 2)
      cos, sin = jnp.cos(angle), jnp.sin(angle)
      rotation = rotation.at[jnp.array([j, j, k, k]), jnp.array([j, k, j, k])].set(
        jnp.array([cos, -sin, sin, cos])
      )
    B, C = B @ rotation.T, C @ rotation.T
    alpha = jnp.exp(g)
    S = alpha * S + (1 - trap) * dt * alpha * last_B.T @ last_x + trap * dt * B.T @ x
    return (S, B, x, phi), C @ S
