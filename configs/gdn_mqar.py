"""Gated DeltaNet on multi-query associative recall (arXiv:2312.04927): 16 keys and values, then queries in 128 tokens.

python -m attnlab.train --config=configs/gdn_mqar.py
  95 % of the values recalled after 600 updates of 64 examples, three to five minutes on two CPU cores
python -m attnlab.train --config=configs/gdn_mqar.py:mixer=softmax
  7 % after as many, in a little less time: without a convolution it has not begun to learn. Any mixer's name will do
"""

from attnlab.config import parse_arg
from configs.base import base


def get_config(arg: str = ""):
  a = parse_arg(arg, mixer="gated_deltanet")
  c = base()
  c.model.pattern = a.mixer
  c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 64, 2, 0
  if a.mixer == "gated_deltanet":
    c.model.mixers = dict(gated_deltanet=dict(num_heads=2, head_dim=32, value_dim=32))
  elif a.mixer == "softmax":
    c.model.mixers = dict(softmax=dict(head_dim=32))
  c.data.update(dict(name="task", task="mqar", seq_len=128))
  c.data.task_args = dict(vocab_size=256, num_kv_pairs=16, random_non_queries=False)
  c.train.update(dict(steps=600, batch_size=64, eval_every=100, eval_batches=8))
  c.optim.weight_decay = 0.0
  return c
