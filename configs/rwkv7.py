"""RWKV-7: a diagonal plus low-rank transition (arXiv:2503.14456).

python -m attnlab.train --config=configs/rwkv7.py
  2.95 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/rwkv7.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("rwkv7", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
