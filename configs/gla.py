"""Gated linear attention: decay a channel (arXiv:2312.06635).

python -m attnlab.train --config=configs/gla.py
  3.33 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/gla.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("gla", arg)
