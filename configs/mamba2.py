"""Mamba-2 (arXiv:2405.21060).

python -m attnlab.train --config=configs/mamba2.py
  2.76 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/mamba2.py:size=2.7b,recipe=pretrain
  the 2.7b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(head_dim=16, state_dim=16)
  small = dict(head_dim=64, state_dim=64)
  return single("mamba2", arg, tiny=tiny, small=small)
