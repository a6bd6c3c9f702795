"""Ling 3.0 (Ant, 2026): five KDA layers with a bounded decay to one gated latent-attention layer; experts in groups.

python -m attnlab.train --config=configs/ling.py
  3.11 bits per byte on held-out files after 100 updates of the tiny size, about two minutes on two CPU cores
python -m attnlab.train --config=configs/ling.py:paper
  the published Ling-3.0-Flash, for pods; not run here
"""

from attnlab.config import parse_arg
from configs.base import base, recipe


def get_config(arg: str = ""):
  a = parse_arg(arg, size=("tiny", "paper"))
  c = base()
  c.model.pattern = "5*kda + 1*mla"
  if a.size == "tiny":
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 64, 7, 192
    c.model.mlp.update(dict(experts=8, top_k=2, shared_experts=1, expert_hidden=48, dense_layers=1))
    c.model.mlp.update(dict(groups=4, top_groups=2))
    mla = dict(num_heads=4, kv_lora_rank=32, nope_dim=16, rope_dim=8, value_dim=16)
    kda = dict(num_heads=4, head_dim=16)
  else:
    c.update(recipe("pretrain"))
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 2560, 42, 6144
    c.model.mlp.update(
      dict(experts=512, top_k=8, shared_experts=1, expert_hidden=768, dense_layers=2)
    )
    c.model.mlp.update(dict(groups=8, top_groups=4))
    kda, mla = dict(num_heads=32, head_dim=128), dict(num_heads=32)
    c.model.vocab_size = 157184
  c.model.tie_embeddings = False
  c.model.mlp.update(dict(router="sigmoid", routed_scale=2.5, bias_rate=1e-3, balance=1e-4))
  kda |= dict(decay_gate="safe", low_rank_gates=False, gate_bias=False)
  mla |= dict(rope_theta=6e6, latent_eps=1e-6, output_gate="head")
  c.model.mixers = dict(kda=kda, mla=mla)
  return c
