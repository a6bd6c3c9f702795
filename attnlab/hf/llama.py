"""Llama, Mistral without windows, Qwen3, and Qwen3's mixture of experts: softmax attention in every layer."""

import numpy as np
from ml_collections import ConfigDict

from attnlab.errors import UserError
from attnlab.hf.family import (
  Family,
  HFConfig,
  Settings,
  rope,
  rope_config,
  shared_config,
  yarn_factor,
)
from attnlab.hf.weights import Weights, linear, norm, times
from attnlab.mixers.softmax import SoftmaxAttention


class Llama(Family):
  """arXiv:2307.09288, arXiv:2407.21783."""

  model_type = "llama"
  architecture = "LlamaForCausalLM"
  mixers = frozenset({"softmax"})

  # RMSNorm of each head's queries and keys.
  qk_norm = False

  def kinds(self, hf: HFConfig) -> list[str]:
    hf.only("attention_bias", False, default=False)
    hf.only("mlp_bias", False, default=False)
    if hf("use_sliding_window", default=True) and hf("sliding_window", default=None):
      raise UserError("config.json: sliding_window is not known here, only attention to everything")
    return ["softmax"] * hf("num_hidden_layers")

  def settings(self, hf: HFConfig) -> dict[str, Settings]:
    heads = hf("num_attention_heads")
    return dict(
      softmax=dict(
        num_heads=heads,
        num_kv_heads=hf("num_key_value_heads", default=heads),
        head_dim=hf("head_dim", default=hf("hidden_size") // heads),
        qk_norm=self.qk_norm,
        **rope(hf),
      )
    )

  def config(self, model: ConfigDict) -> Settings:
    s = model.mixers.softmax
    heads, kv_heads = SoftmaxAttention.sizes(shared_config(model, "softmax"), model.d_model)
    return super().config(model) | dict(
      num_attention_heads=heads,
      num_key_value_heads=kv_heads,
      head_dim=s.head_dim,
      **rope_config(s),
    )

  def mixer(self, model: ConfigDict, name: str) -> list[Weights]:
    del name
    s, at, around = model.mixers.softmax, "self_attn", self.around_one
    out = [linear(f"mixer.{n}_proj", f"{at}.{n}_proj") for n in ("k", "v")]
    out.append(linear("mixer.out_proj", f"{at}.o_proj"))
    # YaRN's factor is of the channels that turn.
    turn = np.where(np.arange(s.head_dim) < s.head_dim * s.rope_fraction, yarn_factor(s), 1.0)
    if not s.qk_norm:
      return [*out, times(self.queries(s), np.tile(turn, s.num_heads))]
    q, k = (norm(f"mixer.{n}_norm", f"{at}.{n}_norm", around_one=around) for n in ("q", "k"))
    return [*out, self.queries(s), times(q, turn), k]

  def queries(self, settings: ConfigDict) -> Weights:
    """What makes the queries."""
    del settings
    return linear("mixer.q_proj", "self_attn.q_proj")


class Mistral(Llama):
  """arXiv:2310.06825, from version 0.3 on, which has no window."""

  model_type = "mistral"
  architecture = "MistralForCausalLM"


class Qwen3(Llama):
  """arXiv:2505.09388."""

  model_type = "qwen3"
  architecture = "Qwen3ForCausalLM"
  qk_norm = True


class Qwen3MoE(Qwen3):
  """arXiv:2505.09388, with experts in every layer."""

  model_type = "qwen3_moe"
  architecture = "Qwen3MoeForCausalLM"

  # Whether the weights of a token's experts sum to one where a config.json does not say.
  sums_to_one = False

  def mlp(self, hf: HFConfig) -> Settings:
    hf.only("norm_topk_prob", True, default=self.sums_to_one)
    hf.only("decoder_sparse_step", 1, default=1)
    hf.only("mlp_only_layers", [], default=[])
    return dict(
      hidden=hf("intermediate_size", "moe_intermediate_size"),  # which no layer has
      experts=hf("num_experts", "num_local_experts"),
      top_k=hf("num_experts_per_tok"),
      expert_hidden=hf("moe_intermediate_size"),
      router="softmax",
    )

  def config(self, model: ConfigDict) -> Settings:
    m = model.mlp
    return super().config(model) | dict(
      num_experts=m.experts,
      num_experts_per_tok=m.top_k,
      moe_intermediate_size=m.expert_hidden,
      norm_topk_prob=True,
      decoder_sparse_step=1,
      mlp_only_layers=[],
    )
