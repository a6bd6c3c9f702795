"""DeltaNet: the delta rule without decay (arXiv:2406.06484).

python -m attnlab.train --config=configs/deltanet.py
  3.31 bits per byte on held-out files after 100 updates of the tiny size, half a minute on two CPU cores
python -m attnlab.train --config=configs/deltanet.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("deltanet", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
