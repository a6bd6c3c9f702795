"""A window and compressed keys chosen by an indexer in every layer (DeepSeek-V4).

python -m attnlab.train --config=configs/csa.py
  3.35 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/csa.py:size=1.3b,recipe=pretrain
  10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(
    num_heads=4,
    head_dim=32,
    rope_dim=16,
    q_lora_rank=32,
    window=32,
    out_groups=2,
    out_rank=32,
    top_k=16,
    index_heads=4,
    index_dim=16,
    index_rope_dim=8,
  )
  small = dict(
    num_heads=4,
    head_dim=64,
    rope_dim=32,
    q_lora_rank=128,
    window=64,
    out_groups=2,
    out_rank=128,
    top_k=32,
    index_heads=4,
    index_dim=32,
    index_rope_dim=16,
  )
  return single("csa", arg, tiny=tiny, small=small)
