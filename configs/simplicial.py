"""2-simplicial attention, to pairs of tokens, in every layer (arXiv:2507.02754; there in every fourth, the others being
softmax attention's: --config.model.pattern='3*softmax + simplicial').

python -m attnlab.train --config=configs/simplicial.py
  3.22 bits per byte on held-out files after 100 updates of the tiny size, two to five minutes on two CPU cores
python -m attnlab.train --config=configs/simplicial.py:size=1.3b,recipe=pretrain
  10 billion tokens, for accelerators; not run here
"""

from configs.base import single


def get_config(arg: str = ""):
  tiny = dict(head_dim=16, window=32, second_window=8)
  return single("simplicial", arg, tiny=tiny, small=dict(head_dim=64))
