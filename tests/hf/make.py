"""Makes the checkpoints of this directory with Hugging Face's own models: small ones, of random weights.

    pip install torch transformers safetensors
    python tests/hf/make.py [NAME ...]

Each NAME has what `save_pretrained` writes, in bfloat16, and expected.npz: ids of two rows, and the logits that the
library computes of them in float64, as far as it does. The tests need neither library.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HERE = Path(__file__).parent

BASE = dict(
  vocab_size=320,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  pad_token_id=None,
  bos_token_id=256,
  eos_token_id=257,
)
# Of few pairs of channels: some that are changed, some that are kept, and one between.
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=1e4,
  factor=8.0,
  original_max_position_embeddings=64,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
)
YARN = dict(
  rope_type="yarn",
  rope_theta=1e4,
  factor=4.0,
  original_max_position_embeddings=64,
  beta_fast=8.0,
  beta_slow=1.0,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
LINEAR = dict(
  linear_key_head_dim=8,
  linear_value_head_dim=4,
  linear_num_key_heads=2,
  linear_num_value_heads=4,
)
QWEN35 = (
  BASE
  | LINEAR
  | dict(
    num_hidden_layers=4,
    head_dim=16,
    linear_value_head_dim=8,
    hidden_size=32,
    rope_parameters=dict(
      rope_type="default",
      rope_theta=1e4,
      partial_rotary_factor=0.5,
      mrope_section=[2, 1, 1],
      mrope_interleaved=True,
    ),
  )
)
LATENT = dict(
  kv_lora_rank=8,
  qk_nope_head_dim=8,
  qk_rope_head_dim=4,
  head_dim=4,
  v_head_dim=8,
  num_key_value_heads=4,
  num_local_experts=8,
  num_experts_per_tok=2,
  moe_intermediate_size=8,
  n_shared_experts=1,
  routed_scaling_factor=2.5,
)
DEEPSEEK = (
  BASE
  | LATENT
  | dict(q_lora_rank=8, n_group=4, topk_group=2, first_k_dense_replace=1)
  | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0))
)
KINDS = ["linear_attention", "full_attention"]
CONFIGS = {
  "llama": (
    "llama",
    BASE | dict(tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
  ),
  "mistral": ("mistral", BASE | dict(sliding_window=None, rope_parameters=YARN)),
  "qwen3": ("qwen3", BASE | dict(rope_parameters=YARN)),
  "qwen3_moe": ("qwen3_moe", BASE | EXPERTS | dict(norm_topk_prob=True)),
  "qwen3_next": (
    "qwen3_next",
    BASE
    | EXPERTS
    | LINEAR
    | dict(
      num_hidden_layers=4,
      head_dim=16,
      rope_parameters=YARN | dict(partial_rotary_factor=0.25),
      shared_expert_intermediate_size=8,
    ),
  ),
  "qwen3_5_text": ("qwen3_5_text", QWEN35 | dict(tie_word_embeddings=True)),
  "qwen3_5_moe_text": (
    "qwen3_5_moe_text",
    QWEN35 | EXPERTS | dict(shared_expert_intermediate_size=8),
  ),
  "kimi_linear": (
    "kimi_linear",
    BASE
    | LATENT
    | dict(
      num_hidden_layers=7,
      layer_types=[*KINDS, *KINDS, *KINDS, "full_attention"],
      linear_head_dim=8,
      linear_num_heads=2,
      q_lora_rank=None,
      n_group=1,
      topk_group=1,
      first_k_dense_replace=1,
    ),
  ),
  "deepseek_v3": ("deepseek_v3", DEEPSEEK),
  "deepseek_v32": (
    "deepseek_v32",
    # With few heads scores of zero are frequent, and which of equals is chosen is not the model's.
    DEEPSEEK | dict(index_n_heads=16, index_head_dim=8, index_topk=4),
  ),
  "glm_moe_dsa": (
    "glm_moe_dsa",
    DEEPSEEK
    | dict(n_group=1, topk_group=1, rope_parameters=dict(rope_type="default", rope_theta=1e4))
    | dict(index_n_heads=16, index_head_dim=8, index_topk=4),
  ),
  "bailing_hybrid": (
    "bailing_hybrid",
    BASE
    | LATENT
    | dict(
      num_hidden_layers=4,
      layer_types=[*KINDS, *KINDS],
      head_dim=8,
      num_experts_per_token=2,
      num_shared_experts=1,
      num_experts=8,
      n_group=4,
      topk_group=2,
      first_k_dense_replace=1,
    ),
  ),
  "mamba2": (
    "mamba2",
    dict(
      vocab_size=320,
      hidden_size=16,
      num_hidden_layers=2,
      state_size=8,
      head_dim=8,
      num_heads=4,
      n_groups=2,
      expand=2,
      chunk_size=8,
      tie_word_embeddings=True,
      bos_token_id=256,
      eos_token_id=257,
    ),
  ),
}


def randomise(model, generator) -> None:
  """Weights that tell everything apart: no norm of ones, no bias of zeros, logits of some size."""
  for name, p in [*model.named_parameters(), *model.named_buffers()]:
    if not p.is_floating_point() or "inv_freq" in name:
      continue
    noise = torch.randn(p.shape, generator=generator)
    if p.ndim >= 2 and "A_log" not in name and "conv" not in name:
      p.data.copy_(noise * p.shape[-1] ** -0.5)
    elif "conv" in name:
      p.data.copy_(noise * 0.5)
    else:
      p.data.add_(0.3 * noise)
    # What is kept has bfloat16's digits.
    p.data.copy_(p.data.bfloat16())


def logits(model, ids, dtype):
  with torch.no_grad():
    return model.to(dtype)(ids, use_cache=False).logits.double()


def main(names: list[str]) -> None:
  for name in names or CONFIGS:
    kind, settings = CONFIGS[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**settings)
    # float64 is not served by all of its ways of running experts.
    eager = dict(attn_implementation="eager", experts_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, **eager).float().eval()
    # Weights that make rounding large, where the outputs of heads nearly cancel before a norm, are passed over.
    for seed in range(100):
      generator = torch.Generator().manual_seed(seed)
      randomise(model.float(), generator)
      ids = torch.randint(0, 256, (2, 21), generator=generator)
      want = logits(model, ids, torch.float64)
      rounding = (logits(model, ids, torch.float32) - want).abs().max() / want.abs().max()
      print(name, "seed", seed, "rounding", rounding.item())
      if rounding < 1e-5:
        break
    out = HERE / name
    model.save_pretrained(out)
    tensors = load_file(out / "model.safetensors")
    low = {k: x.bfloat16() for k, x in tensors.items()}
    save_file(low, out / "model.safetensors", metadata={"format": "pt"})
    (out / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(out / "expected.npz", ids=ids.numpy(), logits=want.float().numpy())
    print(name, sum(x.numel() for x in low.values()), "parameters; logits of", want.std().item())


if __name__ == "__main__":
  main(sys.argv[1:])
