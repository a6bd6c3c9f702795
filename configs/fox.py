"""The forgetting transformer (FoX, the authors' "Pro") in every layer: softmax attention with a forget gate
(arXiv:2503.02130).

python -m attnlab.train --config=configs/fox.py
  2.88 bits per byte on held-out files after 100 updates of the tiny size, about a minute on two CPU cores
python -m attnlab.train --config=configs/fox.py:size=1.3b,recipe=pretrain
  the 1.3b size: 10 billion tokens, for accelerators; not run here
"""

from configs.base import single

PRO = dict(qk_norm=True, kv_shift=True, output_norm=True, output_gate="element")


def get_config(arg: str = ""):
  config = single("fox", arg, tiny=dict(head_dim=16), small=dict(head_dim=64))
  config.model.mixers.fox.update(PRO)
  return config
