"""What a model family is: its config and its tensors, as ours and back. Most are Llama's but for their mixers.

A family is a file here with a subclass of ``Family``. What it says is checked against the files themselves: a tensor
that nothing reads, or a setting that the other side has no place for, is an error and not another model.
"""

import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ml_collections import ConfigDict

from attnlab.errors import UserError, unknown
from attnlab.hf.weights import Weights, linear, norm, one, stacked, times
from attnlab.mixers import configure
from attnlab.mixers import mixer as find_mixer
from attnlab.mixers.linear import LinearMixer
from attnlab.model import layer_specs
from attnlab.pattern import write_pattern

Settings = dict[str, Any]


class HFConfig:
  """A config.json, whose keys have had other names at times.

  Args:
    values: what it has.
    name: of the file, for errors.
  """

  def __init__(self, values: Mapping[str, Any], name: str = "config.json"):
    self._values, self._name = values, name

  def __call__(self, *keys: str, default: Any = ...) -> Any:
    """The value of the first of some keys that is there and not null; UserError without one and without a default."""
    for key in keys:
      if self._values.get(key) is not None:
        return self._values[key]
    if default is ...:
      raise UserError(f"{self._name} has no {' or '.join(map(repr, keys))}")
    return default

  def only(self, key: str, *values: Any, default: Any) -> None:
    """Raises UserError if a key has another value than those that are known here."""
    has = self(key, default=default)
    if has not in values:
      known = " or ".join(map(repr, values))
      raise UserError(f"{self._name}: {key} = {has!r} is not known here, only {known}")


class Family:
  """A model family.

  Attributes:
    model_type, architecture: its names in a config.json.
    mixers: of which its layers are, ours.
  """

  model_type: ClassVar[str]
  architecture: ClassVar[str]
  mixers: ClassVar[frozenset[str]]

  # Whether norms of the residual stream keep 1 + weight.
  around_one: ClassVar[bool] = False

  # Whether its layers have no MLP.
  mixers_alone: ClassVar[bool] = False

  # Whether one table may be both the embedding and the head.
  ties: ClassVar[bool] = True

  # What a config.json calls the constant of its norms.
  norm_eps: ClassVar[str] = "rms_norm_eps"

  # Where the model's own tensors are.
  embedding: ClassVar[str] = "model.embed_tokens.weight"
  final_norm: ClassVar[str] = "model.norm"
  layers: ClassVar[str] = "model.layers"

  # --- config ---

  def model(self, hf: HFConfig) -> Settings:
    """Our ``model`` section, as far as the checkpoint decides it."""
    hf.only("hidden_act", "silu", default="silu")
    return dict(
      pattern=write_pattern(self.kinds(hf)),
      num_layers=hf("num_hidden_layers"),
      d_model=hf("hidden_size"),
      vocab_size=hf("vocab_size"),
      norm_eps=hf(self.norm_eps),
      tie_embeddings=hf("tie_word_embeddings", default=False),
      mlp=self.mlp(hf),
      mixers=self.settings(hf),
    )

  def kinds(self, hf: HFConfig) -> list[str]:
    """The mixer of each layer."""
    raise NotImplementedError

  def settings(self, hf: HFConfig) -> dict[str, Settings]:
    """Of each mixer."""
    raise NotImplementedError

  def mlp(self, hf: HFConfig) -> Settings:
    """Our ``model.mlp``, without the balance loss, which is of training."""
    return dict(hidden=hf("intermediate_size"), experts=0)

  def config(self, model: ConfigDict) -> Settings:
    """The config.json of our ``model`` section. What it does not say is found by reading it again.

    Raises:
      UserError: what would be found in no other way.
    """
    if not model.mlp.hidden and not self.mixers_alone:
      raise self.no_place("config.model.mlp.hidden = 0")
    if model.tie_embeddings and not self.ties:
      raise self.no_place("config.model.tie_embeddings = True")
    return dict(
      architectures=[self.architecture],
      model_type=self.model_type,
      num_hidden_layers=model.num_layers,
      hidden_size=model.d_model,
      vocab_size=model.vocab_size,
      tie_word_embeddings=model.tie_embeddings,
      intermediate_size=model.mlp.hidden,
      hidden_act="silu",
    ) | {self.norm_eps: model.norm_eps}

  def no_place(self, what: str) -> UserError:
    return UserError(f"{self.model_type} has no place for {what}")

  # --- tensors ---

  def weights(self, model: ConfigDict, layer: int | None) -> list[Weights]:
    """Of a layer, or of the model itself."""
    return self.outside(model) if layer is None else self.layer(model, layer)

  def prefix(self, layer: int | None) -> str:
    """What the names of a layer's tensors begin with."""
    return "" if layer is None else f"{self.layers}.{layer}."

  def outside(self, model: ConfigDict) -> list[Weights]:
    """Of the model itself. Our embedding is of variance 1 / d_model, and what it gives is multiplied by its root; where
    the same table makes the logits the last norm's scale makes up for it."""
    root = model.d_model**0.5
    embedding = times(one("embedding", self.embedding), 1 / root)
    last = norm("norm", self.final_norm, around_one=self.around_one)
    if model.tie_embeddings:
      return [embedding, times(last, root)]
    return [embedding, last, one("head", "lm_head.weight")]

  def layer(self, model: ConfigDict, index: int) -> list[Weights]:
    """Of a layer; their names follow ``prefix``, ours the layer's own path."""
    out = [
      norm("mixer_norm", "input_layernorm", around_one=self.around_one),
      *self.mixer(model, layer_specs(model)[index].mixer),
    ]
    if model.mlp.hidden:
      out.append(norm("mlp_norm", "post_attention_layernorm", around_one=self.around_one))
      dense = not model.mlp.experts or index < model.mlp.dense_layers
      out += self.dense_mlp() if dense else self.experts(model)
    return out

  def mixer(self, model: ConfigDict, name: str) -> list[Weights]:
    """Of a layer's mixer."""
    raise NotImplementedError

  def dense_mlp(self) -> list[Weights]:
    return [linear(f"mlp.{name}", f"mlp.{name}_proj") for name in ("gate", "up", "down")]

  # A mixture of experts: where it is, and what an expert's matrices are called.
  moe: ClassVar[str] = "mlp"
  expert: ClassVar[Mapping[str, str]] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
  shared_experts: ClassVar[str] = "shared_experts"
  expert_bias: ClassVar[str] = "e_score_correction_bias"

  def experts(self, model: ConfigDict) -> list[Weights]:
    m, at = model.mlp, self.moe
    out = [linear("mlp.router", f"{at}.gate")]
    out += [
      stacked(f"mlp.{ours}", [f"{at}.experts.{e}.{name}" for e in range(m.experts)])
      for ours, name in self.expert.items()
    ]
    if m.shared_experts:
      out += [
        linear(f"mlp.shared.{n}", f"{at}.{self.shared_experts}.{n}_proj")
        for n in ("gate", "up", "down")
      ]
    if m.router == "sigmoid":
      out.append(one("mlp.bias", f"{at}.gate.{self.expert_bias}"))
    return out

  def canonical(self, name: str) -> str:
    """What a tensor of a checkpoint is called here, where files differ."""
    return name

  def left_out(self, model: ConfigDict, name: str) -> bool:
    """Whether a tensor is no part of the language model: of layers that predict further tokens, or made anew."""
    number, _, _ = name.removeprefix(f"{self.layers}.").partition(".")
    further = number.isdigit() and int(number) >= model.num_layers
    again = model.tie_embeddings and name == "lm_head.weight"
    return further or again or name.startswith("mtp.") or name.endswith("rotary_emb.inv_freq")


def named(kinds: Sequence[str], names: Mapping[str, str]) -> list[str]:
  """Our mixers of the kinds of layers that a config.json lists; UserError for one that is not known."""
  for kind in kinds:
    if kind not in names:
      raise unknown("kind of layer in config.json", kind, names)
  return [names[kind] for kind in kinds]


def named_in_turn(hf: HFConfig, names: Mapping[str, str], every: int) -> list[str]:
  """``named`` for the kinds that ``layer_types`` lists; without it, each ``every``-th layer has full attention."""
  kinds = hf("layer_types", default=None) or [
    "linear_attention" if (i + 1) % every else "full_attention"
    for i in range(hf("num_hidden_layers"))
  ]
  return named(kinds, names)


def layer_types(model: ConfigDict, names: Mapping[str, str]) -> list[str]:
  """The inverse of ``named``."""
  theirs = {ours: name for name, ours in names.items()}
  return [theirs[spec.mixer] for spec in layer_specs(model)]


def shared_settings(model: ConfigDict, mixer: str) -> ConfigDict:
  """The settings of a mixer, which all its layers must have alike; UserError otherwise."""
  for spec in layer_specs(model):
    if spec.mixer == mixer and spec.settings:
      raise UserError(
        f"config.model.pattern = {model.pattern!r}: layers with settings of their own have no place in a config.json"
      )
  return model.mixers[mixer]


def shared_config(model: ConfigDict, mixer: str) -> Any:
  """``shared_settings`` as the mixer's own ``Config``."""
  return configure(find_mixer(mixer), dict(shared_settings(model, mixer)))


def linear_sizes(model: ConfigDict, mixer: str) -> tuple[int, int, int, int]:
  """Heads of keys, their channels, heads of values and theirs, of a linear mixer whose settings may leave some open."""
  cls = find_mixer(mixer)
  assert issubclass(cls, LinearMixer)
  return cls.sizes(shared_config(model, mixer), model.d_model)


def rope(hf: HFConfig) -> Settings:
  """``rope_theta`` and ``rope_scaling`` of a mixer; UserError where frequencies are changed in a way not known here."""
  values = hf("rope_parameters", "rope_scaling", default={})
  own = HFConfig(values, "RoPE in config.json")
  kind = own("rope_type", "type", default="default")
  theta = float(own("rope_theta", default=hf("rope_theta", default=10000.0)))
  if kind == "default":
    return dict(rope_theta=theta, rope_scaling=None)
  if kind == "llama3":
    turns = own("low_freq_factor"), own("high_freq_factor")
  elif kind == "yarn":
    own.only("attention_factor", None, default=None)
    own.only("truncate", True, default=True)
    turns = own("beta_slow", default=1), own("beta_fast", default=32)
  else:
    raise UserError(f"config.json: RoPE of type {kind!r} is not known here, only llama3 and yarn")
  length = own("original_max_position_embeddings")
  scaling = (kind, float(own("factor")), length, *map(float, turns))
  return dict(rope_theta=theta, rope_scaling=scaling)


def rope_config(settings: ConfigDict, **more: Any) -> Settings:
  """The keys of a config.json that say a mixer's RoPE, in the newer form and in the older."""
  theta = settings.rope_theta
  values = dict(rope_type="default", rope_theta=theta) | more
  if settings.rope_scaling is None:
    return dict(rope_parameters=values, rope_theta=theta)
  kind, factor, length, low, high = settings.rope_scaling
  values |= dict(rope_type=kind, factor=factor, original_max_position_embeddings=length)
  if kind == "llama3":
    values |= dict(low_freq_factor=low, high_freq_factor=high)
  else:
    values |= dict(beta_slow=low, beta_fast=high)
  return dict(rope_parameters=values, rope_theta=theta, rope_scaling=values)


def yarn_factor(settings: ConfigDict) -> float:
  """By how much YaRN multiplies what queries and keys that turn have to do with each other (arXiv:2309.00071, eq. 22).
  Here it is in the weights that make the queries."""
  scaling = settings.rope_scaling
  if scaling is None or scaling[0] != "yarn" or scaling[1] <= 1:
    return 1.0
  return (0.1 * math.log(scaling[1]) + 1) ** 2


def families() -> dict[str, Family]:
  """All families by their model_type, a family before those that are made of it."""
  import attnlab.hf as package

  for module in pkgutil.iter_modules(package.__path__):
    if not module.name.startswith("_"):
      importlib.import_module(f"attnlab.hf.{module.name}")
  found: list[type[Family]] = [Family]
  for cls in found:
    found.extend(cls.__subclasses__())
  return {cls.model_type: cls() for cls in found if "model_type" in vars(cls)}


def family(model_type: str) -> Family:
  """The family of a name; UserError with the known ones otherwise."""
  known = families()
  if model_type not in known:
    raise unknown("model_type", model_type, known)
  return known[model_type]
