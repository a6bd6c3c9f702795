"""gpt-oss: sliding windows of 128 and full attention in turn, with sinks (arXiv:2508.10925).

python -m attnlab.train --config=configs/gpt_oss_swa.py
  3.34 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/gpt_oss_swa.py:paper
  the published 20b, for pods, without YaRN's longer context and without biases; not run here
"""

from attnlab.config import parse_arg
from configs.base import base, recipe


def get_config(arg: str = ""):
  a = parse_arg(arg, size=("tiny", "paper"))
  c = base()
  c.model.pattern = "1*swa + 1*softmax"
  if a.size == "tiny":
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 64, 4, 192
    c.model.mlp.update(dict(experts=8, top_k=2, expert_hidden=96))
    heads = dict(num_heads=4, num_kv_heads=2, head_dim=16, sinks=True)
    window = 64
  else:
    c.update(recipe("pretrain"))
    c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 2880, 24, 2880
    c.model.mlp.update(dict(experts=32, top_k=4, expert_hidden=2880))
    heads = dict(num_heads=64, num_kv_heads=8, head_dim=64, rope_theta=150000.0, sinks=True)
    window = 128
    c.model.vocab_size, c.model.tie_embeddings, c.model.norm_eps = 201088, False, 1e-5
  c.model.mixers = dict(swa=heads | dict(window=window), softmax=heads)
  return c
