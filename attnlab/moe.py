"""Fine-grained mixture of experts (DeepSeekMoE, arXiv:2401.06066): many small SwiGLU experts, some for every token."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnlab import sharding
from attnlab.errors import UserError, unknown
from attnlab.nn import Linear, Stepped, SwiGLU, fan_in, param


class MoE(nnx.Module):
  """``shared(x) + sum over a token's top-k experts of weight * expert(x)``; no token is dropped.

  Args:
    key: a PRNG key.
    d_model, hidden: width of the residual stream and of an expert.
    experts, top_k: how many there are, and how many a token is routed to.
    shared: experts that every token passes, as one SwiGLU of ``shared * hidden``.
    shared_gate: ``sigmoid(w . x)`` weighs what they give (Qwen3-Next).
    router: scores of the experts: softmax, or sigmoid (arXiv:2412.19437). The chosen ones are divided by their sum.
    scale: multiplies the routed part.
    balance: weight of the balance loss.
    bias_rate: by how much an update raises the bias of experts that had less than their share of the tokens, and lowers
      that of the others (balancing without a loss, arXiv:2408.15664); 0: it stays.
    groups, top_groups: experts lie in so many groups side by side, and only those of the best ``top_groups``, by the
      sum of a group's two best scores, are chosen among (DeepSeek-V3, arXiv:2412.19437).
  """

  def __init__(
    self,
    key: Array,
    d_model: int,
    hidden: int,
    experts: int,
    top_k: int,
    shared: int = 0,
    router: Literal["softmax", "sigmoid"] = "softmax",
    scale: float = 1.0,
    balance: float = 0.01,
    shared_gate: bool = False,
    bias_rate: float = 0.0,
    groups: int = 1,
    top_groups: int = 1,
  ):
    if not 1 <= top_k <= experts:
      raise UserError(f"top_k={top_k} must be between 1 and the number of experts, {experts}")
    if (
      experts % groups or not 1 <= top_groups <= groups or top_k > top_groups * (experts // groups)
    ):
      raise UserError(
        f"top_k={top_k} of {experts} experts cannot be chosen from top_groups={top_groups} of groups={groups}"
      )
    if shared_gate and not shared:
      raise UserError("shared_gate=True weighs shared experts, of which there are none")
    if router not in ("softmax", "sigmoid"):
      raise unknown("router", router, ("softmax", "sigmoid"))
    keys = jax.random.split(key, 5)
    self.experts, self.top_k, self.router_kind = experts, top_k, router
    self.groups, self.top_groups = groups, top_groups
    self.scale, self.balance = scale, balance
    self.router = Linear(keys[0], d_model, experts, ("embed", None))
    # Added to the scores to choose by, not to weigh with (arXiv:2408.15664).
    self.bias = Stepped(jnp.zeros(experts), rate=bias_rate)
    init = fan_in(stacked=1)
    into, out = ("experts", "embed", None), ("experts", None, "embed")
    self.gate = param(keys[1], init, (experts, d_model, hidden), into)
    self.up = param(keys[2], init, (experts, d_model, hidden), into)
    self.down = param(keys[3], init, (experts, hidden, d_model), out)
    self.shared = SwiGLU(keys[4], d_model, shared * hidden) if shared else None
    key = jax.random.fold_in(keys[4], 1)
    self.shared_gate = Linear(key, d_model, 1, ("embed", None)) if shared_gate else None

  def __call__(
    self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"] | None = None
  ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """The mixed tokens, and scalars: ``balance_loss`` (weighted) and ``expert_load_max`` (1 when all get the same).

    Args:
      counted: the tokens whose experts are to be balanced, which padding is not; None: all.
    """
    counted = ~sharding.zeros(x.shape[:2], bool) if counted is None else counted
    weights = [
      sharding.put(w[...], "experts", None, None).astype(x.dtype)
      for w in (self.gate, self.up, self.down)
    ]
    rows = ("batch", None, None)
    run = sharding.local(
      self._routed,
      (rows, rows, rows[:2], (None,), [("experts", None, None)] * 3),
      (rows, (None,), {"balance_loss": (), "expert_load_max": ()}),
    )
    # Scores in float32 at least: a tie broken by rounding would change a token's experts.
    with jax.default_matmul_precision("highest"):
      logits = self.router(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    bias = self.bias[...]
    y, load, aux = run(x, logits, counted, jax.lax.stop_gradient(bias), weights)
    # Nothing, whose gradient for the bias is how much more than their share the experts had.
    excess = jnp.sum(jax.lax.stop_gradient(load - 1 / self.experts) * bias)
    aux["balance_loss"] += excess - jax.lax.stop_gradient(excess)
    if self.shared is not None:
      shared = self.shared(x)
      if self.shared_gate is not None:
        shared = shared * jax.nn.sigmoid(self.shared_gate(x))
      y = y + shared
    return y, aux

  def _choose(self, scores: Float[Array, "N E"]) -> Int[Array, "N k"]:
    """The experts of each token, by scores that have their bias."""
    if self.groups > 1:
      each = scores.reshape(len(scores), self.groups, -1)
      best = jax.lax.top_k(each, min(2, each.shape[2]))[0].sum(axis=-1)
      groups = jax.lax.top_k(best, self.top_groups)[1]
      among = (groups[:, :, None] == jnp.arange(self.groups)).any(axis=1)
      scores = jnp.where(among[..., None], each, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, self.top_k)[1]

  def _routed(self, x, logits, counted, bias, weights):
    """Each device's own tokens through its own experts, summed over devices."""
    gate, up, down = weights
    B, T, D = x.shape
    N, k, E = B * T, self.top_k, self.experts
    scores = jax.nn.softmax(logits) if self.router_kind == "softmax" else jax.nn.sigmoid(logits)
    scores = scores.reshape(N, E)
    chosen = self._choose(jax.lax.stop_gradient(scores) + bias)
    weight = jnp.take_along_axis(scores, chosen, axis=1)
    weight = self.scale * weight / (weight.sum(axis=1, keepdims=True) + 1e-20)

    # (token, choice) pairs in the order of their experts; pairs of other devices' experts come last.
    here = gate.shape[0]
    mine = chosen.reshape(-1) - sharding.part("experts") * here
    mine = jnp.where((mine >= 0) & (mine < here), mine, here)
    order = jnp.argsort(mine, stable=True)
    token = order // k
    sizes = jnp.bincount(mine, length=here + 1)[:here].astype(jnp.int32)
    # What ragged_dot makes of rows behind its groups is not defined: they are masked on the way in, for its gradient,
    # and on the way out.
    grouped = (jnp.arange(N * k) < sizes.sum())[:, None]
    rows = jnp.where(grouped, x.reshape(N, D)[token], 0)
    inner = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(inner, down, sizes).astype(logits.dtype)
    out = jnp.where(grouped, out, 0) * weight.reshape(-1)[order][:, None]
    y = sharding.sum_over("experts", jnp.zeros((N, D), out.dtype).at[token].add(out))

    # Switch Transformer's balance loss (arXiv:2101.03961, eq. 4) over all counted tokens of the batch.
    counted = counted.reshape(N, 1).astype(scores.dtype)
    number = jnp.maximum(sharding.sum_over("batch", counted.sum()), 1)

    def mean(x):
      return sharding.sum_over("batch", x) / number

    load = mean(jnp.zeros(E).at[chosen].add(counted)) / k
    probability = scores / scores.sum(axis=1, keepdims=True)
    balance = E * jnp.sum(load * mean(jnp.sum(counted * probability, axis=0)))
    aux = {"balance_loss": self.balance * balance, "expert_load_max": E * load.max()}
    return y.reshape(B, T, D).astype(x.dtype), load, aux
