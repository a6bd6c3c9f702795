"""Qwen3-Next: three Gated DeltaNet layers to one gated softmax layer with a quarter of RoPE (gate: arXiv:2505.06708).

python -m attnlab.train --config=configs/qwen3_next.py
  3.16 bits per byte on held-out files after 100 updates of the tiny size, about two minutes on two CPU cores
python -m attnlab.train --config=configs/qwen3_next.py:paper
  the published 80B-A3B, for pods; not run here
"""

from attnlab.config import parse_arg
from configs.base import base, recipe


def get_config(arg: str = ""):
  a = parse_arg(arg, size=("tiny", "paper"))
  c = base()
  c.model.pattern = "3*gated_deltanet + 1*softmax"
  softmax = dict(rope_fraction=0.25, rope_theta=1e7, qk_norm=True, output_gate="element")
  if a.size == "tiny":
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 64, 4, 192
    c.model.mlp.update(
      dict(experts=8, top_k=2, shared_experts=1, expert_hidden=48, shared_gate=True)
    )
    gdn = dict(num_heads=2, num_value_heads=4, head_dim=16, value_dim=16)
    softmax |= dict(num_heads=4, num_kv_heads=2, head_dim=16)
  else:
    c.update(recipe("pretrain"))
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 2048, 48, 5120
    c.model.mlp.update(
      dict(experts=512, top_k=10, shared_experts=1, expert_hidden=512, shared_gate=True)
    )
    gdn = dict(num_heads=16, num_value_heads=32, head_dim=128, value_dim=128)
    softmax |= dict(num_heads=16, num_kv_heads=2, head_dim=256)
    c.model.vocab_size, c.model.tie_embeddings = 151936, False
  c.model.mixers = dict(gated_deltanet=gdn, softmax=softmax)
  return c
