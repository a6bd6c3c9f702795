"""A state space layer and a window in turn, no full attention, after Samba (arXiv:2406.07522), with Mamba-2 for Mamba.

python -m attnlab.train --config=configs/samba_like.py
  2.83 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/samba_like.py:paper
  1.3 billion parameters, windows of 2048; for accelerators; not run here
"""

from attnlab.config import parse_arg
from configs.base import base, recipe, size


def get_config(arg: str = ""):
  a = parse_arg(arg, size=("tiny", "paper"))
  c = base()
  c.model.pattern = "1*mamba2 + 1*swa"
  if a.size == "tiny":
    c.update(size("tiny"))
    mamba2 = dict(head_dim=16, state_dim=16)
    swa = dict(num_heads=4, num_kv_heads=2, head_dim=16, window=64)
  else:
    c.update(recipe("pretrain"))
    c.update(size("1.3b"))
    mamba2 = dict()
    swa = dict(head_dim=128, num_kv_heads=4, window=2048)
  c.model.mixers = dict(mamba2=mamba2, swa=swa)
  return c
