"""Ling 3.0: five layers of Kimi Delta Attention to one of gated latent attention, and experts in groups."""

from ml_collections import ConfigDict

from attnlab.errors import UserError
from attnlab.hf.deepseek import LatentFamily
from attnlab.hf.family import (
  HFConfig,
  Settings,
  layer_types,
  linear_sizes,
  named_in_turn,
  rope,
  rope_config,
)
from attnlab.hf.weights import Weights, linear, norm, one, taps


class Ling(LatentFamily):
  """Ant, 2026."""

  model_type = "bailing_hybrid"
  architecture = "BailingHybridForCausalLM"
  mixers = frozenset({"kda", "mla"})
  ties = False
  attention = "attention"
  leaves = "dense"
  expert_bias = "expert_bias"
  embedding = "model.word_embeddings.weight"

  _NAMES = {"linear_attention": "kda", "full_attention": "mla"}

  def kinds(self, hf: HFConfig) -> list[str]:
    hf.only("attention_bias", False, default=False)
    return named_in_turn(hf, self._NAMES, hf("layer_group_size", default=6))

  def settings(self, hf: HFConfig) -> dict[str, Settings]:
    hf.only("moe_renormalize", True, default=True)
    turns = rope(hf)
    if turns["rope_scaling"]:
      raise UserError("config.json: RoPE for longer texts is not known of this family")
    kda = dict(
      num_heads=hf("num_attention_heads"),
      head_dim=hf("linear_head_dim", "head_dim"),
      conv_size=hf("short_conv_kernel_size", default=4),
      decay_gate="safe" if hf("kda_safe_gate", default=True) else "softplus",
      lower_bound=float(hf("kda_lower_bound", default=-5.0)),
      low_rank_gates=False,
      gate_bias=False,
    )
    return dict(mla=self.latent_settings(hf) | turns | dict(output_gate="head"), kda=kda)

  def config(self, model: ConfigDict) -> Settings:
    m, kda = model.mlp, model.mixers.kda
    return (
      super().config(model)
      | rope_config(model.mixers.mla)
      | dict(
        layer_types=layer_types(model, self._NAMES),
        head_dim=linear_sizes(model, "kda")[1],
        short_conv_kernel_size=kda.conv_size,
        kda_safe_gate=kda.decay_gate == "safe",
        kda_lower_bound=kda.lower_bound,
        num_experts=m.experts,
        num_experts_per_token=m.top_k,
        num_shared_experts=m.shared_experts,
        num_expert_group=m.groups,
        moe_renormalize=True,
      )
    )

  def mixer(self, model: ConfigDict, name: str) -> list[Weights]:
    at = self.attention
    if name == "mla":
      return [*self.latent_attention(model), linear("mixer.gate_proj", f"{at}.g_proj")]
    shape = (-1, model.mixers.kda.head_dim)
    return [
      *(linear(f"mixer.{n}_proj", f"{at}.{n}_proj") for n in "qkvbf"),
      *(taps(f"mixer.{n}_conv", f"{at}.{n}_conv1d") for n in "qkv"),
      linear("mixer.gate_proj", f"{at}.g_proj"),
      one("mixer.A_log", f"{at}.A_log"),
      one("mixer.dt_bias", f"{at}.dt_bias", lambda x: x.reshape(shape), lambda x: x.reshape(-1)),
      norm("mixer.out_norm", f"{at}.o_norm"),
      linear("mixer.out_proj", f"{at}.{self.leaves}"),
    ]
