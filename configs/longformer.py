"""A window and global tokens in every layer (arXiv:2004.05150).

python -m attnlab.train --config=configs/longformer.py
  3.33 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/longformer.py:size=1.3b,recipe=pretrain
  10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(num_heads=4, num_kv_heads=2, head_dim=16, window=32, initial=4)
  small = dict(num_heads=4, num_kv_heads=2, head_dim=64, window=64, initial=4)
  return single("longformer", arg, tiny=tiny, small=small)
