"""A lightning indexer's scores, ``I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s)`` (arXiv:2512.02556, equation 1)."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.index_scores import tpu, xla

_SCORES: dict[str, Callable[..., Array]] = {
  "xla": xla.scores,
  "tpu": tpu.scores,
  "interpret": functools.partial(tpu.scores, interpret=True),
}


def index_scores(
  q: Float[Array, "B t h d"],
  w: Float[Array, "B t h"],
  k: Float[Array, "B N d"],
  end: Int[Array, ""] | int | None = None,
  *,
  backend: str = "auto",
) -> Float[Array, "B t N"]:
  """Scores of some queries for all keys, in float32 (float64 for float64 inputs). Differentiable in q, w and k.

  No array of queries by heads by keys is held, but for a tile of keys; on TPUs by a Pallas kernel, and not in HBM.

  Args:
    q: queries of the indexer's heads.
    w: the heads' weights.
    k: keys, which all heads share.
    end: no query sees keys from here on: their scores, and the gradients of these, are zero. None: all are seen.
    backend: "auto", "xla", "tpu", or "interpret": the TPU's kernel on any machine, slowly.

  Raises:
    ValueError: arguments that do not fit.
    NotImplementedError: a backend that was named cannot serve the call.
  """
  (B, t, h, d), (_, N, _) = q.shape, k.shape
  if w.shape != (B, t, h) or k.shape != (B, N, d):
    raise ValueError(
      f"w must be [{B}, {t}, {h}] and k [{B}, N, {d}] to fit q {q.shape}; got {w.shape}, {k.shape}"
    )
  name = dispatch.xla_or_tpu(backend, jnp.result_type(q, w, k))
  return _SCORES[name](q, w, k, jnp.asarray(N if end is None else end, jnp.int32))
