"""Gated DeltaNet with a state for each power of two of the past: log-linear attention (arXiv:2506.04761).

python -m attnlab.train --config=configs/log_linear_gated_deltanet.py
  3.10 bits per byte on held-out files after 100 updates of the tiny size, several minutes on two CPU cores
python -m attnlab.train --config=configs/log_linear_gated_deltanet.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  return single("log_linear_gated_deltanet", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
