"""A window of exact attention, and a linear state of what lies before it, in every layer (arXiv:2410.10254).

python -m attnlab.train --config=configs/window_linear.py
  3.32 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/window_linear.py:size=1.3b,recipe=pretrain
  10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(num_heads=4, head_dim=16, window=32)
  small = dict(num_heads=4, head_dim=64, window=64)
  return single("window_linear", arg, tiny=tiny, small=small)
