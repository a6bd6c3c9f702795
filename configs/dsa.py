"""DeepSeek sparse attention in every layer (arXiv:2512.02556).

python -m attnlab.train --config=configs/dsa.py
  3.45 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/dsa.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(
    num_heads=4,
    kv_lora_rank=32,
    nope_dim=16,
    rope_dim=8,
    value_dim=16,
    top_k=64,
    index_heads=4,
    index_dim=16,
    index_rope_dim=8,
  )
  small = dict(
    num_heads=4,
    kv_lora_rank=128,
    nope_dim=64,
    rope_dim=32,
    value_dim=64,
    top_k=64,
    index_heads=4,
    index_dim=32,
    index_rope_dim=16,
  )
  return single("dsa", arg, tiny=tiny, small=small)
