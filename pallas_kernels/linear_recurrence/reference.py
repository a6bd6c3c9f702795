"""The definition: the recurrence, token by token, as written. Slow, and differentiated by JAX itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence


def token_step(r: Recurrence, S: Float[Array, "B Hv K V"]):
  """One token of every sequence (time axis of length 1): the new state and the output [B, 1, Hv, V].

  This is also the decode step of every backend: it reads and writes the state once, in the state's accumulation dtype.
  """
  dtype = r.accumulate_dtype
  groups = r.v.shape[2] // r.k.shape[2]

  def token(x, repeat=False):
    x = x[:, 0].astype(dtype)
    return jnp.repeat(x, groups, axis=1) if repeat and groups > 1 else x

  q, k, v = token(r.q, True), token(r.k, True), token(r.v)
  S = before = S.astype(dtype)
  if r.decay == "constant":
    S = jnp.exp(r.log_decay.astype(dtype))[:, None, None] * S
  elif r.log_decay is not None:
    S = jnp.exp(token(r.log_decay))[..., None] * S
  seen = S if r.reads == "decayed" else before
  # Sums of products rather than dots: no backend then rounds the state to bfloat16, and the cost is the state's bytes.
  if isinstance(r.erase, KeyErase):
    beta = token(r.erase.beta)[..., None]
    v = beta * (v - jnp.sum(k[..., None] * seen, axis=-2))
  elif isinstance(r.erase, LowRankErase):
    read = jnp.sum(token(r.erase.b)[..., None] * seen, axis=-2)
    S = S + token(r.erase.a)[..., None] * read[..., None, :]
  S = S + k[..., None] * v[..., None, :]
  if r.bonus is None:
    o = jnp.sum(q[..., None] * S, axis=-2)
  else:
    u = jnp.repeat(r.bonus.astype(dtype), groups, axis=0)
    o = jnp.sum(q[..., None] * before, axis=-2) + jnp.sum(q * u * k, -1, keepdims=True) * v
  return o[:, None].astype(r.v.dtype), S


def linear_recurrence(
  r: Recurrence, initial_state: Float[Array, "B Hv K V"], runs: Int[Array, "B T"] | None
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
  """Scans ``token_step`` over time; the state is cleared where ``runs`` changes (run 0 keeps the initial state)."""

  def by_time(x):
    return jnp.moveaxis(x, 1, 0)[:, :, None]

  per_token = {"q": r.q, "k": r.k, "v": r.v, "erase": r.erase}
  if r.decay in ("scalar", "channel"):
    per_token["log_decay"] = r.log_decay
  starts = None
  if runs is not None:
    previous = jnp.concatenate([jnp.zeros_like(runs[:, :1]), runs[:, :-1]], axis=1)
    starts = jnp.moveaxis(runs != previous, 1, 0)

  def body(S, x):
    start, token = x
    if start is not None:
      S = jnp.where(start[:, None, None, None], 0.0, S)
    fields = {"log_decay": r.log_decay, "bonus": r.bonus, "reads": r.reads} | token
    o, S = token_step(Recurrence(**fields), S)
    return S, o[:, 0]

  final, o = jax.lax.scan(body, initial_state, (starts, jax.tree.map(by_time, per_token)))
  return jnp.moveaxis(o, 0, 1), final
