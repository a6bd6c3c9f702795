"""Gated DeltaNet-2: separate erase and write gates a channel (arXiv:2605.22791).

python -m attnlab.train --config=configs/gdn2.py
  3.08 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/gdn2.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("gdn2", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
