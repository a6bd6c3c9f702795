"""DeepSeek-V3 and V3.2, and GLM-5: latent attention, sparse but for the first, and experts in groups."""

import numpy as np
from ml_collections import ConfigDict

from attnlab.hf.family import (
  Family,
  HFConfig,
  Settings,
  rope,
  rope_config,
  shared_config,
  yarn_factor,
)
from attnlab.hf.weights import Weights, linear, norm, one, rows, times
from attnlab.mixers.mla import MultiHeadLatentAttention

_EPS = 1e-6  # of the norms of latents, whatever the model's


class LatentFamily(Family):
  """What models with latent attention and DeepSeek's experts share."""

  # Ours that is their latent attention, and whether RoPE turns its queries and keys.
  latent = "mla"
  turned = True

  # Where it is, and its last projection.
  attention = "self_attn"
  leaves = "o_proj"

  def latent_settings(self, hf: HFConfig) -> Settings:
    return dict(
      num_heads=hf("num_attention_heads"),
      kv_lora_rank=hf("kv_lora_rank"),
      q_lora_rank=hf("q_lora_rank", default=None),
      nope_dim=hf("qk_nope_head_dim"),
      rope_dim=hf("qk_rope_head_dim"),
      value_dim=hf("v_head_dim"),
      rope=self.turned,
      latent_eps=_EPS,
    )

  def latent_config(self, model: ConfigDict) -> Settings:
    s = shared_config(model, self.latent)
    heads = MultiHeadLatentAttention.heads(s, model.d_model)
    if not s.rope_dim:
      raise self.no_place(f"rope_dim = 0 of mixer {self.latent!r}")
    return dict(
      num_attention_heads=heads,
      num_key_value_heads=heads,
      kv_lora_rank=s.kv_lora_rank,
      q_lora_rank=s.q_lora_rank,
      qk_nope_head_dim=s.nope_dim,
      qk_rope_head_dim=s.rope_dim,
      v_head_dim=s.value_dim,
    )

  def latent_attention(self, model: ConfigDict) -> list[Weights]:
    s, at = model.mixers[self.latent], self.attention
    heads = s.num_heads
    if s.q_lora_rank:
      q = [
        linear("mixer.q_down", f"{at}.q_a_proj"),
        norm("mixer.q_norm", f"{at}.q_a_layernorm"),
        self._queries(f"{at}.q_b_proj.weight", heads, s),
      ]
    else:
      q = [self._queries(f"{at}.q_proj.weight", heads, s)]
    down = rows(
      ("mixer.kv_down", "mixer.k_rope"),
      f"{at}.kv_a_proj_with_mqa.weight",
      (s.kv_lora_rank, s.rope_dim),
    )
    if self.turned:
      down = _halved(down, slice(s.kv_lora_rank, None))
    return [
      *q,
      down,
      norm("mixer.kv_norm", f"{at}.kv_a_layernorm"),
      rows(
        ("mixer.k_up", "mixer.v_up"),
        f"{at}.kv_b_proj.weight",
        (s.nope_dim, s.value_dim),
        groups=heads,
      ),
      linear("mixer.out_proj", f"{at}.{self.leaves}"),
    ]

  def _queries(self, name: str, heads: int, s: ConfigDict) -> Weights:
    plain = rows(("mixer.q_up",), name, (s.nope_dim + s.rope_dim,), groups=heads)
    plain = times(plain, yarn_factor(s))
    return _halved(plain, slice(s.nope_dim, None), heads) if self.turned else plain

  def mlp(self, hf: HFConfig) -> Settings:
    hf.only("norm_topk_prob", True, default=True)
    hf.only("scoring_func", "sigmoid", default="sigmoid")
    hf.only("moe_layer_freq", 1, default=1)
    groups = hf("n_group", "num_expert_group", default=1)
    return dict(
      hidden=hf("intermediate_size"),
      experts=hf("n_routed_experts", "num_experts"),
      top_k=hf("num_experts_per_tok", "num_experts_per_token"),
      expert_hidden=hf("moe_intermediate_size"),
      shared_experts=hf("n_shared_experts", "num_shared_experts"),
      dense_layers=hf("first_k_dense_replace"),
      routed_scale=hf("routed_scaling_factor"),
      groups=groups,
      top_groups=hf("topk_group", default=groups),
      router="sigmoid",
    )

  def config(self, model: ConfigDict) -> Settings:
    m, layers = model.mlp, model.num_layers
    dense = m.dense_layers if m.experts else layers
    return (
      super().config(model)
      | self.latent_config(model)
      | dict(
        n_routed_experts=m.experts,
        num_experts_per_tok=m.top_k,
        moe_intermediate_size=m.expert_hidden,
        n_shared_experts=m.shared_experts,
        first_k_dense_replace=dense,
        mlp_layer_types=["dense" if i < dense else "sparse" for i in range(layers)],
        routed_scaling_factor=m.routed_scale,
        n_group=m.groups,
        topk_group=m.top_groups,
        norm_topk_prob=True,
        scoring_func="sigmoid",
      )
    )


class DeepSeekV3(LatentFamily):
  """arXiv:2412.19437."""

  model_type = "deepseek_v3"
  architecture = "DeepseekV3ForCausalLM"
  mixers = frozenset({"mla"})

  def kinds(self, hf: HFConfig) -> list[str]:
    hf.only("attention_bias", False, default=False)
    return [self.latent] * hf("num_hidden_layers")

  def settings(self, hf: HFConfig) -> dict[str, Settings]:
    own = HFConfig(hf("rope_parameters", "rope_scaling", default={}), "RoPE in config.json")
    if own("rope_type", "type", default="default") == "yarn":
      # The factor of all logits and not of the channels that turn.
      own.only("mscale", 1.0, default=None)
      own.only("mscale_all_dim", 1.0, default=None)
    return {self.latent: self.latent_settings(hf) | rope(hf)}

  def config(self, model: ConfigDict) -> Settings:
    s = model.mixers[self.latent]
    more = {} if s.rope_scaling is None else dict(mscale=1.0, mscale_all_dim=1.0)
    return super().config(model) | rope_config(s, **more)

  def mixer(self, model: ConfigDict, name: str) -> list[Weights]:
    del name
    return self.latent_attention(model)


class DeepSeekV32(DeepSeekV3):
  """arXiv:2512.02556: the same, with an indexer that chooses each query's tokens."""

  model_type = "deepseek_v32"
  architecture = "DeepseekV32ForCausalLM"
  mixers = frozenset({"dsa"})
  latent = "dsa"

  # Whether in its indexer, too, pairs of channels that turn together are side by side.
  index_pairs = False

  def latent_settings(self, hf: HFConfig) -> Settings:
    return super().latent_settings(hf) | dict(
      top_k=hf("index_topk"),
      index_heads=hf("index_n_heads"),
      index_dim=hf("index_head_dim"),
      index_rope_dim=hf("qk_rope_head_dim"),
    )

  def latent_config(self, model: ConfigDict) -> Settings:
    s = model.mixers.dsa
    if s.q_lora_rank is None:
      raise self.no_place("mixer 'dsa' without q_lora_rank")
    return super().latent_config(model) | dict(
      index_topk=s.top_k, index_n_heads=s.index_heads, index_head_dim=s.index_dim
    )

  def latent_attention(self, model: ConfigDict) -> list[Weights]:
    s, ours, at = model.mixers.dsa, "mixer.indexer", "self_attn.indexer"

    def turned(weights: Weights, heads: int = 1) -> Weights:
      return _halved(weights, slice(s.index_rope_dim), heads) if self.index_pairs else weights

    return [
      *super().latent_attention(model),
      turned(linear(f"{ours}.q_proj", f"{at}.wq_b"), s.index_heads),
      turned(linear(f"{ours}.k_proj", f"{at}.wk")),
      linear(f"{ours}.w_proj", f"{at}.weights_proj"),
      turned(norm(f"{ours}.k_norm", f"{at}.k_norm")),
      turned(one(f"{ours}.k_norm.bias", f"{at}.k_norm.bias")),
    ]


class GLM5(DeepSeekV32):
  """Zhipu, 2026."""

  model_type = "glm_moe_dsa"
  architecture = "GlmMoeDsaForCausalLM"
  index_pairs = True

  def kinds(self, hf: HFConfig) -> list[str]:
    layers = hf("num_hidden_layers")
    # Later ones have layers that take over what an earlier one has chosen (arXiv:2603.12201).
    hf.only("index_topk_freq", 1, default=1)
    hf.only("index_topk_pattern", "F" * layers, default="F" * layers)
    hf.only("indexer_types", ["full"] * layers, default=["full"] * layers)
    return super().kinds(hf)


def _halved(weights: Weights, where: slice, groups: int = 1) -> Weights:
  """The same, of a tensor in which the rows ``where`` of each group are pairs of channels that turn together, side by
  side; ours has the first of every pair, then the second."""

  def reordered(x: np.ndarray, read: bool) -> np.ndarray:
    x = x.reshape(groups, -1, *x.shape[1:]).copy()
    part = x[:, where]
    shape = (groups, -1, 2) if read else (groups, 2, -1)
    x[:, where] = part.reshape(*shape, *x.shape[2:]).swapaxes(1, 2).reshape(part.shape)
    return x.reshape(-1, *x.shape[2:])

  return Weights(
    weights.ours,
    weights.theirs,
    lambda x: weights.read([reordered(x[0], True)]),
    lambda x: [reordered(weights.write(x)[0], False)],
  )
