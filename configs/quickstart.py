"""The quickstart: a 3:1 hybrid of KDA and softmax attention without position encoding, on Python's own sources.

  python -m attnlab.train --config=configs/quickstart.py --workdir=runs/quickstart
    1.869 bits per byte on held-out files; three to five minutes on two CPU cores
  python -m attnlab.train --config=configs/quickstart.py:softmax --workdir=runs/quickstart-softmax
    2.038 bits per byte on held-out files

The second differs in the mixers alone: RoPE attention in every layer, of the same heads.
"""

from attnlab.config import parse_arg
from configs.base import base


def get_config(arg: str = ""):
  a = parse_arg(arg, model=("hybrid", "softmax"))
  c = base()
  c.model.d_model, c.model.num_layers, c.model.mlp.hidden = 192, 4, 512
  c.model.mixers = dict(kda=dict(num_heads=3, head_dim=64), softmax=dict(num_heads=3, head_dim=64))
  if a.model == "softmax":
    c.model.pattern = "softmax"
  else:
    c.model.pattern = "3*kda + 1*softmax(rope_fraction=0.0)"
  c.data.seq_len = 256
  c.train.update(dict(steps=400, batch_size=8, eval_every=100, sample_every=200))
  return c
