"""MiniMax-01: seven Lightning layers to one softmax layer with half of RoPE (arXiv:2501.08313).

python -m attnlab.train --config=configs/minimax_01.py
  3.36 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/minimax_01.py:paper
  the published 456B-A46B, for pods, with pre-norm in place of its DeepNorm; not run here
"""

from attnlab.config import parse_arg
from configs.base import base, recipe


def get_config(arg: str = ""):
  a = parse_arg(arg, size=("tiny", "paper"))
  c = base()
  c.model.pattern = "7*lightning + 1*softmax"
  if a.size == "tiny":
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 64, 8, 192
    c.model.mlp.update(dict(experts=4, top_k=2, expert_hidden=96))
    lightning = dict(num_heads=4, head_dim=16)
    softmax = dict(num_heads=4, num_kv_heads=2, head_dim=16, rope_fraction=0.5)
  else:
    c.update(recipe("pretrain"))
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 6144, 80, 9216
    c.model.mlp.update(dict(experts=32, top_k=2, expert_hidden=9216))
    lightning = dict(num_heads=64, head_dim=128)
    softmax = dict(num_heads=64, num_kv_heads=8, head_dim=128, rope_fraction=0.5, rope_theta=1e7)
    c.model.vocab_size, c.model.tie_embeddings, c.model.norm_eps = 200064, False, 1e-5
  c.model.mixers = dict(lightning=lightning, softmax=softmax)
  return c
