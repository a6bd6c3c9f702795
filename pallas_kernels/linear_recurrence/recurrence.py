"""The one recurrence that every linear mechanism is a case of, as a type.

Per head, with a state ``S`` of shape (K, V):

    S_t = (I + a_t b_t^T) diag(exp g_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t

What is absent (no decay, no erase) is ``None``, and what is simpler (one decay a head, an erase along the key that is
written) has a type or a shape of its own: kernels specialise on these, and never pay for what is not there.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyErase:
  """The delta rule: what is stored under the key is read, and the difference to the value is written.

      S <- S + beta_t k_t (v_t - k_t^T S)^T

  that is ``a = -beta k``, ``b = k``, and the written value is ``beta v``. The gradient step of size beta on
  ``|S^T k - v|^2 / 2`` (Schlag et al., arXiv:2102.11174).

  Attributes:
    beta: the step size; in (0, 2) the transition's eigenvalue 1 - beta |k|^2 stays within (-1, 1) for unit keys.
  """

  beta: Float[Array, "B T Hv"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankErase:
  """A rank-one change of the state along any two vectors: ``S <- S + a_t (b_t^T S)``; the write stays ``k v^T``.

  RWKV-7 (arXiv:2503.14456) and other diagonal-plus-low-rank transitions.
  """

  a: Float[Array, "B T Hv K"]
  b: Float[Array, "B T Hv K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrence:
  """The inputs of one recurrence over T tokens, for B sequences and Hv heads.

  Attributes:
    q: what reads the state. ``q`` and ``k`` may have fewer heads (H) than ``v``, H dividing Hv: value head ``h`` then
      uses key head ``h // (Hv // H)``. No scale is applied.
    k: the keys under which values are written. float32, bfloat16 or float64; arithmetic is at least float32.
    v: the values.
    log_decay: log of what is kept of the state a token, <= 0, float32. ``None``: everything. Shape (Hv,): a constant a
      head. [B, T, Hv, 1]: one rate a head and token. [B, T, Hv, K]: one a channel of the key.
    erase: ``None``, ``KeyErase`` or ``LowRankErase``.
    bonus: [H, K] or ``None``. With it the output reads the state before the token, plus the token itself under its own
      weight: ``o_t = (S_{t-1} + (bonus * k_t) v_t^T)^T q_t`` (RWKV-6, arXiv:2404.05892). Not together with an erase.
    reads: which state an erase sees: the "decayed" ``diag(exp g_t) S_{t-1}`` (Gated DeltaNet, KDA) or the "undecayed"
      ``S_{t-1}`` (Comba, RWKV-7). The decay itself is applied in both.
  """

  q: Float[Array, "B T H K"]
  k: Float[Array, "B T H K"]
  v: Float[Array, "B T Hv V"]
  log_decay: Float[Array, "..."] | None = None
  erase: KeyErase | LowRankErase | None = None
  bonus: Float[Array, "H K"] | None = None
  reads: Literal["decayed", "undecayed"] = dataclasses.field(
    default="decayed", metadata=dict(static=True)
  )

  @property
  def decay(self) -> Literal["none", "constant", "scalar", "channel"]:
    """The kind of decay; a head dimension of one makes scalar and channel the same, and counts as scalar."""
    if self.log_decay is None:
      return "none"
    if self.log_decay.ndim == 1:
      return "constant"
    return "scalar" if self.log_decay.shape[-1] == 1 else "channel"

  @property
  def accumulate_dtype(self) -> jnp.dtype:
    """The dtype of the state and of all arithmetic that touches it."""
    return jnp.promote_types(jnp.result_type(self.q, self.k, self.v), jnp.float32)

  def validate(self) -> None:
    """Raises ValueError, naming the argument, where shapes do not fit each other."""
    q, k, v = self.q, self.k, self.v
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
      raise ValueError(
        f"q, k and v must be [batch, time, heads, dim]; got q {q.shape}, k {k.shape}, v {v.shape}"
      )
    if q.shape != k.shape:
      raise ValueError(f"q and k must have one shape; got q {q.shape}, k {k.shape}")
    if v.shape[:2] != k.shape[:2]:
      raise ValueError(f"v must share batch and time with k; got v {v.shape}, k {k.shape}")
    B, T, H, K = k.shape
    Hv = v.shape[2]
    if T < 1:
      raise ValueError("there must be at least one token (T >= 1)")
    if min(B, H, Hv) < 1:
      raise ValueError(
        f"there must be at least one sequence and head; got k {k.shape} and v {v.shape}"
      )
    if Hv % H:
      raise ValueError(f"the heads of v ({Hv}) must be a multiple of the heads of q and k ({H})")

    def expect(name: str, x: Array, *shapes: tuple[int, ...]) -> None:
      if x.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; got {x.shape}")

    if self.log_decay is not None:
      expect("log_decay", self.log_decay, (Hv,), (B, T, Hv, 1), (B, T, Hv, K))
    if isinstance(self.erase, KeyErase):
      expect("erase.beta", self.erase.beta, (B, T, Hv))
    if isinstance(self.erase, LowRankErase):
      expect("erase.a", self.erase.a, (B, T, Hv, K))
      expect("erase.b", self.erase.b, (B, T, Hv, K))
    if self.bonus is not None:
      expect("bonus", self.bonus, (H, K))
      if self.erase is not None:
        raise ValueError("a bonus together with an erase is not defined by any mechanism")
    if self.reads not in ("decayed", "undecayed"):
      raise ValueError(f"reads must be 'decayed' or 'undecayed'; got {self.reads!r}")
