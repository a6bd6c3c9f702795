"""Native sparse attention in every layer (arXiv:2502.11089).

python -m attnlab.train --config=configs/nsa.py
  3.34 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/nsa.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    block_size=16,
    top_k=6,
    pool_size=8,
    pool_stride=4,
    window=32,
  )
  small = dict(
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    block_size=32,
    top_k=6,
    pool_size=16,
    pool_stride=8,
    window=64,
  )
  return single("nsa", arg, tiny=tiny, small=small)
