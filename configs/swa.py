"""Sliding-window attention in every layer (arXiv:2004.05150).

python -m attnlab.train --config=configs/swa.py
  3.36 bits per byte on held-out files after 100 updates of the tiny size, half a minute on two CPU cores
python -m attnlab.train --config=configs/swa.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("swa", arg, tiny=dict(head_dim=16, window=64), small=dict(head_dim=64, window=128))
