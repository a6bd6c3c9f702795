"""Three Gated DeltaNet layers to one of native sparse attention, no full attention.

python -m attnlab.train --config=configs/gdn_nsa.py
  3.18 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/gdn_nsa.py:size=1.3b
  the same at 1.3 billion parameters, for accelerators; not run here
"""

from configs.base import hybrid


def get_config(arg: str = ""):
  blocks = dict(block_size=16, top_k=6, pool_size=8, pool_stride=4, window=32)
  tiny = dict(
    gated_deltanet=dict(num_heads=2, head_dim=24, value_dim=32),
    nsa=dict(num_heads=4, num_kv_heads=2, head_dim=16, **blocks),
  )
  large = dict(
    gated_deltanet=dict(head_dim=256, expand_k=0.75, expand_v=1.5),
    nsa=dict(head_dim=128, num_kv_heads=1),
  )
  return hybrid("3*gdn + 1*nsa", arg, tiny=tiny, large=large)
