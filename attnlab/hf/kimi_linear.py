"""Kimi Linear: three layers of Kimi Delta Attention to one of latent attention without position encoding."""

from ml_collections import ConfigDict

from attnlab.hf.deepseek import LatentFamily
from attnlab.hf.family import HFConfig, Settings, layer_types, linear_sizes, named
from attnlab.hf.weights import Weights, linear, norm, one, taps
from attnlab.model import layer_specs


class KimiLinear(LatentFamily):
  """arXiv:2510.26692."""

  model_type = "kimi_linear"
  architecture = "KimiLinearForCausalLM"
  mixers = frozenset({"kda", "mla"})
  turned = False
  ties = False
  moe = "block_sparse_moe"
  _NAMES = {"linear_attention": "kda", "full_attention": "mla"}
  expert = {"gate": "w1", "up": "w3", "down": "w2"}

  def kinds(self, hf: HFConfig) -> list[str]:
    hf.only("mla_use_nope", True, default=True)
    kinds = hf("layer_types", default=None)
    if kinds is not None:
      return named(kinds, self._NAMES)
    full = self._linear(hf)("full_attn_layers")
    return ["mla" if i + 1 in full else "kda" for i in range(hf("num_hidden_layers"))]

  def _linear(self, hf: HFConfig) -> HFConfig:
    """The section that published files have; transformers writes its keys flat, under other names."""
    return HFConfig(hf("linear_attn_config", default={}), "linear_attn_config of config.json")

  def settings(self, hf: HFConfig) -> dict[str, Settings]:
    hf.only("moe_renormalize", True, default=True)
    hf.only("moe_router_activation_func", "sigmoid", default="sigmoid")
    own = self._linear(hf)
    either = lambda theirs, flat: own(theirs, default=hf(flat, default=None)) or own(theirs)  # noqa: E731
    kda = dict(
      num_heads=either("num_heads", "linear_num_heads"),
      head_dim=either("head_dim", "linear_head_dim"),
      conv_size=either("short_conv_kernel_size", "linear_conv_kernel_dim"),
      gate_bias=False,
    )
    return dict(mla=self.latent_settings(hf), kda=kda)

  def config(self, model: ConfigDict) -> Settings:
    m = model.mlp
    heads, size, _, _ = linear_sizes(model, "kda")
    kinds = [spec.mixer for spec in layer_specs(model)]
    numbered = lambda name: [i + 1 for i, kind in enumerate(kinds) if kind == name]  # noqa: E731
    return super().config(model) | dict(
      layer_types=layer_types(model, self._NAMES),
      linear_attn_config=dict(
        num_heads=heads,
        head_dim=size,
        short_conv_kernel_size=model.mixers.kda.conv_size,
        full_attn_layers=numbered("mla"),
        kda_layers=numbered("kda"),
      ),
      mla_use_nope=True,
      num_experts=m.experts,
      num_experts_per_token=m.top_k,
      num_shared_experts=m.shared_experts,
      num_expert_group=m.groups,
      moe_renormalize=True,
      moe_router_activation_func="sigmoid",
    )

  def mixer(self, model: ConfigDict, name: str) -> list[Weights]:
    if name == "mla":
      return self.latent_attention(model)
    k, at = model.mixers.kda, "self_attn"
    shape = (-1, k.head_dim)
    return [
      *(linear(f"mixer.{n}_proj", f"{at}.{n}_proj") for n in "qkv"),
      *(taps(f"mixer.{n}_conv", f"{at}.{n}_conv1d") for n in "qkv"),
      *(
        linear(f"mixer.{ours}_proj.{part}", f"{at}.{theirs}_{letter}_proj")
        for ours, theirs in (("f", "f"), ("gate", "g"))
        for part, letter in (("down", "a"), ("up", "b"))
      ),
      linear("mixer.b_proj", f"{at}.b_proj"),
      one("mixer.A_log", f"{at}.A_log", lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1, 1)),
      one("mixer.dt_bias", f"{at}.dt_bias", lambda x: x.reshape(shape), lambda x: x.reshape(-1)),
      norm("mixer.out_norm", f"{at}.o_norm"),
      linear("mixer.out_proj", f"{at}.o_proj"),
    ]

  def canonical(self, name: str) -> str:
    # A dense MLP's, as transformers writes it and as the published files have it.
    for part in ("gate_proj", "up_proj", "down_proj"):
      name = name.replace(f".block_sparse_moe.{part}.", f".mlp.{part}.")
    return name
