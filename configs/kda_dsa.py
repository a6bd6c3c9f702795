"""Three KDA layers to one of sparse latent attention, without position encoding and without full attention, after
GLM-5-Next: pools of tokens have one key, and the last one, which is not full, is always seen. With "shared" every
second sparse layer attends to what the one before it chose, without an indexer of its own.

python -m attnlab.train --config=configs/kda_dsa.py
  3.09 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/kda_dsa.py:size=1.3b
  the same at 1.3 billion parameters, pools of 16 tokens; for accelerators; not run here
python -m attnlab.train --config=configs/kda_dsa.py:shared
  one indexer for two sparse layers, eight layers in all; not run here
"""

from attnlab.config import parse_arg
from configs.base import SIZES, hybrid


def get_config(arg: str = ""):
  a = parse_arg(arg, size=SIZES, shared=False)
  tiny = dict(
    kda=dict(num_heads=4, head_dim=16, decay_gate="safe"),
    dsa=dict(
      num_heads=4,
      kv_lora_rank=32,
      q_lora_rank=32,
      nope_dim=16,
      rope_dim=0,
      value_dim=16,
      pool=4,
      top_k=48,
      index_heads=4,
      index_dim=16,
      index_rope_dim=0,
    ),
  )
  large = dict(
    kda=dict(head_dim=128, decay_gate="safe"),
    dsa=dict(
      q_lora_rank=1536,
      nope_dim=128,
      rope_dim=0,
      pool=16,
      index_heads=32,
      index_rope_dim=0,
    ),
  )
  if not a.shared:
    return hybrid("3*kda + 1*dsa", f"size={a.size}", tiny=tiny, large=large)
  pattern = "3*kda + dsa(share=give) + 3*kda + dsa(share=take)"
  config = hybrid(pattern, f"size={a.size}", tiny=tiny, large=large)
  config.model.num_layers = max(config.model.num_layers, 8)
  return config
