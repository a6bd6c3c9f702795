"""Causal softmax attention: one call for grouped heads, windows, sinks, biases of keys, caches and packed documents."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, segments
from pallas_kernels.softmax_attention import cudnn, reference, splash, xla
from pallas_kernels.softmax_attention.bias import as_channels
from pallas_kernels.softmax_attention.visibility import Visibility

_BACKENDS = {"reference": reference, "xla": xla, "cudnn": cudnn, "splash": splash}
_ORDER = {"cpu": ["xla"], "gpu": ["cudnn", "xla"], "tpu": ["splash", "xla"]}
# A library's kernel has no derivative of lse: all is computed again for it.
_ORDER_WITH_LSE = {platform: ["xla"] for platform in _ORDER}


def softmax_attention(
  q: Float[Array, "B Tq H D"],
  k: Float[Array, "B Tk Hkv D"],
  v: Float[Array, "B Tk Hkv V"],
  *,
  scale: float | None = None,
  window: int | None = None,
  sinks: Float[Array, " H"] | None = None,
  key_bias: Float[Array, "B Tk H"] | None = None,
  query_positions: Int[Array, " Tq"] | None = None,
  key_positions: Int[Array, " Tk"] | None = None,
  segment_ids: Int[Array, "B Tq"] | None = None,
  key_segment_ids: Int[Array, "B Tk"] | None = None,
  with_lse: bool = False,
  backend: str = "auto",
) -> tuple[Float[Array, "B Tq H V"], Float[Array, "B Tq H"]]:
  """``softmax(scale q k^T) v`` over the keys that each query sees, those at its position and before.

  Query head h reads key head ``h // (H / Hkv)``: H == Hkv is multi-head, Hkv == 1 multi-query attention. The softmax is
  float32 (float64 for float64 inputs) whatever the inputs are. Differentiable in q, k, v and sinks; the backward pass
  keeps the inputs, o and lse, and computes the rest again, so that memory grows linearly with Tq and Tk. So is it in
  key_bias, which every backend serves as channels of k (``bias.py``), in the precision of k.

  Without positions this is self-attention: Tq == Tk, query t and key t are one token. With them, queries meet a cache:
  a query sees keys at positions up to its own. Slots not filled yet have later positions, or negative ones.

  Args:
    q, k, v: queries, keys and values; V need not be D.
    scale: of the logits; ``None`` is D ** -0.5.
    window: a query sees this many positions, its own included; ``None``: all up to its own. The cost is then Tq times
      the window.
    sinks: a logit for each head that takes its share of the softmax and has no value (gpt-oss, arXiv:2508.10925).
    key_bias: a number for each key and query head that is added to the key's logits. With ``-cumsum(log f)`` logits are
      ``q_t . k_s + sum_{s < r <= t} log f_r``, but for a number of the query's, which the softmax does not see (but lse
      and sinks do): forgetting attention (arXiv:2503.02130).
    query_positions: of the queries, ascending; the same for all rows.
    key_positions: of the keys, in any order, -1 for none; ``None`` is 0, 1, ... where there are query_positions.
    segment_ids: without ``key_segment_ids``: a query sees the keys of its own run of equal ids. With them: it sees the
      keys whose id is its own.
    key_segment_ids: of the keys. Libraries do not take them: a query might see no key.
    with_lse: whether lse is used. "auto" is then no library's kernel, beside which "xla" would run for lse.
    backend: "auto", "xla" (in blocks, any platform), "cudnn" (jax.nn's, on GPUs), "splash" (JAX's Pallas kernel, on
      TPUs) or "reference" (all logits at once). Derivatives of higher order: "reference" alone.

  Returns:
    o in q's dtype, zero where a query sees nothing, and lse, the logarithm of the softmax's denominator (the sink's
    share included) in float32, -inf where it is zero. With lse, results over disjoint sets of keys can be merged.
    The backends of libraries compute lse apart, and only where it is used (under jit).

  Raises:
    ValueError: arguments that do not fit.
    NotImplementedError: a backend that was named cannot serve the call.
  """
  _check(
    q, k, v, window, sinks, key_bias, query_positions, key_positions, segment_ids, key_segment_ids
  )
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if key_bias is not None:
    q, k, scale = *as_channels(q, k, key_bias, scale), 1.0
  apart = key_segment_ids is not None
  if segment_ids is not None and not apart:
    segment_ids = key_segment_ids = segments.runs(segment_ids)
  aligned = query_positions is None and key_positions is None
  seen = Visibility(
    jnp.arange(q.shape[1]) if query_positions is None else query_positions,
    jnp.arange(k.shape[1]) if key_positions is None else key_positions,
    segment_ids,
    key_segment_ids,
    # One that reaches past the first key is none: a kernel then has less to compare.
    None if aligned and window is not None and window >= k.shape[1] else window,
    aligned,
    apart,
  )
  supports = {
    name: functools.partial(module.check, q, k, v, sinks, seen)
    for name, module in _BACKENDS.items()
  }
  name = dispatch.choose(backend, supports, _ORDER_WITH_LSE if with_lse else _ORDER)
  return _BACKENDS[name].forward(q, k, v, sinks, seen, scale)


def _check(
  q, k, v, window, sinks, key_bias, query_positions, key_positions, segment_ids, key_segment_ids
):
  for name, x in (("q", q), ("k", k), ("v", v)):
    if x.ndim != 4:
      raise ValueError(f"{name} must be [batch, time, heads, dim]; got {x.shape}")
  (B, Tq, H, D), (_, Tk, Hkv, _) = q.shape, k.shape
  if k.shape[0] != B or k.shape[3] != D:
    raise ValueError(f"k must be [{B}, Tk, Hkv, {D}] to fit q {q.shape}; got {k.shape}")
  if v.shape[:3] != k.shape[:3]:
    raise ValueError(f"v must be [{B}, {Tk}, {Hkv}, V] to fit k {k.shape}; got {v.shape}")
  if H % Hkv:
    raise ValueError(f"q's {H} heads must be a multiple of k's {Hkv}")
  if min(Tq, Tk) < 1:
    raise ValueError(f"q and k must hold at least one token; got {q.shape} and {k.shape}")
  if window is not None and window < 1:
    raise ValueError(f"window must be at least 1, the query's own position; got {window}")
  if query_positions is None and key_positions is not None:
    raise ValueError("key_positions must come with query_positions")
  alone = query_positions is None or (segment_ids is not None and key_segment_ids is None)
  if alone and Tq != Tk:
    raise ValueError(
      f"q has {Tq} tokens, k {Tk}: where they differ, query_positions must be given, and with "
      "segment_ids also key_segment_ids"
    )
  if segment_ids is None and key_segment_ids is not None:
    raise ValueError("key_segment_ids must come with segment_ids")
  for name, x, shape in (
    ("sinks", sinks, (H,)),
    ("key_bias", key_bias, (B, Tk, H)),
    ("query_positions", query_positions, (Tq,)),
    ("key_positions", key_positions, (Tk,)),
    ("segment_ids", segment_ids, (B, Tq)),
    ("key_segment_ids", key_segment_ids, (B, Tk)),
  ):
    if x is not None and x.shape != shape:
      raise ValueError(f"{name} must have shape {shape}; got {x.shape}")
