"""Comba: erase before decay, and a corrected query (arXiv:2506.02475).

python -m attnlab.train --config=configs/comba.py
  2.96 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/comba.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("comba", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
