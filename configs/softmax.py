"""Full softmax attention with RoPE in every layer: the baseline (arXiv:1706.03762).

python -m attnlab.train --config=configs/softmax.py
  3.39 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/softmax.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("softmax", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
