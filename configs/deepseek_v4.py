"""Heavily compressed attention and compressed sparse attention in turn, after DeepSeek-V4; plain residuals.

python -m attnlab.train --config=configs/deepseek_v4.py
  3.35 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/deepseek_v4.py:size=1.3b
  the mechanisms' published sizes at 1.3 billion parameters, for accelerators; not run here
"""

from configs.base import hybrid


def get_config(arg: str = ""):
  small = dict(num_heads=4, head_dim=32, rope_dim=16, q_lora_rank=32, window=32, out_groups=2)
  index = dict(top_k=16, index_heads=4, index_dim=16, index_rope_dim=8)
  tiny = dict(hca=dict(small, out_rank=32, compress=16), csa=dict(small, out_rank=32, **index))
  large = dict(hca=dict(num_heads=8), csa=dict(num_heads=8))
  return hybrid("1*hca + 1*csa", arg, tiny=tiny, large=large)
