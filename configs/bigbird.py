"""BigBird's pattern, made causal, in every layer (arXiv:2007.14062).

python -m attnlab.train --config=configs/bigbird.py
  3.34 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/bigbird.py:size=1.3b,recipe=pretrain
  10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(num_heads=4, num_kv_heads=2, head_dim=16, block_size=8, initial=1)
  small = dict(num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, initial=1)
  return single("bigbird", arg, tiny=tiny, small=small)
