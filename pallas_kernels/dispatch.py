"""Which backend serves a call.

A backend that is named serves the call or raises; it never becomes another. "auto" takes the first, in the order of
preference for the platform, that does not raise NotImplementedError.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu


def platform() -> str:
  """What is compiled for: "cpu", "gpu" or "tpu".

  The platform of the current mesh, which may describe machines that are not here; without a mesh that of this process.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


# Bytes of VMEM of the chips that have least.
SMALL_VMEM = 16 * 2**20


def needs_tpu(dtype: jax.typing.DTypeLike) -> None:
  """Raises NotImplementedError where what is compiled for is no TPU, or the dtype is not for its kernels."""
  if platform() != "tpu":
    raise NotImplementedError(f"the Pallas kernel needs a TPU; this is a {platform()}")
  needs_float32(dtype)


def needs_float32(dtype: jax.typing.DTypeLike) -> None:
  """Raises NotImplementedError for float64, in which no Pallas kernel computes."""
  if jnp.dtype(dtype).itemsize > 4:
    raise NotImplementedError("the Pallas kernel computes in float32; float64 needs 'xla'")


def vmem() -> int:
  """Bytes of VMEM of the TPU that is traced for; the smallest of any where that is not known."""
  try:
    return pltpu.get_tpu_info().vmem_capacity_bytes
  except ValueError:
    return SMALL_VMEM


# Bytes that plain XLA takes of what is made of every query and key: on a CPU they should stay near its cache.
_CPU, _ELSEWHERE = 1 << 23, 1 << 27


def at_a_time(bytes_of_one: int) -> int:
  """How many queries, or keys, to take at a time, of so many bytes each: a power of two, which divides most lengths.

  What does not is padded, by a copy.
  """
  most = max(1, (_CPU if platform() == "cpu" else _ELSEWHERE) // bytes_of_one)
  return 1 << (most.bit_length() - 1)


def needs_parts(name: str, x: jax.Array) -> None:
  """Raises ValueError where an array is split over a mesh with explicit axes, and not by ``jax.shard_map``."""
  spec = getattr(jax.typeof(x).sharding, "spec", ())
  if any(axis is not None for axis in spec):
    raise ValueError(
      f"{name} is split over devices, as {spec}, and kernels run on a device's own part: call them within "
      "jax.shard_map(fn, in_specs=..., out_specs=..., check_vma=False), which may split sequences, heads, and "
      "where there is an axis_name, tokens"
    )


def needs_hopper() -> None:
  """Raises NotImplementedError where what is compiled for is no Hopper GPU: Mosaic GPU kernels are made for sm_90a."""
  if platform() != "gpu":
    raise NotImplementedError(f"the Pallas kernels need a Hopper GPU; this is a {platform()}")
  if jax.default_backend() == "gpu":
    # A version such as "9.0"; of a GPU of another make it is a name, or not there.
    version = str(getattr(jax.local_devices()[0], "compute_capability", "unknown"))
    if not version.startswith("9."):
      raise NotImplementedError(
        f"the Pallas kernels need a Hopper GPU, compute capability 9.0; here it is {version}"
      )


def xla_or_tpu(
  backend: str, dtype: jax.typing.DTypeLike, serves: Callable[[], None] = lambda: None
) -> str:
  """``choose`` of "xla", "tpu" and "interpret".

  Args:
    serves: raises NotImplementedError, saying why, for shapes that the kernel does not serve; by default it serves all.
  """

  def kernel(needs):
    needs(dtype)
    serves()

  backends = {
    "xla": lambda: None,
    "tpu": functools.partial(kernel, needs_tpu),
    "interpret": functools.partial(kernel, needs_float32),
  }
  return choose(backend, backends, {"cpu": ["xla"], "gpu": ["xla"], "tpu": ["tpu", "xla"]})


def choose(
  backend: str, backends: Mapping[str, Callable[[], None]], order: Mapping[str, list[str]]
) -> str:
  """The name of the backend to use.

  Args:
    backend: "auto" or a name.
    backends: for each name, a function that raises NotImplementedError, saying why, where it cannot serve the call.
    order: for each platform ("cpu", "gpu", "tpu"), names in order of preference.

  Raises:
    ValueError: the name is not known.
    NotImplementedError: the named backend cannot serve the call.
  """
  if backend != "auto":
    if backend not in backends:
      raise ValueError(f"unknown backend {backend!r}; known: auto, {', '.join(backends)}")
    backends[backend]()
    return backend
  reasons = []
  for name in order[platform()]:
    try:
      backends[name]()
      return name
    except NotImplementedError as error:
      reasons.append(f"{name}: {error}")
  raise NotImplementedError("no backend serves this call; " + "; ".join(reasons))
