"""Lightning attention with flash-linear-attention's slopes (arXiv:2401.04658).

python -m attnlab.train --config=configs/lightning_fla.py
  3.42 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/lightning_fla.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("lightning_fla", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
