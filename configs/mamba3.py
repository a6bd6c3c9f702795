"""Mamba-3: trapezoidal, rotating state (arXiv:2603.15569).

python -m attnlab.train --config=configs/mamba3.py
  3.32 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/mamba3.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(head_dim=16, state_dim=16)
  small = dict(head_dim=64, state_dim=64)
  return single("mamba3", arg, tiny=tiny, small=small)
