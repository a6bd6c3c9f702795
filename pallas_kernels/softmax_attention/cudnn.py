"""cuDNN's flash attention, through jax.nn, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.softmax_attention import xla
from pallas_kernels.softmax_attention.visibility import Visibility


def check(q, k, v, sinks, seen: Visibility) -> None:
  """Raises NotImplementedError, saying why, where cuDNN cannot serve the call."""
  if dispatch.platform() != "gpu":
    raise NotImplementedError(f"cuDNN needs an NVIDIA GPU; this is a {dispatch.platform()}")
  # A version such as "9.0"; of a GPU of another make it is a name.
  version = str(getattr(jax.local_devices()[0], "compute_capability", "none"))
  if not version.replace(".", "").isdigit() or float(version) < 8:
    raise NotImplementedError(f"cuDNN's attention needs compute capability 8.0; this is {version}")
  limitations(q, k, v, sinks, seen, 256 if float(version) >= 9 else 128)


def limitations(q, k, v, sinks, seen: Visibility, max_dim: int) -> None:
  """The part of ``check`` that does not look at the machine, whose heads have at most ``max_dim`` channels."""
  T, H, D = q.shape[1:]
  if not seen.aligned:
    raise NotImplementedError("jax.nn's cuDNN attention takes no positions of cached keys")
  if seen.apart:  # of nothing the kernel makes a mean of values, not zero
    raise NotImplementedError(
      "jax.nn's cuDNN attention takes no key_segment_ids: a query might see no key"
    )
  if sinks is not None:
    raise NotImplementedError("jax.nn's cuDNN attention has no sinks")
  if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"cuDNN's attention takes bfloat16 or float16; got {q.dtype}, {k.dtype}, {v.dtype}"
    )
  if max(D, v.shape[-1]) > max_dim:
    raise NotImplementedError(f"cuDNN's attention has at most {max_dim} channels a head here")
  if seen.query_segments is not None:
    # Segments are a mask [B, 1, T, T] to jax.nn: let it be no larger than q.
    if T > H * D:
      raise NotImplementedError(f"a mask of {T} x {T} segments would be larger than q")
    if T % 2:
      raise NotImplementedError("cuDNN's attention with a mask needs an even length")
    if seen.window is not None:
      raise NotImplementedError(
        "with a mask cuDNN's attention would not skip what lies before the window"
      )


def forward(q, k, v, sinks, seen: Visibility, scale: float, implementation: str = "cudnn"):
  """As ``reference.forward``; lse, which jax.nn rounds to bfloat16, is computed apart where it is used.

  Args:
    implementation: jax.nn's. Its "xla" takes the same arguments on any machine.
  """
  V = v.shape[-1]
  dim = -(-max(q.shape[-1], V) // 8) * 8
  q_, k_, v_ = (jnp.pad(x, ((0, 0),) * 3 + ((0, dim - x.shape[-1]),)) for x in (q, k, v))
  o = jax.nn.dot_product_attention(
    q_,
    k_,
    v_,
    mask=None if seen.query_segments is None else seen.mask()[:, None],
    scale=scale,
    is_causal=True,
    local_window_size=None if seen.window is None else (seen.window - 1, 0),
    implementation=implementation,
  )
  return o[..., :V], xla.forward(q, k, v, sinks, seen, scale)[1]
