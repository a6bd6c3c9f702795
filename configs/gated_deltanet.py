"""Gated DeltaNet: the delta rule with a decay a head (arXiv:2412.06464).

python -m attnlab.train --config=configs/gated_deltanet.py
  3.09 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/gated_deltanet.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("gated_deltanet", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
