"""Mamba-2, as transformers keeps it: mixers alone, no MLP."""

import math

import numpy as np
from ml_collections import ConfigDict

from attnlab.errors import UserError
from attnlab.hf.family import Family, HFConfig, Settings, linear_sizes
from attnlab.hf.weights import (
  Weights,
  linear,
  norm,
  one,
  our_taps,
  parts,
  rows,
  their_taps,
)


class Mamba2(Family):
  """arXiv:2405.21060."""

  model_type = "mamba2"
  architecture = "Mamba2ForCausalLM"
  mixers = frozenset({"mamba2"})
  embedding = "backbone.embeddings.weight"
  final_norm = "backbone.norm_f"
  layers = "backbone.layers"
  mixers_alone = True
  norm_eps = "layer_norm_epsilon"

  def model(self, hf: HFConfig) -> Settings:
    hf.only("use_bias", False, default=False)
    hf.only("use_conv_bias", True, default=True)
    return super().model(hf)

  def kinds(self, hf: HFConfig) -> list[str]:
    return ["mamba2"] * hf("num_hidden_layers")

  def mlp(self, hf: HFConfig) -> Settings:
    del hf
    return dict(hidden=0, experts=0)

  def settings(self, hf: HFConfig) -> dict[str, Settings]:
    low, high = (_number(x) for x in hf("time_step_limit", default=(0.0, math.inf)))
    return dict(
      mamba2=dict(
        num_heads=hf("num_heads"),
        head_dim=hf("head_dim"),
        state_dim=hf("state_size"),
        groups=hf("n_groups"),
        conv_size=hf("conv_kernel"),
        dt_limit=(low, high),
      )
    )

  def config(self, model: ConfigDict) -> Settings:
    s = model.mixers.mamba2
    _, _, heads, _ = linear_sizes(model, "mamba2")
    if heads * s.head_dim % model.d_model:
      raise UserError(
        f"config.model.mixers.mamba2: {heads} heads of {s.head_dim} are no whole number of times"
        f" d_model = {model.d_model}, as a config.json wants"
      )
    return super().config(model) | dict(
      num_heads=heads,
      head_dim=s.head_dim,
      state_size=s.state_dim,
      n_groups=s.groups,
      conv_kernel=s.conv_size,
      expand=heads * s.head_dim // model.d_model,
      time_step_limit=[_json(x) for x in s.dt_limit],
      use_bias=False,
      use_conv_bias=True,
    )

  def layer(self, model: ConfigDict, index: int) -> list[Weights]:
    s = model.mixers.mamba2
    inner, states = s.num_heads * s.head_dim, s.groups * s.state_dim
    xBC = ("mixer.x_conv", "mixer.B_conv", "mixer.C_conv")
    sizes = (inner, states, states)
    projections = [f"mixer.{n}_proj" for n in ("gate", "x", "B", "C", "dt")]
    shape = (s.num_heads, s.head_dim)
    return [
      norm("mixer_norm", "norm"),
      rows(projections, "mixer.in_proj.weight", (inner, *sizes, s.num_heads)),
      parts([f"{n}.weight" for n in xBC], "mixer.conv1d.weight", sizes, our_taps, their_taps),
      parts([f"{n}.bias" for n in xBC], "mixer.conv1d.bias", sizes),
      *(one(f"mixer.{n}", f"mixer.{n}") for n in ("A_log", "D", "dt_bias")),
      one("mixer.out_norm.scale", "mixer.norm.weight", lambda x: x.reshape(shape), np.ravel),
      linear("mixer.out_proj", "mixer.out_proj"),
    ]


def _number(x: float | dict[str, str]) -> float:
  """A number of a config.json, in which infinity may be written out."""
  return float(x["__float__"] if isinstance(x, dict) else x)


def _json(x: float) -> float | dict[str, str]:
  return {"__float__": "Infinity"} if math.isinf(x) else x
