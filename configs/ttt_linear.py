"""TTT-Linear: a linear model a head, trained token by token (arXiv:2407.04620).

python -m attnlab.train --config=configs/ttt_linear.py
  3.13 bits per byte on held-out files after 100 updates of the tiny size, about two minutes on two CPU cores
python -m attnlab.train --config=configs/ttt_linear.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("ttt_linear", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
