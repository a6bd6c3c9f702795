"""Multi-head temporal latent attention in every layer: one latent for every two tokens (arXiv:2505.13544).

python -m attnlab.train --config=configs/mtla.py
  3.48 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/mtla.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(num_heads=4, kv_lora_rank=32, nope_dim=16, rope_dim=8, value_dim=16)
  small = dict(num_heads=4, kv_lora_rank=128, nope_dim=64, rope_dim=32, value_dim=64)
  return single("mtla", arg, tiny=tiny, small=small)
