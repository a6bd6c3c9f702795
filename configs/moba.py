"""MoBA in every layer (arXiv:2502.13189).

python -m attnlab.train --config=configs/moba.py
  3.39 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/moba.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(num_heads=4, num_kv_heads=2, head_dim=16, block_size=16, top_k=4)
  small = dict(num_heads=4, num_kv_heads=2, head_dim=64, block_size=32, top_k=4)
  return single("moba", arg, tiny=tiny, small=small)
