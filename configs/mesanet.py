"""MesaNet: in every layer, the least squares fit of values to keys so far (arXiv:2506.05233).

python -m attnlab.train --config=configs/mesanet.py
  3.20 bits per byte on held-out files after 100 updates of the tiny size, two minutes on two CPU cores
python -m attnlab.train --config=configs/mesanet.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("mesanet", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
