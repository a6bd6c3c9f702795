"""Optimisers and learning-rate schedules: optax's own, told which parameter is what.

Every parameter is an `nnx.Param` with two pieces of metadata (`attnlab.nn.param`): `axes`, the
logical name of each dimension, and `weight_decay`. From these come the weight-decay mask and, for
Muon, which parameters are matrices. Nothing here knows a parameter's name.
"""

import functools
from collections.abc import Callable

import jax
import ml_collections
import optax
from flax import nnx
from jax.typing import ArrayLike
from optax.contrib import MuonDimensionNumbers

from attnlab.errors import UserError, unknown
from attnlab.nn import is_matrix
from attnlab.settings import Range, check_ranges

OPTIMIZERS = ("adamw", "lion", "muon")
SCHEDULES = ("constant", "cosine", "wsd")

_RANGES = {
  **dict.fromkeys(("learning_rate", "eps"), Range(above=0)),
  **dict.fromkeys(("warmup_steps", "weight_decay", "clip_norm"), Range(least=0)),
  **dict.fromkeys(("b1", "b2", "muon_momentum"), Range(least=0, below=1)),
  **dict.fromkeys(("final_fraction", "decay_fraction"), Range(least=0, most=1)),
}

# Moonlight (arXiv:2502.16982, section 2.2): with its update scaled by 0.2 sqrt(max(in, out)),
# Muon's step has the size of AdamW's, so that one learning rate serves the matrices (Muon) and
# everything else (AdamW).
_MUON_RMS = 0.2


def schedule(
  config: ml_collections.ConfigDict, steps: int, peak: ArrayLike | None = None
) -> optax.Schedule:
  """The learning rate of update number `count` = 0, 1, ..., `steps` - 1.

  All begin with a linear warm-up whose first update already moves:
  `learning_rate * (count + 1) / warmup_steps`; a run may end before it does. Then

    constant  stays;
    cosine    half a cosine down to `final_fraction * learning_rate` at `steps`;
    wsd       (warm-up, stable, decay; MiniCPM, arXiv:2404.06395) stays, then falls linearly to the
              same over the last `decay_fraction * steps`.

  Args:
    config: the config's `optim` section.
    steps: updates in the whole run.
    peak: in place of the config's `learning_rate`.
  """
  peak = config.learning_rate if peak is None else peak
  final, warmup = config.final_fraction, config.warmup_steps
  rest = max(steps - warmup, 1)
  warm = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  constant = optax.constant_schedule(peak)
  if config.schedule == "constant":
    return optax.join_schedules([warm, constant], [warmup])
  if config.schedule == "cosine":
    return optax.join_schedules([warm, optax.cosine_decay_schedule(peak, rest, final)], [warmup])
  if config.schedule == "wsd":
    decay = min(max(round(config.decay_fraction * steps), 1), rest)
    fall = optax.linear_schedule(peak, final * peak, decay)
    return optax.join_schedules([warm, constant, fall], [warmup, max(steps - decay, warmup)])
  raise unknown("config.optim.schedule", config.schedule, SCHEDULES)


def optimizer(
  config: ml_collections.ConfigDict, steps: int, peak: ArrayLike | None = None
) -> optax.GradientTransformation:
  """The gradient transformation of a config: clipping by the global norm, then the optimiser with
  decoupled weight decay.

  Args:
    config: the config's `optim` section.
    steps: updates in the whole run, for the schedule.
    peak: in place of the config's `learning_rate`; as an argument of a compiled program it lets one
      serve all rates.

  Returns:
    A transformation of trees whose parameters are `nnx.Param` nodes.
  """
  rate = schedule(config, steps, peak)
  decay = dict(weight_decay=config.weight_decay, mask=decay_mask)
  adamw = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, **decay)
  if config.name == "adamw":
    update = adamw
  elif config.name == "lion":
    update = optax.lion(rate, b1=config.b1, b2=config.b2, **decay)
  elif config.name == "muon":
    muon = optax.contrib.muon(
      rate,
      beta=config.muon_momentum,
      weight_decay=config.weight_decay,
      muon_weight_dimension_numbers=matrix_dimensions,
      consistent_rms=_MUON_RMS,
    )
    # The partition is made here, and not left to optax.contrib.muon, because its own AdamW knows no
    # weight-decay mask.
    update = optax.partition({"muon": muon, "adamw": adamw}, _muon_or_adamw)
  else:
    raise unknown("config.optim.name", config.name, OPTIMIZERS)
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  if not config.only:
    return optax.chain(clip, update)
  # Before clipping, so that only what is trained counts; and after, for weight decay.
  frozen = optax.masked(optax.set_to_zero(), functools.partial(_without, config.only))
  return optax.chain(frozen, clip, update, frozen)


def _without(part: str, params: nnx.State) -> nnx.State:
  """True where a parameter's path has no such part, of several with commas; UserError if none has it."""
  is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
  flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
  parts = [p.strip() for p in part.split(",")]
  out = [not any(p in jax.tree_util.keystr(path) for p in parts) for path, _ in flat]
  if all(out):
    raise UserError(f"config.optim.only = {part!r} is part of no parameter's path")
  return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_variable), out)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError for an `optim` section that cannot work."""
  if config.name not in OPTIMIZERS:
    raise unknown("config.optim.name", config.name, OPTIMIZERS)
  if config.schedule not in SCHEDULES:
    raise unknown("config.optim.schedule", config.schedule, SCHEDULES)
  check_ranges("optim", config, _RANGES)


def decay_mask(params: nnx.State) -> nnx.State:
  """True where weight decay applies: one bool in the place of each `nnx.Param`."""
  return _map_params(lambda p: bool(p.get_metadata("weight_decay")), params)


def matrix_dimensions(params: nnx.State) -> nnx.State:
  """Which parameters Muon orthogonalises, and along which dimensions: `MuonDimensionNumbers` or
  None for each `nnx.Param`.

  A matrix (`attnlab.nn.is_matrix`) has [in, out] as its last two dimensions; those before them
  (experts, layers stacked by the scan) are a batch, each its own matrix.
  """

  def dimensions(p: nnx.Param) -> MuonDimensionNumbers | None:
    if not is_matrix(p):
      return None
    return MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

  return _map_params(dimensions, params)


def _muon_or_adamw(params: nnx.State) -> nnx.State:
  return jax.tree.map(
    lambda d: "adamw" if d is None else "muon",
    matrix_dimensions(params),
    is_leaf=lambda d: d is None or isinstance(d, MuonDimensionNumbers),
  )


def _map_params(fn: Callable[[nnx.Param], object], params: nnx.State) -> nnx.State:
  return jax.tree.map(fn, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
