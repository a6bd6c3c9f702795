"""RetNet: a constant decay a head (arXiv:2307.08621).

python -m attnlab.train --config=configs/retnet.py
  3.34 bits per byte on held-out files after 100 updates of the tiny size, half a minute on two CPU cores
python -m attnlab.train --config=configs/retnet.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("retnet", arg, tiny=dict(num_heads=4), small=dict(num_heads=4))
