"""Three Lightning layers to one of InfLLM-V2, no full attention, after MiniCPM-SALA: RoPE in the linear layers alone.

The linear layers are MiniMax-01's, with q and k of unit length. (The released ones have no activations, slopes that are
the same in all layers, and a learned norm of q and k.)

python -m attnlab.train --config=configs/sala.py
  3.36 bits per byte on held-out files after 100 updates of the tiny size, under a minute on two CPU cores
python -m attnlab.train --config=configs/sala.py:size=1.3b
  the same at 1.3 billion parameters, for accelerators; not run here
"""

from configs.base import hybrid


def get_config(arg: str = ""):
  linear = dict(rope_fraction=1.0, qk_norm=True)
  sparse = dict(rope_fraction=0.0, qk_norm=True, output_gate="element")
  blocks = dict(block_size=16, top_k=6, pool_size=8, pool_stride=4, local=2)
  tiny = dict(
    lightning=dict(num_heads=4, head_dim=16, **linear),
    infllm2=dict(num_heads=4, num_kv_heads=2, head_dim=16, **blocks, **sparse),
  )
  large = dict(
    lightning=dict(head_dim=128, **linear),
    infllm2=dict(head_dim=128, num_kv_heads=2, **sparse),
  )
  return hybrid("3*lightning + 1*infllm2", arg, tiny=tiny, large=large)
