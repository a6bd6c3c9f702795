"""Mixture-of-Memories: several gated delta-rule states a head, and a router (arXiv:2502.13685).

python -m attnlab.train --config=configs/mom.py
  3.05 bits per byte on held-out files after 100 updates of the tiny size, about three minutes on two CPU cores
python -m attnlab.train --config=configs/mom.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("mom", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
