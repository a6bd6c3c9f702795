"""A window and heavily compressed keys in every layer (DeepSeek-V4).

python -m attnlab.train --config=configs/hca.py
  3.37 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/hca.py:size=1.3b,recipe=pretrain
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
    compress=16,
  )
  small = dict(
    num_heads=4,
    head_dim=64,
    rope_dim=32,
    q_lora_rank=128,
    window=64,
    out_groups=2,
    out_rank=128,
    compress=32,
  )
  return single("hca", arg, tiny=tiny, small=small)
