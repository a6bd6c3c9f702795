"""Three Gated DeltaNet layers to one of MoBA, no full attention.

python -m attnlab.train --config=configs/gdn_moba.py
  3.17 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/gdn_moba.py:size=1.3b
  the same at 1.3 billion parameters, for accelerators; not run here
"""

from configs.base import hybrid


def get_config(arg: str = ""):
  tiny = dict(
    gated_deltanet=dict(num_heads=2, head_dim=24, value_dim=32),
    moba=dict(num_heads=4, head_dim=16, block_size=16, top_k=4),
  )
  large = dict(
    gated_deltanet=dict(head_dim=256, expand_k=0.75, expand_v=1.5),
    moba=dict(head_dim=128),
  )
  return hybrid("3*gdn + 1*moba", arg, tiny=tiny, large=large)
