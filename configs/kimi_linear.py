"""Kimi Linear: three KDA layers to one latent-attention layer without position encoding (arXiv:2510.26692).

python -m attnlab.train --config=configs/kimi_linear.py
  3.03 bits per byte on held-out files after 100 updates of the tiny size, about two minutes on two CPU cores
python -m attnlab.train --config=configs/kimi_linear.py:paper
  the published 48B-A3B, for pods; not run here
"""

from attnlab.config import parse_arg
from configs.base import base, recipe


def get_config(arg: str = ""):
  a = parse_arg(arg, size=("tiny", "paper"))
  c = base()
  if a.size == "tiny":
    c.model.pattern = "3*kda + 1*mla"
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 64, 5, 192
    c.model.mlp.update(dict(experts=8, top_k=2, shared_experts=1, expert_hidden=48, dense_layers=1))
    mla = dict(num_heads=4, kv_lora_rank=32, nope_dim=16, rope_dim=8, rope=False, value_dim=16)
    kda = dict(num_heads=4, head_dim=16)
  else:
    c.update(recipe("pretrain"))
    c.model.pattern = "3*kda + 1*mla | 2*kda + 1*mla"
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 2304, 27, 9216
    c.model.mlp.update(
      dict(experts=256, top_k=8, shared_experts=1, expert_hidden=1024, dense_layers=1)
    )
    kda, mla = dict(num_heads=32, head_dim=128), dict(num_heads=32, rope=False)
    c.model.vocab_size, c.model.norm_eps = 163840, 1e-5
    c.model.mlp.routed_scale = 2.446
  c.model.tie_embeddings = False
  # Balanced by the bias, as DeepSeek-V3's (arXiv:2412.19437).
  c.model.mlp.update(dict(router="sigmoid", bias_rate=1e-3, balance=1e-4))
  c.model.mixers = dict(kda=kda | dict(gate_bias=False), mla=mla | dict(latent_eps=1e-6))
  return c
