"""Qwen3-Next and Qwen3.5: three Gated DeltaNet layers to one of gated softmax attention; with experts, and without."""

from ml_collections import ConfigDict

from attnlab.errors import UserError
from attnlab.hf.family import (
  HFConfig,
  Settings,
  layer_types,
  linear_sizes,
  named_in_turn,
  rope_config,
)
from attnlab.hf.llama import Qwen3, Qwen3MoE
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


class Qwen3Hybrid(Qwen3):
  """What both have; the gate of their attention: arXiv:2505.06708."""

  mixers = frozenset({"gated_deltanet", "softmax"})
  around_one = True

  _NAMES = {"linear_attention": "gated_deltanet", "full_attention": "softmax"}

  def kinds(self, hf: HFConfig) -> list[str]:
    hf.only("attention_bias", False, default=False)
    return named_in_turn(hf, self._NAMES, hf("full_attention_interval", default=4))

  def settings(self, hf: HFConfig) -> dict[str, Settings]:
    rope = hf("rope_parameters", default={})
    fraction = rope.get("partial_rotary_factor", hf("partial_rotary_factor", default=0.25))
    softmax = super().settings(hf)["softmax"]
    return dict(
      softmax=softmax | dict(rope_fraction=fraction, output_gate="element"),
      gated_deltanet=dict(
        num_heads=hf("linear_num_key_heads"),
        num_value_heads=hf("linear_num_value_heads"),
        head_dim=hf("linear_key_head_dim"),
        value_dim=hf("linear_value_head_dim"),
        conv_size=hf("linear_conv_kernel_dim"),
      ),
    )

  def config(self, model: ConfigDict) -> Settings:
    s, conv_size = model.mixers.softmax, model.mixers.gated_deltanet.conv_size
    H, K, Hv, V = linear_sizes(model, "gated_deltanet")
    turns = rope_config(s, partial_rotary_factor=s.rope_fraction)
    return (super().config(model) | turns) | dict(
      layer_types=layer_types(model, self._NAMES),
      partial_rotary_factor=s.rope_fraction,
      linear_num_key_heads=H,
      linear_num_value_heads=Hv,
      linear_key_head_dim=K,
      linear_value_head_dim=V,
      linear_conv_kernel_dim=conv_size,
    )

  def mixer(self, model: ConfigDict, name: str) -> list[Weights]:
    if name == "softmax":
      return super().mixer(model, name)
    g, at = model.mixers.gated_deltanet, "linear_attn"
    keys, values = g.num_heads * g.head_dim, g.num_value_heads * g.value_dim
    convs = [f"mixer.{n}_conv.weight" for n in "qkv"]
    return [
      *self.projections(g, at),
      parts(convs, f"{at}.conv1d.weight", (keys, keys, values), our_taps, their_taps),
      one("mixer.A_log", f"{at}.A_log"),
      one("mixer.dt_bias", f"{at}.dt_bias"),
      norm("mixer.out_norm", f"{at}.norm"),
      linear("mixer.out_proj", f"{at}.out_proj"),
    ]

  def projections(self, settings: ConfigDict, at: str) -> list[Weights]:
    """Of Gated DeltaNet, but for the output's."""
    raise NotImplementedError

  def queries(self, settings: ConfigDict) -> Weights:
    # Of each head first the query, then its gate.
    sizes = (settings.head_dim, settings.head_dim)
    ours = ("mixer.q_proj", "mixer.gate_proj")
    return rows(ours, "self_attn.q_proj.weight", sizes, groups=settings.num_heads)


class Qwen3Next(Qwen3Hybrid, Qwen3MoE):
  """Alibaba, 2025."""

  model_type = "qwen3_next"
  architecture = "Qwen3NextForCausalLM"
  shared_experts = "shared_expert"

  def mlp(self, hf: HFConfig) -> Settings:
    width, expert = hf("shared_expert_intermediate_size"), hf("moe_intermediate_size")
    if width % expert:
      raise UserError(
        f"config.json: shared_expert_intermediate_size = {width} is no whole number of experts of {expert}"
      )
    return super().mlp(hf) | dict(shared_experts=width // expert, shared_gate=True)

  def config(self, model: ConfigDict) -> Settings:
    m = model.mlp
    return super().config(model) | dict(
      shared_expert_intermediate_size=m.shared_experts * m.expert_hidden
    )

  def projections(self, settings: ConfigDict, at: str) -> list[Weights]:
    g = settings
    each = g.num_value_heads // g.num_heads
    values = each * g.value_dim
    # Of each head of keys: its query, its key, its values and their gates.
    qkvz = [f"mixer.{n}_proj" for n in ("q", "k", "v", "gate")]
    sizes = (g.head_dim, g.head_dim, values, values)
    ba = ("mixer.b_proj", "mixer.a_proj")
    return [
      rows(qkvz, f"{at}.in_proj_qkvz.weight", sizes, groups=g.num_heads),
      rows(ba, f"{at}.in_proj_ba.weight", (each, each), groups=g.num_heads),
    ]

  def experts(self, model: ConfigDict) -> list[Weights]:
    gate = linear("mlp.shared_gate", "mlp.shared_expert_gate")
    return [*super().experts(model), gate]


class Qwen35(Qwen3Hybrid):
  """Alibaba, 2026: the language model of Qwen3.5 without experts. Of text alone its three sections of RoPE are one."""

  model_type = "qwen3_5_text"
  architecture = "Qwen3_5ForCausalLM"

  def projections(self, settings: ConfigDict, at: str) -> list[Weights]:
    g = settings
    keys, values = g.num_heads * g.head_dim, g.num_value_heads * g.value_dim
    qkv = [f"mixer.{n}_proj" for n in "qkv"]
    return [
      rows(qkv, f"{at}.in_proj_qkv.weight", (keys, keys, values)),
      linear("mixer.gate_proj", f"{at}.in_proj_z"),
      linear("mixer.b_proj", f"{at}.in_proj_b"),
      linear("mixer.a_proj", f"{at}.in_proj_a"),
    ]

  def canonical(self, name: str) -> str:
    """Published checkpoints have the language model beside one of pictures."""
    return name.replace("model.language_model.", "model.", 1)

  def left_out(self, model: ConfigDict, name: str) -> bool:
    return name.startswith("model.visual.") or super().left_out(model, name)


class Qwen35MoE(Qwen35, Qwen3Next):
  """Alibaba, 2026: that with experts."""

  model_type = "qwen3_5_moe_text"
  architecture = "Qwen3_5MoeForCausalLM"
  sums_to_one = True
