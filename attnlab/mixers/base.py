"""What every sequence mixer is, and how mixers are found by name.

A mixer is one file in this directory with a class under ``@register``. Nothing else needs to know of it: patterns in
configs, the contract tests, the README's table and the experiments all ask the registry.
"""

import dataclasses
import difflib
import functools
import importlib
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnlab import sharding
from attnlab.errors import UserError, unknown
from attnlab.settings import POSITIVE, checked

Cache = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layer:
  """Where in the model a mixer stands.

  Attributes:
    d_model: width of the residual stream.
    index: the layer's number from 0; a traced integer where layers are built by vmap.
    count: how many layers the model has.
    norm_eps: of the norms inside the mixer.
  """

  d_model: int
  index: int | Array = 0
  count: int = 1
  norm_eps: float = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What all layers of one call share.

  Attributes:
    positions: of each token in its document, from 0.
    segment_ids: documents packed in a row; nothing passes from one to another. None: one document a row. With a cache,
      id 0 marks padding on the left of a prompt.
    shared: what earlier layers left for later ones (``Mixer.shared``), by name.
    dense: sparse mixers select everything: the same weights as full attention, and the first stage of some recipes.
    parts: in how many parts each row is (``sharding.split_rows``): B is then their number, and T their length.
  """

  positions: Int[Array, "B T"]
  segment_ids: Int[Array, "B T"] | None = None
  shared: dict[str, Array] = dataclasses.field(default_factory=dict)
  dense: bool = dataclasses.field(default=False, metadata=dict(static=True))
  parts: int = dataclasses.field(default=1, metadata=dict(static=True))

  @property
  def axis_name(self) -> str | None:
    """The mesh axis over which rows are in parts, for kernels; None: they are whole."""
    return "context" if self.parts > 1 else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixerOutput:
  """What a mixer returns.

  Attributes:
    y: the mixed tokens.
    cache: after these tokens; None where there was none.
    aux: scalars by name, averaged over layers for the log; those whose name ends in "_loss" are added to the loss.
    shared: what is left to later layers.
  """

  y: Float[Array, "B T D"]
  cache: Cache | None = None
  aux: dict[str, Array] = dataclasses.field(default_factory=dict)
  shared: dict[str, Array] = dataclasses.field(default_factory=dict)


class Mixer(nnx.Module):
  """A layer that moves information between tokens.

  Subclasses have a frozen dataclass ``Config`` whose fields are what a config may set.
  """

  # Filled in by @register.
  name: ClassVar[str]
  family: ClassVar[str]
  paper: ClassVar[str]
  title: ClassVar[str]
  aliases: ClassVar[tuple[str, ...]]
  variants: ClassVar[Mapping[str, Mapping[str, Any]]]

  H: int  # heads

  # Whether it takes rows in parts (``Context.parts``). One that does not is given whole rows, by devices that share
  # them as far as there are enough: the same result, for more memory.
  in_parts: ClassVar[bool] = False

  # Parts whose parameters the mixer's own losses (``MixerOutput.aux``) train, and nothing else does.
  own_loss: ClassVar[tuple[str, ...]] = ()

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Config:
    pass

  def __init__(self, config: Any, layer: Layer, key: Array):
    """A layer of settings ``config``, whose parameters are drawn from ``key``."""
    raise NotImplementedError

  def init_cache(
    self, batch: int, max_len: int, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> Cache:
    """An empty cache for ``batch`` sequences of up to ``max_len`` tokens, activations in ``dtype``."""
    raise NotImplementedError

  def __call__(
    self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None = None
  ) -> MixerOutput:
    """Mixes tokens. Without a cache: training. With one: the tokens continue it (prefill, or T == 1: decode)."""
    raise NotImplementedError

  def reference(self, x: np.ndarray, dense: bool = False) -> tuple[np.ndarray, dict[str, float]]:
    """The layer's output [T, D] for the tokens [T, D] of one document, and its scalars (``MixerOutput.aux``).

    The paper's equations in numpy's float64, token by token, without the layer's own code: the contract tests hold the
    layer to it, in outputs and in every gradient. A LinearMixer's takes, in the place of ``dense``, the layer's own
    (``linear_references.Place``), and goes through its ``equation``.
    """
    raise NotImplementedError

  def core_flops(self, length: int, decode: bool) -> float:
    """FLOPs of one token besides the matrices it is multiplied by (attnlab.accounting says what counts).

    Args:
      length: tokens of context.
      decode: of the token that follows them; otherwise the mean over their forward pass.
    """
    raise NotImplementedError

  def split_heads(self) -> dict[str, int]:
    """Counts of heads, by the setting that sets them, that a mesh splits: its ``model`` axis must divide each.

    Heads of keys that several others share need not be here: where there are too few, each device has those it needs.
    """
    return {"num_heads": self.H}

  def selected(self, length: int) -> dict[str, int]:
    """The arrays of its cache (path -> entries) of which decoding reads only so many of those that are there.

    Args:
      length: tokens of context.
    """
    del length
    return {}

  @classmethod
  def shared(cls, config: Any, d_model: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape after [B, T] of arrays that layers of this kind hand on to later ones; zeros before the first.

    They have the activations' dtype; those whose name ends in "_ids" are int32.
    """
    del config, d_model
    return {}


def mix(mixer: Mixer, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None) -> MixerOutput:
  """The mixer, on whole rows where it does not take parts of them."""
  if ctx.parts == 1 or mixer.in_parts:
    return mixer(x, ctx, cache)
  x, ctx = jax.tree.map(sharding.whole_rows, (x, ctx))
  out = mixer(x, dataclasses.replace(ctx, parts=1), cache)
  y, shared = jax.tree.map(sharding.split_rows, (out.y, out.shared))
  return dataclasses.replace(out, y=y, shared=shared)


_REGISTRY: dict[str, type[Mixer]] = {}
_ALIASES: dict[str, str] = {}


def register(
  name: str,
  *,
  family: str,
  paper: str,
  title: str,
  aliases: tuple[str, ...] = (),
  variants: Mapping[str, Mapping[str, Any]] | None = None,
):
  """Makes a mixer known under a name.

  Args:
    name: as patterns in configs write it.
    family: "softmax", "linear" or "sparse".
    paper: "arXiv:NNNN.NNNNN".
    title: the mechanism in a few words, for tables.
    aliases: short names that patterns may use too.
    variants: further settings of ``Config`` that the contract tests cover, by name.
  """

  def add(cls):
    if name in _REGISTRY and _REGISTRY[name].__module__ != cls.__module__:
      raise ValueError(
        f"two mixers are called {name!r}: {_REGISTRY[name].__module__}, {cls.__module__}"
      )
    cls.name, cls.family, cls.paper, cls.title = name, family, paper, title
    cls.aliases, cls.variants = tuple(aliases), dict(variants or {})
    _REGISTRY[name] = cls
    _ALIASES.update(dict.fromkeys(aliases, name))
    return cls

  return add


@functools.cache
def _discover() -> None:
  import attnlab.mixers as package

  for module in pkgutil.iter_modules(package.__path__):  # a file here is a mixer or serves one
    importlib.import_module(f"attnlab.mixers.{module.name}")


def mixers() -> dict[str, type[Mixer]]:
  """All mixers by name, sorted."""
  _discover()
  return dict(sorted(_REGISTRY.items()))


def mixer(name: str) -> type[Mixer]:
  """The mixer of a name or alias; UserError with the known ones otherwise."""
  known = mixers()
  name = _ALIASES.get(name, name)
  if name not in known:
    raise unknown("mixer", name, known)
  return known[name]


def configure(cls: type[Mixer], settings: Mapping[str, Any]) -> Any:
  """``cls.Config`` from settings; UserError on a field that it does not have, or a value that the field cannot have.

  Numbers are above 0 where ``Config`` does not say otherwise (attnlab.settings).
  """
  hints = typing.get_type_hints(cls.Config, include_extras=True)
  for key in settings:
    if key not in hints:
      near = difflib.get_close_matches(key, hints, 1, 0.5)
      hint = f"did you mean {near[0]!r}? " if near else ""
      raise UserError(f"mixer {cls.name!r} has no setting {key!r}: {hint}it has {', '.join(hints)}")
  return cls.Config(
    **{
      key: checked(f"mixer {cls.name!r}: {key}={value!r}", value, hints[key], POSITIVE)
      for key, value in settings.items()
    }
  )
