"""Splash attention, the Pallas kernel that comes with JAX, on TPUs."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.softmax_attention import xla
from pallas_kernels.softmax_attention.visibility import Visibility

# The kernel's blocks are multiples of the lanes; larger ones pay off until they fill VMEM.
_LANES = 128
_BLOCKS = (512, 256, 128)


def check(q, k, v, sinks, seen: Visibility) -> None:
  """Raises NotImplementedError, saying why, where splash attention cannot serve the call."""
  if dispatch.platform() != "tpu":
    raise NotImplementedError(f"splash attention needs a TPU; this is a {dispatch.platform()}")
  limitations(q, k, v, sinks, seen)


def limitations(q, k, v, sinks, seen: Visibility) -> None:
  """The part of ``check`` that does not look at the machine."""
  if not seen.aligned:
    raise NotImplementedError("splash attention takes no positions of cached keys")
  if seen.apart:  # of nothing the kernel makes a mean of values, not zero
    raise NotImplementedError("splash attention takes no key_segment_ids: a query might see no key")
  if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      f"splash attention takes bfloat16 or float32; got {q.dtype}, {k.dtype}, {v.dtype}"
    )


@jax.custom_vjp
def _own_dtype(x):
  """x; a gradient of it that is of another dtype, as the kernel's of the sinks is, is cast to x's."""
  return x


_own_dtype.defvjp(lambda x: (x, x[:0]), lambda none, dx: (dx.astype(none.dtype),))


def forward(q, k, v, sinks, seen: Visibility, scale: float, interpret: bool = False):
  """As ``reference.forward``; lse, for which the kernel has no derivative, is computed apart where it is used.

  Args:
    interpret: runs the kernel on any machine, slowly.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  T, H = q.shape[1:3]
  size = -(-T // _LANES) * _LANES
  block = next(b for b in _BLOCKS if size % b == 0)
  window = seen.window
  mask = (
    splash.CausalMask((size, size))
    if window is None
    else splash.LocalMask((size, size), (window - 1, 0), offset=0)
  )
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([mask] * H),
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    interpret=interpret,
  )

  def heads_first(x):
    # What is appended comes after every query, and is seen by none.
    x = jnp.pad(x, ((0, 0), (0, size - T), (0, 0), (0, 0)))
    return jnp.swapaxes(x, 1, 2)

  ids = None
  if seen.query_segments is not None:
    both = seen.query_segments, seen.key_segments
    ids = splash.SegmentIds(*(jnp.pad(x, ((0, 0), (0, size - T))) for x in both))
  scaled = (q * np.float32(scale)).astype(q.dtype)
  args = (heads_first(scaled), heads_first(k), heads_first(v))
  sinks_ = None if sinks is None else _own_dtype(sinks)
  o = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, ids, sinks_))(*args, ids)
  return jnp.swapaxes(o, 1, 2)[:, :T], xla.forward(q, k, v, sinks, seen, scale)[1]
