"""A published checkpoint becomes a run, or a run a checkpoint that other libraries read.

    python -m attnlab.hf --source=Qwen/Qwen3-0.6B --workdir=runs/qwen3
    python -m attnlab.hf --source=DIRECTORY --workdir=runs/qwen3 --config=configs/softmax.py
    python -m attnlab.hf --workdir=runs/qwen3 --export=DIRECTORY

Of a config, if one is given, the model is the checkpoint's: --config says how it goes on, with what data, optimizer
and mesh. The run is then as any other: `attnlab.train --config=WORKDIR/config.json` trains it, `attnlab.generate`,
`attnlab.evaluate` and `attnlab.convert` read it. Weights are safetensors, not quantised; no code of theirs is run.
"""

from absl import flags

from attnlab import cli, metrics
from attnlab.errors import UserError
from attnlab.hf.family import families
from attnlab.hf.load import load
from attnlab.hf.save import DTYPES, save
from configs.base import base


def main(_) -> None:
  f = flags.FLAGS
  if (f.source is None) == (f.export is None):
    raise UserError("give --source to read a checkpoint, or --export to write one")
  if f.export is not None:
    made = save(f.workdir, f.export, model_type=f.model_type, dtype=f.dtype, step=f.step)
    print(f"{f.export}: {metrics.human(made)}B of {f.dtype}, of {f.workdir}")
    return
  config = load(f.source, base() if f.config is None else cli.config(), f.workdir)
  print(f"{f.workdir}: {config.model.num_layers} layers, {config.model.pattern}, from {f.source}")
  print(f"its tokenizer: {config.data.tokenizer}")


if __name__ == "__main__":
  cli.define_config()
  flags.DEFINE_string("source", None, "A checkpoint's directory, or a model on the Hub: ORG/NAME.")
  flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
  flags.DEFINE_string("export", None, "The directory of a checkpoint to write.")
  flags.DEFINE_enum("model_type", None, list(families()), "Its family. Default: by its mixers.")
  flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of the tensors that --export writes.")
  flags.DEFINE_integer(
    "step", None, "Of the checkpoint to export. Default: the newest.", lower_bound=0
  )
  cli.run(main)
