"""A hybrid of 30 thousand parameters that compiles fast, on the standard library's sources."""

from attnlab.config import parse_arg
from configs.base import base


def get_config(arg: str = ""):
  arg = parse_arg(arg, steps=60, pattern="linear_attention + softmax")
  config = base()
  config.model.pattern = arg.pattern
  config.model.num_layers = 2
  config.model.d_model = 32
  config.model.mlp.hidden = 64
  for mixer in ("linear_attention", "softmax", "kda"):
    config.model.mixers[mixer] = dict(head_dim=16)
  config.data.seq_len = 64
  config.data.shuffle_tokens = 1 << 13
  config.optim.schedule = "constant"
  config.optim.warmup_steps = 2
  config.train.steps = arg.steps
  config.train.batch_size = 4
  config.train.log_every = 1
  config.train.eval_every = 25
  config.train.eval_batches = 2
  config.train.checkpoint_every = 7
  config.train.sample_every = 1000  # only at the end
  config.train.sample_tokens = 8
  return config
