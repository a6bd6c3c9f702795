"""Checkpoints as Hugging Face's libraries keep them: a directory with config.json and safetensors files."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from attnlab.config import read_json
from attnlab.errors import UserError

_INDEX = "model.safetensors.index.json"
# What a model is loaded from, and what its tokenizer is; nothing that would be run.
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt")
# Behind a quantised tensor's name: the scales of its blocks.
_SCALES = "_scale_inv"
# Of experts that share tensors: what each such tensor has of an expert.
_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Keys of a config.json that are beside "text_config" rather than in it.
_OF_THE_WHOLE = ("tie_word_embeddings", "quantization_config")
# Bytes of a file of a checkpoint that is written, about.
_SHARD = 4 << 30


def locate(source: str) -> Path:
  """The directory of a checkpoint: that of a path, or of a model on the Hub ("Qwen/Qwen3-0.6B"), which is fetched.

  Raises:
    UserError: neither a directory nor a model that could be fetched.
  """
  if Path(source).is_dir():
    return Path(source)
  if source.count("/") != 1 or source.startswith((".", "/", "~")):
    raise UserError(f"{source} is no directory (nor the name of a model on the Hub, ORG/NAME)")
  try:
    import huggingface_hub
  except ImportError as error:
    raise UserError(
      f"{source} is no directory; to fetch a model of that name: pip install huggingface-hub"
    ) from error
  try:
    return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(_WANTED)))
  except Exception as error:  # of the library, of HTTP, of sockets
    raise UserError(
      f"{source} is no directory, and as a model on the Hub it could not be fetched: {error}"
    ) from error


def read_config(directory: Path) -> dict[str, Any]:
  """A checkpoint's config.json, of a model of text and pictures the part that is of text; UserError if it is not there,
  or not to be read."""
  path = directory / "config.json"
  if not path.exists():
    raise UserError(f"{path} is missing: a checkpoint has it beside its weights")
  values = read_json(path)
  whole = {k: v for k, v in values.items() if k in _OF_THE_WHOLE}
  return whole | (values.get("text_config") or values)


@dataclasses.dataclass(frozen=True)
class _Expert:
  """An expert's matrix in a tensor [experts, parts x rows, columns] of all of them: its name, and which it is."""

  tensor: str
  number: int
  part: int
  parts: int


class Tensors:
  """The tensors of a checkpoint, read from its files when they are asked for.

  Experts that share a tensor (``experts.gate_up_proj``, ``experts.down_proj``) have names as if each had its own.

  Args:
    directory: the checkpoint's.

  Raises:
    UserError: no safetensors library, or no safetensors files, or one that is broken or missing.
  """

  def __init__(self, directory: Path):
    try:
      from safetensors import SafetensorError, safe_open
    except ImportError as error:
      raise UserError("reading weights needs: pip install safetensors") from error
    index = directory / _INDEX
    if index.is_file():
      names = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
      names = sorted(p.name for p in directory.glob("*.safetensors"))
    if not names:
      raise UserError(f"{directory} has no *.safetensors (weights in *.bin are not read)")
    self._directory = directory
    self._files: dict[str, Any] = {}
    self._paths: dict[str, Path] = {}
    for name in names:
      try:
        file = safe_open(directory / name, "numpy")
      except (OSError, SafetensorError) as error:
        raise UserError(f"{directory / name}: {error}") from error
      self._files |= dict.fromkeys(file.keys(), file)
      self._paths |= dict.fromkeys(file.keys(), directory / name)
    self._shared: dict[str, _Expert] = {}
    for name in self._files:
      at, _, kind = name.rpartition(".")
      parts = _EXPERTS.get(kind, ()) if at.endswith("experts") else ()
      for e in range(self._shape(name)[0] if parts else 0):
        for i, part in enumerate(parts):
          self._shared[f"{at}.{e}.{part}.weight"] = _Expert(name, e, i, len(parts))
    quantised = read_config(directory).get("quantization_config") or {}
    self._block = tuple(quantised.get("weight_block_size") or (128, 128))

  @property
  def names(self) -> list[str]:
    """Of all tensors but the scales of others' blocks."""
    whole = {shared.tensor for shared in self._shared.values()}
    own = [n for n in self._files if n.removesuffix(_SCALES) == n and n not in whole]
    return own + list(self._shared)

  def __getitem__(self, name: str) -> np.ndarray:
    """A tensor in float32.

    One in float8 whose blocks have scales (DeepSeek-V3, arXiv:2412.19437, section 3.3) is multiplied by them.

    Raises:
      UserError: a tensor that is quantised in another way.
    """
    shared = self._shared.get(name)
    whole = shared.tensor if shared else name
    file = self._files[whole]
    dtype = file.get_slice(whole).get_dtype()
    if dtype == "F8_E4M3" and name + _SCALES in self._files:
      scales = self[name + _SCALES]
      for axis, size in enumerate(self._block):
        scales = scales.repeat(size, axis=axis)
      x = self._float8(name)
      return x * scales[: x.shape[0], : x.shape[1]]
    if dtype not in ("F32", "F16", "BF16", "F64"):
      raise UserError(
        f"{self._directory}: {name} is quantised ({dtype}), in a way that is not known here:"
        " take a checkpoint in bfloat16"
      )
    if shared is None:
      return file.get_tensor(name).astype(np.float32)
    rows = self._shape(whole)[1] // shared.parts
    at = slice(shared.part * rows, (shared.part + 1) * rows)
    return file.get_slice(whole)[shared.number, at].astype(np.float32)

  def _shape(self, name: str) -> list[int]:
    return self._files[name].get_slice(name).get_shape()

  def _float8(self, name: str) -> np.ndarray:
    """A tensor that numpy has no type for, from the file's bytes: a header's length, the header, the tensors."""
    with self._paths[name].open("rb") as file:
      start = 8 + int.from_bytes(file.read(8), "little")
      entry = json.loads(file.read(start - 8))[name]
      file.seek(start + entry["data_offsets"][0])
      x = np.fromfile(file, ml_dtypes.float8_e4m3fn, math.prod(entry["shape"]))
    return x.reshape(entry["shape"]).astype(np.float32)


def write(
  directory: Path,
  config: Mapping[str, Any],
  tensors: Iterable[tuple[str, np.ndarray]],
  dtype: np.dtype,
) -> int:
  """Writes a checkpoint, a file of it at a time; the bytes of its tensors.

  Args:
    directory: made; a checkpoint that is there is the caller's to refuse.
    config: config.json.
    tensors: by name; they may be made as they are asked for.
    dtype: of all.
  """
  from safetensors.numpy import save_file

  directory.mkdir(parents=True, exist_ok=True)
  files: list[list[str]] = []
  shard: dict[str, np.ndarray] = {}
  total = size = 0

  def part(i: int) -> Path:
    return directory / f"model-{i:05}.safetensors.part"

  def flush() -> None:
    nonlocal shard, size
    save_file(shard, part(len(files)), metadata={"format": "pt"})
    files.append(list(shard))
    shard, size = {}, 0

  for name, x in tensors:
    x = np.ascontiguousarray(x.astype(dtype))
    if size and size + x.nbytes > _SHARD:
      flush()
    shard[name] = x
    size, total = size + x.nbytes, total + x.nbytes
  flush()
  if len(files) == 1:
    part(0).rename(directory / "model.safetensors")
  else:
    called = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for i, name in enumerate(called):
      part(i).rename(directory / name)
    where = {name: file for file, names in zip(called, files, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
  # Last: a directory without it is no checkpoint.
  (directory / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
  return total
