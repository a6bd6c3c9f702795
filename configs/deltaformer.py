"""DeltaFormer in every layer: softmax attention with the delta rule (arXiv:2505.19488).

python -m attnlab.train --config=configs/deltaformer.py
  3.38 bits per byte on held-out files after 100 updates of the tiny size, one to two minutes on two CPU cores
python -m attnlab.train --config=configs/deltaformer.py:size=1.3b,recipe=pretrain
  10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("deltaformer", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
