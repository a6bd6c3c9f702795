"""Every key of a config with its default (those of `data` are in attnlab/data/sources.py), the sizes, and
the recipes. Model configs build on it:

    from attnlab.config import parse_arg
    from configs.base import base, recipe, size

    def get_config(arg: str = ""):
      arg = parse_arg(arg, size=("tiny", "small", "125m"))
      config = base()
      config.model.pattern = "3*kda + 1*softmax"
      config.update(size(arg.size))
      return config

The command line then overrides single keys: `--config=configs/kda.py:size=small
--config.train.steps=500 --config.model.mixers.kda.num_heads=8`.
"""

from ml_collections import ConfigDict

from attnlab.config import parse_arg
from attnlab.data import data_config
from attnlab.errors import unknown


def base() -> ConfigDict:
  """A complete config: a small KDA + softmax hybrid on bytes of the standard library's sources."""
  c = ConfigDict()
  c.seed = 0  # of the initialisation, the order of the data and the samples

  c.model = ConfigDict()
  c.model.pattern = "3*kda + 1*softmax"  # mixers of one period; repeated to num_layers
  c.model.num_layers = 4
  c.model.d_model = 128
  c.model.vocab_size = 0  # 0: what the tokenizer or the task has
  c.model.mixers = ConfigDict()  # mixer name -> keys over that mixer's own defaults
  c.model.mlp = ConfigDict()
  c.model.mlp.hidden = 384  # SwiGLU's width; 0: no MLP, mixers alone
  c.model.mlp.experts = 0  # of a mixture of experts in the MLP's place; 0: none
  c.model.mlp.expert_hidden = 128  # width of each expert
  c.model.mlp.top_k = 2  # experts a token
  c.model.mlp.shared_experts = 0  # experts that every token goes through
  c.model.mlp.shared_gate = False  # sigmoid(w . x) weighs what they give
  c.model.mlp.groups = 1  # of experts side by side, of which a token's lie in the best top_groups
  c.model.mlp.top_groups = 1
  c.model.mlp.router = "softmax"
  c.model.mlp.routed_scale = 1.0  # multiplies the routed experts' sum
  c.model.mlp.balance = 0.01  # weight of the balance loss
  c.model.mlp.bias_rate = (
    0.0  # of the bias that balances experts without a loss (DeepSeek-V3: 1e-3)
  )
  c.model.mlp.dense_layers = 0  # leading layers that keep the dense MLP
  c.model.dense = False  # sparse mixers see everything, with the same weights
  c.model.tie_embeddings = True
  c.model.remat = "none"  # what the backward pass recomputes: attnlab.model lists the policies
  c.model.dtype = "float32"  # of activations: float32 or bfloat16. Parameters are always float32
  c.model.norm_eps = 1e-6
  c.model.z_loss = 0.0  # weight of log(Z)^2, in nats

  c.data = data_config()  # attnlab/data/sources.py says what each key is

  c.optim = ConfigDict()
  c.optim.name = "adamw"  # adamw, lion or muon (matrices; AdamW for the rest)
  c.optim.learning_rate = 3e-3  # at the peak; one rate for Muon's matrices and its AdamW part
  c.optim.schedule = "cosine"  # cosine, wsd (warm-up, stable, decay) or constant
  c.optim.warmup_steps = 20
  c.optim.final_fraction = 0.1  # of learning_rate, at the end of cosine and wsd
  c.optim.decay_fraction = 0.2  # of train.steps, wsd's last part
  c.optim.weight_decay = 0.1  # times the learning rate; never on gates, norms, biases
  c.optim.clip_norm = 1.0  # global gradient norm; 0: no clipping
  c.optim.b1 = 0.9  # AdamW's and Lion's
  c.optim.b2 = 0.95  # (Lion wants 0.99)
  c.optim.eps = 1e-8  # AdamW's
  c.optim.muon_momentum = 0.95
  c.optim.only = ""  # train only parameters whose path has this in it, such as "indexer", or one of several: "a,b"

  c.train = ConfigDict()
  c.train.steps = 100  # optimiser updates
  c.train.batch_size = 8  # rows an update, over all processes and microbatches
  c.train.grad_accum = 1  # microbatches an update
  c.train.log_every = 1  # updates a line of metrics.jsonl; 0: never, as for those below
  c.train.eval_every = 50  # and at the end
  c.train.eval_batches = 16  # microbatches of the validation split; 0: no evaluation
  c.train.stop_accuracy = 0.0  # of the validation split, at which the run ends early; 0: never
  c.train.checkpoint_every = 100  # and at the end
  c.train.keep_checkpoints = 2  # the newest ones
  c.train.sample_every = 200  # and at the end, for text data; 0: never
  c.train.sample_prompts = ("def ", "import ")
  c.train.sample_tokens = 128  # generated after each prompt
  c.train.sample_temperature = 0.8  # of one of the two samples a prompt; the other is greedy

  c.mesh = ConfigDict()  # devices along each axis
  c.mesh.replica = 1  # whole copies of the model
  c.mesh.data = -1  # data parallel, parameters sharded (FSDP); -1: all devices that are left
  c.mesh.context = 1  # parts of each row, whose tokens these devices share
  c.mesh.model = 1  # heads, MLP width, experts and vocabulary
  return c


# d_model, num_layers, MLP width and peak learning rate. tiny is for tests, small for a laptop; the
# rest are the usual rungs of the papers (125m: GPT-3's table 2.1, arXiv:2005.14165, and on), with
# SwiGLU's 8/3 width rounded to 128.
_SIZES = {
  "tiny": (64, 4, 192, 3e-3),
  "small": (256, 8, 768, 2e-3),
  "125m": (768, 12, 2048, 6e-4),
  "350m": (1024, 24, 2816, 3e-4),
  "760m": (1536, 24, 4096, 2.5e-4),
  "1.3b": (2048, 24, 5504, 2e-4),
  "2.7b": (2560, 32, 6912, 1.6e-4),
}
SIZES = tuple(_SIZES)


def size(name: str) -> ConfigDict:
  """The keys that set a model's size, to `config.update(...)` with.

  Args:
    name: one of SIZES.
  """
  if name not in _SIZES:
    raise unknown("size", name, _SIZES)
  d_model, num_layers, hidden, learning_rate = _SIZES[name]
  return ConfigDict(
    dict(
      model=dict(d_model=d_model, num_layers=num_layers, mlp=dict(hidden=hidden)),
      optim=dict(learning_rate=learning_rate),
    )
  )


_RECIPES = {
  # On a laptop's two cores, in a minute or so at size tiny.
  "laptop": dict(train=dict(steps=100, batch_size=8), data=dict(seq_len=256)),
  # Half a million tokens an update, 10 billion in all, at length 4096: what comparisons of 125m to
  # 1.3b models are usually made with.
  "pretrain": dict(
    model=dict(dtype="bfloat16", remat="full", z_loss=1e-4),
    optim=dict(warmup_steps=1000, final_fraction=0.1),
    data=dict(seq_len=4096),
    train=dict(
      steps=20_000,
      batch_size=128,
      log_every=20,
      eval_every=1000,
      eval_batches=64,
      checkpoint_every=1000,
      keep_checkpoints=3,
      sample_every=5000,
    ),
  ),
}
RECIPES = tuple(_RECIPES)


def recipe(name: str) -> ConfigDict:
  """The keys of a training recipe, to `config.update(...)` with.

  Args:
    name: one of RECIPES.
  """
  if name not in _RECIPES:
    raise unknown("recipe", name, _RECIPES)
  return ConfigDict(_RECIPES[name])


def single(mixer: str, arg: str = "", *, tiny=None, small=None) -> ConfigDict:
  """The config of a model with one mixer in every layer.

  Args:
    mixer: its name.
    arg: "size=NAME,recipe=NAME" of SIZES and RECIPES; tiny and the laptop's recipe by default.
    tiny, small: the mixer's settings at these sizes, where the paper's heads are too wide.
  """
  a = parse_arg(arg, size=SIZES, recipe=RECIPES)
  config = base()
  config.model.pattern = mixer
  config.update(size(a.size))
  config.update(recipe(a.recipe))
  settings = {"tiny": tiny, "small": small}.get(a.size)
  config.model.mixers = ConfigDict({mixer: settings or {}})
  return config


def hybrid(pattern: str, arg: str = "", *, tiny, large) -> ConfigDict:
  """The config of a model with several mixers.

  Args:
    pattern: of its layers.
    arg: "size=NAME" of SIZES; tiny is with the laptop's recipe, anything else with the one for pretraining.
    tiny, large: for each mixer its settings, at size tiny and at any other.
  """
  a = parse_arg(arg, size=SIZES)
  config = base()
  config.model.pattern = pattern
  config.update(size(a.size))
  config.update(recipe("laptop" if a.size == "tiny" else "pretrain"))
  config.model.mixers = ConfigDict(tiny if a.size == "tiny" else large)
  return config
