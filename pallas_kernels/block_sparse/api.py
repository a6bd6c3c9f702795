"""Block-sparse attention: the blocks are given, by whatever mechanism chose them."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.block_sparse import gpu, reference, tpu, xla
from pallas_kernels.block_sparse.layout import Layout
from pallas_kernels.softmax_attention import softmax_attention

_FORWARD: dict[str, Callable[..., tuple[Array, Array]]] = {
  "xla": xla.forward,
  "tpu": tpu.forward,
  "interpret": functools.partial(tpu.forward, interpret=True),
  "gpu": gpu.forward,
  "interpret_gpu": functools.partial(gpu.forward, interpret=plgpu.InterpretGPUParams()),
}
_CHECKS = {
  "reference": reference.check,
  "xla": xla.check,
  "tpu": tpu.check,
  "interpret": tpu.limitations,
  "gpu": gpu.check,
  "interpret_gpu": gpu.limitations,
}
_ORDER = {"cpu": ["xla"], "gpu": ["gpu", "xla"], "tpu": ["tpu", "xla"]}
# Few queries of a cache: the TPU kernel reads all of it, and for the GPU kernel all of it is padded.
_FEW = _ORDER | {"gpu": ["xla"], "tpu": ["xla"]}


def block_sparse_attention(
  q: Float[Array, "B Tq H D"],
  k: Float[Array, "B Tk Hkv D"],
  v: Float[Array, "B Tk Hkv V"] | int,
  block_indices: Int[Array, "B G Tb S"],
  *,
  block_size: int,
  query_block: int = 1,
  scale: float | None = None,
  window: int = 0,
  sinks: Float[Array, " H"] | None = None,
  segment_ids: Int[Array, "B Tq"] | None = None,
  query_positions: Int[Array, " Tq"] | None = None,
  starts: Int[Array, " B"] | None = None,
  backend: str = "auto",
) -> tuple[Float[Array, "B Tq H V"], Float[Array, "B Tq H"]]:
  """Softmax attention of each query to the keys of its blocks, and of a window, up to its own position.

  Block j of a query is the keys ``[j block_size, (j + 1) block_size)`` of the query's own document, counted from the
  document's first key; those after the query are hidden. The softmax is float32 (float64 for float64 inputs).
  Differentiable in q, k, v and sinks, in both results; memory grows linearly with Tq and Tk.

  This is the attention of NSA (arXiv:2502.11089, equation 12), MoBA (arXiv:2502.13189, equation 2) and InfLLM-V2
  (arXiv:2509.24663), and with blocks of one token of DSA (arXiv:2512.02556).

  Args:
    q, k, v: queries, keys and values; V need not be D. Query head h reads key head ``h // (H / Hkv)``. A number V: the
      values are the keys' first V channels, as in latent attention, and gathered blocks are read once for both.
    block_indices: the blocks of each group of query heads and each query, every block once, -1 for none. G is a
      multiple of Hkv and divides H; neighbouring heads are a group.
    block_size: tokens of a block.
    query_block: neighbouring queries of a row that share blocks: query t has ``block_indices[:, :, t // query_block]``.
    scale: of the logits; ``None`` is D ** -0.5.
    window: a query also sees so many positions up to its own.
    sinks: a logit for each head that takes its share of the softmax and has no value (gpt-oss, arXiv:2508.10925).
    segment_ids: documents of a row, runs of equal ids, where queries and keys are the same tokens.
    query_positions: the key that each query stands at, where the keys are a cache. Without it queries and keys are the
      same tokens.
    starts: with query_positions: the first key of each row's document. What comes before is padding; a query there sees
      nothing. ``None`` is 0.
    backend: "auto", "tpu" (Pallas kernels; for blocks of no multiple of 16 tokens of what is gathered), "gpu" (Pallas
      kernels; bfloat16, blocks of multiples of 64), "interpret" and "interpret_gpu" (the same, on any machine, slowly),
      "xla" (gathers the blocks of some queries at a time) or "reference" (a dense mask, all logits at once). The
      window is ``softmax_attention``'s, with "xla" that of XLA, else as that chooses.

  Returns:
    o in q's dtype, zero where a query sees nothing, and lse, the logarithm of the softmax's denominator in float32,
    -inf where it is zero. With lse, results over disjoint sets of keys can be merged (``merge_attention``).

  Raises:
    ValueError: arguments that do not fit.
    NotImplementedError: a backend that was named cannot serve the call.
  """
  values = reference.values_of(k, v)
  _check(q, k, values, block_indices, block_size, query_block, window, sinks)
  _check_places(q, k, segment_ids, query_positions, starts)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  (B, Tq), Tk = q.shape[:2], k.shape[1]
  if query_positions is None:
    layout = Layout.together(B, Tq, segment_ids)
    where: dict[str, Any] = {} if segment_ids is None else dict(segment_ids=segment_ids)
  else:
    starts = jnp.zeros(B, jnp.int32) if starts is None else starts
    layout = Layout.cached(query_positions, starts)
    where = dict(
      query_positions=query_positions,
      # A query in the padding has an id that no key has.
      segment_ids=jnp.where(layout.within >= 0, 1, 2),
      key_segment_ids=(jnp.arange(Tk) >= starts[:, None]).astype(jnp.int32),
    )
  blocks = reference.Blocks(block_indices, layout, block_size, query_block, window)
  supports = {name: functools.partial(f, q, k, values, blocks) for name, f in _CHECKS.items()}
  few = query_positions is not None and xla.few(q, k, blocks)
  name = dispatch.choose(backend, supports, _FEW if few else _ORDER)
  if name == "reference":
    return reference.forward(q, k, v, sinks, blocks, scale)
  # The blocks without what the window shows, and the window.
  far = _FORWARD[name](q, k, v, blocks, scale)
  if not window:
    return _with_sinks(*far, sinks)
  where |= dict(scale=scale, window=window, sinks=sinks, with_lse=True)
  near = softmax_attention(q, k, values, **where, backend="xla" if backend == "xla" else "auto")
  return merge_attention(far, near)


def _with_sinks(o, lse, sinks):
  """``(o, lse)`` of a softmax that sinks have a part of."""
  if sinks is None:
    return o, lse
  return merge_attention((o, lse), (None, jnp.broadcast_to(sinks.astype(lse.dtype), lse.shape)))


def merge_attention(
  *parts: tuple[Float[Array, "B T H V"] | None, Float[Array, "B T H"]],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
  """Attention over the union of disjoint sets of keys, from ``(o, lse)`` over each. Differentiable in all of them.

  Without an o, as of sinks, a part has its share of the softmax and no value; not all can be so.
  """
  lse = jnp.stack([lse for _, lse in parts])
  top = jnp.max(lse, axis=0)
  top = jnp.where(top == -jnp.inf, 0, top)
  # -inf has no derivative: what sees nothing goes around exp.
  seen = lse > -jnp.inf
  weights = jnp.where(seen, jnp.exp(jnp.where(seen, lse, 0) - top), 0)
  total = jnp.sum(weights, axis=0)
  some = total > 0
  total = jnp.where(some, total, 1)
  outputs = [(w, o) for w, (o, _) in zip(weights, parts, strict=True) if o is not None]
  o = sum(w[..., None] * o.astype(lse.dtype) for w, o in outputs)
  merged = jnp.where(some, top + jnp.log(total), -jnp.inf)
  return (o / total[..., None]).astype(outputs[0][1].dtype), merged


def _check(q, k, v, block_indices, block_size, query_block, window, sinks):
  for name, x in (("q", q), ("k", k), ("v", v), ("block_indices", block_indices)):
    if x.ndim != 4:
      raise ValueError(f"{name} must have four axes; got {x.shape}")
  (B, Tq, H, D), (_, Tk, Hkv, _) = q.shape, k.shape
  if k.shape[0] != B or k.shape[3] != D:
    raise ValueError(f"k must be [{B}, Tk, Hkv, {D}] to fit q {q.shape}; got {k.shape}")
  if v.shape[:3] != k.shape[:3]:
    raise ValueError(f"v must be [{B}, {Tk}, {Hkv}, V] to fit k {k.shape}; got {v.shape}")
  if min(Tq, Tk) < 1:
    raise ValueError(f"q and k must hold at least one token; got {q.shape} and {k.shape}")
  for name, x, least in (
    ("block_size", block_size, 1),
    ("query_block", query_block, 1),
    ("window", window, 0),
  ):
    if x < least:
      raise ValueError(f"{name} must be at least {least}; got {x}")
  G, Tb = block_indices.shape[1], -(-Tq // query_block)
  if block_indices.shape[0] != B or block_indices.shape[2] != Tb or not block_indices.shape[3]:
    raise ValueError(
      f"block_indices must be [{B}, G, {Tb}, S], S at least 1; got {block_indices.shape}"
    )
  if G % Hkv or H % G:
    raise ValueError(f"block_indices: {G} groups are not a multiple of {Hkv} that divides {H}")
  if sinks is not None and sinks.shape != (H,):
    raise ValueError(f"sinks must have shape {(H,)}; got {sinks.shape}")


def _check_places(q, k, segment_ids, query_positions, starts):
  (B, Tq), Tk = q.shape[:2], k.shape[1]
  if query_positions is None:
    if Tq != Tk:
      raise ValueError(f"query_positions must be given: q has {Tq} tokens, k {Tk}")
    if starts is not None:
      raise ValueError("starts must come with query_positions")
  elif segment_ids is not None:
    raise ValueError("segment_ids cannot be had with query_positions: a cache is one document")
  for name, x, shape in (
    ("segment_ids", segment_ids, (B, Tq)),
    ("query_positions", query_positions, (Tq,)),
    ("starts", starts, (B,)),
  ):
    if x is not None and x.shape != shape:
      raise ValueError(f"{name} must have shape {shape}; got {x.shape}")
