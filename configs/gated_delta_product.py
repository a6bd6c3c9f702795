"""Gated DeltaProduct: two delta-rule steps a token (arXiv:2502.10297).

python -m attnlab.train --config=configs/gated_delta_product.py
  3.04 bits per byte on held-out files after 100 updates of the tiny size, about two minutes on two CPU cores
python -m attnlab.train --config=configs/gated_delta_product.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("gated_delta_product", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
