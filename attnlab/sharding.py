"""All that the project knows about devices: the mesh, one table of logical axes, and ``local()`` around kernels.

Arrays carry logical axis names; ``TABLE`` says which mesh axes each is split over, where it is stored and where it is
computed with. Parameters are stored split over ``data`` and ``context`` (FSDP) and gathered at their use; heads, MLP
columns and experts are split over ``model``; each row's tokens are split over ``context``. The mesh is Explicit: every
array's type says how it is split, and a mismatch is an error while tracing. Without a mesh (``jax.set_mesh`` not
called) every function here does nothing.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attnlab.errors import UserError

AXES = ("replica", "data", "context", "model")

# logical axis -> (mesh axes in storage, mesh axes in computation)
TABLE: dict[str | None, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "rows": (AXES[:2], AXES[:2]),  # whole, as they come and where they are counted
  "batch": (AXES[:3], AXES[:3]),  # rows, or their parts (``split_rows``)
  "context": ((), ("context",)),
  "tokens": (AXES, AXES),  # batch and time in one axis, for what treats tokens one by one
  "embed": (("data", "context"), ()),
  "heads": (("model",), ("model",)),
  "mlp": (("model",), ("model",)),
  "experts": (("model",), ("model",)),
  "vocab": (("model",), ()),
  None: ((), ()),
}


def mesh_sizes(config: Mapping[str, int], devices: int) -> dict[str, int]:
  """How many parts each axis of ``config.mesh`` has, 1 where it is not named; one of them may be -1: what is left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  sizes = {axis: int(config.get(axis, 1)) for axis in AXES}
  free = [axis for axis, n in sizes.items() if n == -1]
  for axis, n in sizes.items():
    if n < 1 and n != -1:
      raise UserError(f"config.mesh.{axis} = {n} must be at least 1, or -1 for what is left")
  if len(free) > 1:
    raise UserError(f"config.mesh: only one of {' and '.join(free)} can be -1")
  fixed = math.prod(n for n in sizes.values() if n != -1)
  if devices % fixed or (not free and devices != fixed):
    shape = " x ".join(f"{axis}={n}" for axis, n in sizes.items())
    raise UserError(f"config.mesh {shape} does not fit the {devices} devices")
  return sizes | {axis: devices // fixed for axis in free}


def make_mesh(
  config: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """The mesh of ``config.mesh``, over these devices or all there are; UserError as ``mesh_sizes``."""
  devices = jax.devices() if devices is None else list(devices)
  sizes = tuple(mesh_sizes(config, len(devices)).values())
  types = (AxisType.Explicit,) * len(AXES)
  try:
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
  except NotImplementedError:
    # An axis of ours is no product of the axes of the devices' network: these are split, at some cost in bandwidth.
    split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(split, AXES, axis_types=types)


def share(mesh: jax.sharding.Mesh, process: int | None = None) -> tuple[int, int]:
  """Which share of a batch's rows this process (or another) has, and of how many.

  Devices lie in a mesh as their network does: several processes may hold the same rows, and then have the same share;
  and rows of one need not follow each other. Shares are numbered in the order of the first processes that have them,
  so that where each process has rows of its own, its share is its number.

  Raises:
    UserError: processes hold some of the same rows and not all, or not equally many.
  """
  process = jax.process_index() if process is None else process
  parts = math.prod(mesh.shape[axis] for axis in TABLE["rows"][0])
  held: dict[int, set[int]] = {}
  for part, devices in enumerate(mesh.devices.reshape(parts, -1)):
    for device in devices:
      held.setdefault(device.process_index, set()).add(part)
  shares = list(dict.fromkeys(frozenset(held[p]) for p in sorted(held)))
  if any(len(rows) * len(shares) != parts for rows in shares):
    axes = " x ".join(f"config.mesh.{axis} {mesh.shape[axis]}" for axis in TABLE["rows"][0])
    raise UserError(
      f"{axes} does not share a batch's rows out evenly among {len(held)} processes:"
      " the product must be a multiple of their number, or a divisor"
    )
  return shares.index(frozenset(held[process])), len(shares)


def _mesh():
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.are_all_axes_manual else mesh


def _spec(shape: Sequence[int], axes: Sequence[str | None], mesh, column: int) -> PartitionSpec:
  """Where an array of these logical axes lies; a dimension that does not divide is not split."""

  def over(size: int, axis: str | None):
    names = _names(axis, mesh, column)
    return names if size % math.prod(mesh.shape[n] for n in names) == 0 else ()

  return PartitionSpec(*(_entry(over(*pair)) for pair in zip(shape, axes, strict=True)))


def _names(axis: str | None, mesh, column: int) -> tuple[str, ...]:
  """The mesh axes that a logical axis is split over. Those of one part are not among them: an array that is not split
  is of one type, whatever might have split it."""
  return tuple(n for n in TABLE[axis][column] if mesh.shape[n] > 1)


def _entry(names: tuple[str, ...]):
  """As a PartitionSpec has it for one dimension."""
  return names if len(names) > 1 else names[0] if names else None


def _stacked(axes: Sequence[str | None], ndim: int) -> tuple[str | None, ...]:
  """Axes of a parameter that may be stacked over layers: leading axes are not split."""
  return (None,) * (ndim - len(axes)) + tuple(axes)


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The stored sharding of every leaf of a tree: parameters by their ``axes``, anything else whole on each device."""

  def one(x):
    if isinstance(x, nnx.Variable):
      axes = x.get_metadata().get("axes", ())

      def place(value):
        return NamedSharding(mesh, _spec(value.shape, _stacked(axes, value.ndim), mesh, 0))

      return jax.tree.map(place, x)  # optax may have left a variable without its array
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of an array whose first axis is the batch's rows."""
  return NamedSharding(mesh, PartitionSpec(_entry(_names("rows", mesh, 0))))


def put(x: jax.Array, *axes: str | None) -> jax.Array:
  """``x`` where arrays of these logical axes are computed with (gathers what is only stored in parts)."""
  mesh = _mesh()
  return x if mesh is None else jax.sharding.reshard(x, _spec(x.shape, axes, mesh, 1))


def like(x: jax.Array, other: jax.Array) -> jax.Array:
  """``x`` in the dtype of ``other`` and where ``other`` lies, as the carry of a scan must be."""
  x = x.astype(other.dtype)
  return x if _mesh() is None else jax.sharding.reshard(x, jax.typeof(other).sharding.spec)


def size(axis: str) -> int:
  """How many parts arrays with this logical axis are computed in."""
  mesh = _mesh()
  return 1 if mesh is None else _size(axis, mesh)


def matmul(x: jax.Array, kernel: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
  """``x [batch, ..., in] @ kernel [in, out]`` for a kernel of these logical axes."""
  return _product(x, put(kernel, *axes), axes, 1)


def matmul_heads(
  x: jax.Array, kernel: jax.Array, axes: tuple[str | None, str], heads: int
) -> jax.Array:
  """``split(matmul(x, kernel, axes), heads, size)``, as one product with a kernel of three axes.

  A compiler may then write heads in any order. From heads side by side XLA for TPUs makes heads that come first, which
  attention's kernels take, by a transposition to channels before tokens and another one back.
  """
  shape = kernel.shape[0], heads, kernel.shape[1] // heads
  if heads % size(axes[1]):
    return split(matmul(x, kernel, axes), *shape[1:], axis=axes[1])
  three = axes[0], axes[1], None
  return _product(x, _reshaped(kernel, axes, shape, three), three, 1)


def matmul_of_heads(x: jax.Array, kernel: jax.Array, axes: tuple[str, str | None]) -> jax.Array:
  """``matmul(merge(x, 2), kernel, axes)`` of x [batch, ..., heads, size], as ``matmul_heads``."""
  shape = *x.shape[-2:], kernel.shape[1]
  if shape[0] % size(axes[0]):
    return matmul(merge(x, 2, axes[0]), kernel, axes)
  three = axes[0], None, axes[1]
  return _product(x, _reshaped(kernel, axes, shape, three), three, 2)


def _product(x: jax.Array, kernel: jax.Array, axes: Sequence[str | None], n: int) -> jax.Array:
  """The sum over the last n axes of x and the first n of a kernel of these logical axes."""
  mesh = _mesh()
  kept = x.ndim - n
  out = None
  if mesh is not None:
    names = ("batch",) + (None,) * (kept - 1)
    x = put(x, *names, *axes[:n])
    out = _spec((*x.shape[:kept], *kernel.shape[n:]), (*names, *axes[n:]), mesh, 1)
  return _dot(x, kernel, n, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot(x: jax.Array, kernel: jax.Array, n: int, out: PartitionSpec | None) -> jax.Array:
  """``jnp.tensordot(x, kernel, n)``, which lies as ``out`` says.

  Its gradients are jax's own, but for the order of the kernel's: x before the output's gradient, which comes out as the
  kernel lies. jax multiplies the other way round and transposes, for which XLA for CPUs transposes the output's
  gradient first: an MLP of 1024 tokens, 64 and 152 channels, with gradients, takes twice as long then.
  """
  return _plain(x, kernel, n, out)


def _plain(x, kernel, n, out):
  kept = x.ndim - n
  summed = (tuple(range(kept, x.ndim)), tuple(range(n)))
  return jax.lax.dot_general(x, kernel, (summed, ((), ())), out_sharding=out)


def _dot_forward(x, kernel, n, out):
  return _plain(x, kernel, n, out), (x, kernel)


def _dot_backward(n, out, kept, dy):
  x, kernel = kept
  (dx,) = jax.linear_transpose(lambda x: _plain(x, kernel, n, out), x)(dy)
  rows = tuple(range(x.ndim - n))
  place = None if out is None else jax.typeof(kernel).sharding.spec
  return dx, jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), out_sharding=place)


_dot.defvjp(_dot_forward, _dot_backward)


def _reshaped(
  kernel: jax.Array,
  axes: Sequence[str | None],
  shape: Sequence[int],
  new_axes: Sequence[str | None],
) -> jax.Array:
  """A kernel of some logical axes, where it is computed with, as one of others."""
  mesh = _mesh()
  spec = None if mesh is None else _spec(shape, new_axes, mesh, 1)
  return jax.lax.reshape(put(kernel, *axes), shape, out_sharding=spec)


def split(x: jax.Array, *shape: int, axis: str = "heads") -> jax.Array:
  """Splits the last axis of x into ``shape``, the first of which is the logical ``axis``."""
  mesh = _mesh()
  shape = (*x.shape[:-1], *shape)
  if mesh is None:
    return x.reshape(shape)
  names = ("batch",) + (None,) * (x.ndim - 2) + (axis,) + (None,) * (len(shape) - x.ndim)
  whole = shape[x.ndim - 1] % _size(axis, mesh) != 0
  x = put(x, *names[: x.ndim - 1], None if whole else axis)
  return jax.lax.reshape(x, shape, out_sharding=_spec(shape, names, mesh, 1))


def merge(x: jax.Array, count: int, axis: str = "heads") -> jax.Array:
  """Joins the last ``count`` axes of x, the first of which is the logical ``axis``."""
  mesh = _mesh()
  shape = (*x.shape[:-count], math.prod(x.shape[-count:]))
  if mesh is None:
    return x.reshape(shape)
  names = ("batch", *(None,) * len(shape))[: len(shape) - 1] + (axis,)
  fits = x.shape[-count] % _size(axis, mesh) == 0
  spec = _spec(shape, names if fits else (*names[:-1], None), mesh, 1)
  return jax.lax.reshape(x, shape, out_sharding=spec)


def _size(axis: str, mesh) -> int:
  return math.prod(mesh.shape[n] for n in TABLE[axis][1])


def local(fn: Callable, in_axes: Any, out_axes: Any) -> Callable:
  """``fn`` on each device's own part of its arguments: what kernels run in.

  Args:
    fn: a function of arrays whose batch rows and heads do not interact.
    in_axes: for each argument a tree, of the argument's structure, with a tuple of logical axes at each array.
    out_axes: the same for the result; each output's split dimensions must divide.
  """
  mesh = _mesh()
  if mesh is None:
    return fn

  def is_axes(x):
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)

  def run(*args):
    specs = jax.tree.map(
      lambda axes, x: _spec(x.shape, axes, mesh, 1), in_axes, args, is_leaf=is_axes
    )
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    # One device, of the mesh's kind, by which backends are chosen: it has all of every array.
    kind = dict(axis_types=mesh.axis_types, abstract_device=mesh.abstract_device)
    one = jax.sharding.AbstractMesh((1,) * len(AXES), AXES, **kind)
    spec = PartitionSpec()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
      alone = jax.shard_map(fn, mesh=one, in_specs=spec, out_specs=spec, check_vma=False)
      outs = jax.eval_shape(alone, *whole)
    out_specs = jax.tree.map(
      lambda axes, x: _spec(x.shape, axes, mesh, 1), out_axes, outs, is_leaf=is_axes
    )
    args = jax.tree.map(jax.sharding.reshard, args, specs)
    return jax.shard_map(fn, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)

  return run


# --- context parallelism: parts of rows as rows of their own ---
#
# To all that treats tokens one by one, half of a row's tokens are a row. So rows [B, T] become [B parts, T / parts], of
# which each device has those whose tokens it computes, and only what looks at other tokens need know (Context.parts).


def split_rows(x: jax.Array) -> jax.Array:
  """[B, T, ...] -> [B parts, T / parts, ...], ``size("context")`` parts of each row."""
  parts, mesh = size("context"), _mesh()
  if parts == 1:
    return x

  def own(x):
    length = x.shape[1] // parts
    return jax.lax.dynamic_slice_in_dim(x, part("context") * length, length, axis=1)

  return _rows(own, mesh, "rows", "batch")(put(x, "rows", *(None,) * (x.ndim - 1)))


def whole_rows(x: jax.Array) -> jax.Array:
  """What ``split_rows`` split, whole: [B parts, T / parts, ...] -> [B, T, ...]."""
  mesh, axes = _mesh(), ("batch",) + (None,) * (x.ndim - 1)
  if size("context") == 1:
    return x
  whole = _rows(lambda x: gather("context", x, axis=1), mesh, "batch", "rows")
  return put(whole(put(x, *axes)), *axes)


def _rows(fn: Callable, mesh, before: str, after: str) -> Callable:
  specs = [PartitionSpec(_entry(_names(axis, mesh, 1))) for axis in (before, after)]
  return jax.shard_map(fn, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def flatten_tokens(x: jax.Array) -> jax.Array:
  """[B, T, ...] -> [B T, ...], still split over the batch's devices."""
  mesh = _mesh()
  shape = (x.shape[0] * x.shape[1], *x.shape[2:])
  if mesh is None:
    return x.reshape(shape)
  x = put(x, "batch", *(None,) * (x.ndim - 1))
  spec = _spec(x.shape, ("batch",) + (None,) * (x.ndim - 1), mesh, 1)
  return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(spec[0]))


def unflatten_tokens(x: jax.Array, B: int, T: int) -> jax.Array:
  """[B T, ...] -> [B, T, ...], split over the batch's devices."""
  mesh = _mesh()
  shape = (B, T, *x.shape[1:])
  if mesh is None:
    return x.reshape(shape)
  spec = _spec(shape, ("batch",) + (None,) * (len(shape) - 1), mesh, 1)
  x = jax.sharding.reshard(x, PartitionSpec(spec[0]))
  return jax.lax.reshape(x, shape, out_sharding=spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: jax.Array, ids: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Rows of ``table`` [V, D] by ids [B, T], in ``dtype``: [B, T, D], split over the batch's devices.

  The gradient is summed in the table's own dtype: a row that thousands of tokens share would lose most of a sum of
  bfloat16, to which small numbers add nothing.
  """
  return _looked_up(table.astype(dtype), ids)


def _look_up_forward(table, ids, dtype):
  return look_up(table, ids, dtype), (table, ids)


def _look_up_backward(dtype, kept, dy):
  table, ids = kept
  (dtable,) = jax.linear_transpose(lambda t: _looked_up(t, ids), table)(dy.astype(table.dtype))
  return dtable, None


look_up.defvjp(_look_up_forward, _look_up_backward)


def _looked_up(table: jax.Array, ids: jax.Array) -> jax.Array:
  mesh = _mesh()
  if mesh is None:
    return table[ids]
  ids = put(ids, "batch", None)
  spec = _spec((*ids.shape, table.shape[1]), ("batch", None, None), mesh, 1)
  return put(table, None, None).at[ids].get(out_sharding=spec)


def take(x: jax.Array, positions: jax.Array) -> jax.Array:
  """What stands at positions [B, K] of x [B, T, ...]: [B, K, ...], split over the batch's devices."""
  rows = ("batch",) + (None,) * (x.ndim - 1)
  pick = jax.vmap(lambda row, where: row[where])
  return local(pick, (rows, ("batch", None)), rows)(x, positions)


def zeros(shape: Sequence[int], dtype) -> jax.Array:
  """Zeros [B, T, ...], split over the batch's devices."""
  return put(jnp.zeros(shape, dtype), "batch", *(None,) * (len(shape) - 1))


def part(axis: str) -> jax.Array | int:
  """Inside ``local``: which part of a logical axis this device has."""
  names = _manual(axis)
  return jax.lax.axis_index(names) if names else 0


def sum_over(axis: str, x: jax.Array) -> jax.Array:
  """Inside ``local``: the sum over devices that have different parts of a logical axis."""
  names = _manual(axis)
  return jax.lax.psum(x, names) if names else x


def mean_over(axis: str, x: jax.Array) -> jax.Array:
  """Inside ``local``: the mean over devices that have different parts of a logical axis."""
  names = _manual(axis)
  return jax.lax.pmean(x, names) if names else x


def gather(name: str, x: jax.Array, axis: int) -> jax.Array:
  """Inside ``local``: the parts of a logical axis, of all devices that have one, put together along an array's axis."""
  names = _manual(name)
  return jax.lax.all_gather(x, names, axis=axis, tiled=True) if names else x


def _manual(axis: str) -> tuple[str, ...]:
  mesh = jax.sharding.get_abstract_mesh()
  return TABLE[axis][1] if not mesh.empty and mesh.are_all_axes_manual else ()
