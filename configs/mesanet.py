"""MesaNet: in every layer, the least squares fit of values to keys so far (arXiv:2506.05233).

python -m attnlab.train --config=configs/mesanet.py
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("mesanet", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
