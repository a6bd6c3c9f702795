"""The record of a run: metrics.jsonl first, tensorboard and a progress line beside it, a plot after.

metrics.jsonl has one JSON object a line. Lines of training have "loss", those of the validation
split have "eval/nll"; both have "step". When a run resumes, lines after the restored step are
dropped, so that no step stands twice.
"""

import collections
import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

# Dense bf16 FLOPs a second of one JAX device, by words of its device_kind, from the vendors' data
# sheets. A device is a whole TPU chip from v4 on, but on v7x one of a chip's two cores.
_PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "A100": 312e12,
  "H100 PCIe": 756e12,
  "H100": 989e12,
  "H200": 989e12,
  "GH200": 989e12,
  "B200": 2250e12,
  "GB200": 2500e12,
  "L4": 121e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """Dense bf16 FLOPs a second of a device; None if it is not one that is known."""
  name = device.device_kind
  kinds = [k for k in _PEAK_FLOPS if re.search(rf"\b{k}\b", name, re.IGNORECASE)]
  return _PEAK_FLOPS[max(kinds, key=len)] if kinds else None


# Seconds that a speed is the mean over.
_SPEED_OVER = 5.0


class Recorder:
  """Writes what a run measures. On processes other than the first it writes nothing.

  Args:
    workdir: where metrics.jsonl, samples.jsonl and tensorboard/ go.
    step: updates done before; later records are dropped.
    steps: updates in the whole run.
    tokens: per update, over all devices.
    flops: per token, forward and backward, for the utilisation; None: not known.
  """

  def __init__(self, workdir: Path, *, step: int, steps: int, tokens: int, flops: float | None):
    self._writes = jax.process_index() == 0
    self._steps, self._tokens, self._flops = steps, tokens, flops
    peak = peak_flops(jax.devices()[0])
    self._peak = peak and peak * jax.device_count()
    # (step, time) of updates since _SPEED_OVER ago, the time without pauses; the speed is that from
    # the first to the last.
    self._marks: collections.deque[tuple[int, float]] = collections.deque()
    self._paused = 0.0
    self._began = self._said = time.monotonic()
    self._console = Console(highlight=False, soft_wrap=True)
    self._progress = None
    if not self._writes:
      return
    records = truncate(workdir / "metrics.jsonl", step)
    self._began -= max((r.get("seconds", 0) for r in records), default=0)
    truncate(workdir / "samples.jsonl", step)
    self._files = {n: open(workdir / f"{n}.jsonl", "a") for n in ("metrics", "samples")}
    self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
    if self._console.is_terminal:
      self._progress = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=self._console,
      )
      self._task = self._progress.add_task("", total=steps, completed=step, text="compiling")
      self._progress.start()

  def train(self, step: int, values: Mapping[str, float]) -> None:
    """Records an update's metrics, with the speed of the last seconds."""
    values = {"step": step, **values, "tokens": step * self._tokens}
    speed = self.time(step)
    if speed:
      values["tokens_per_second"] = speed
      if self._flops and self._peak:
        values["mfu"] = speed * self._flops / self._peak
    self._write(step, values)
    text, now = self._line(values), time.monotonic()
    if self._progress:
      self._progress.update(self._task, completed=step, text=text)
    # Without a terminal, a line each ten seconds; later, each hundredth of the time run so far.
    elif speed is None or step == self._steps or now - self._said > max(10, self._seconds() / 100):
      self._said = now
      self.say(f"step {step}/{self._steps}  {text}{self._eta(step, values)}")

  def time(self, step: int) -> float | None:
    """Notes that an update is done. Tokens a second lately; None after the first, which compiles."""
    now = time.monotonic() - self._paused
    self._marks.append((step, now))
    while len(self._marks) > 2 and now - self._marks[1][1] > _SPEED_OVER:
      self._marks.popleft()
    (first, began), (last, ended) = self._marks[0], self._marks[-1]
    return (last - first) * self._tokens / max(ended - began, 1e-9) if last > first else None

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Around anything but updates: its time does not count as training's."""
    began = time.monotonic()
    yield
    self._paused += time.monotonic() - began

  def evaluation(self, step: int, values: Mapping[str, float]) -> None:
    """Records the metrics of the validation split."""
    values = {"step": step, **{f"eval/{k}": v for k, v in values.items()}}
    self._write(step, values)
    shown = "  ".join(f"{k[5:]} {v:.4f}" for k, v in values.items() if k.startswith("eval/"))
    self.say(f"step {step}/{self._steps}  validation  {shown}")

  def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
    """Records generated text: for each sample its prompt, temperature and text."""
    if not self._writes:
      return
    for sample in samples:
      self._append("samples", {"step": step, **sample})
      how = f"temperature {sample['temperature']}" if sample["temperature"] else "greedy"
      self.say(f"step {step}/{self._steps}  sample, {how}: {sample['prompt'] + sample['text']!r}")
      title = f"{sample['prompt']!r}, {how}"
      self._board.add_text(title, f"```\n{sample['prompt']}{sample['text']}\n```", step)

  def say(self, text: str) -> None:
    """Prints a line above the progress line."""
    if self._writes:
      self._console.print(text, markup=False)

  def close(self) -> None:
    if self._writes:
      if self._progress:
        self._progress.stop()
      for file in self._files.values():
        file.close()
      self._board.close()

  def _seconds(self) -> float:
    """Since the run began, without the time between a stop and a resume."""
    return time.monotonic() - self._began

  def _write(self, step: int, values: dict[str, float]) -> None:
    if not self._writes:
      return
    values["seconds"] = round(self._seconds(), 3)
    self._append("metrics", values)
    for key, value in values.items():
      if key != "step":
        self._board.add_scalar(key if "/" in key else f"train/{key}", value, step)

  def _append(self, name: str, values: dict[str, Any]) -> None:
    self._files[name].write(json.dumps(values) + "\n")
    self._files[name].flush()  # A kill must not take a line that a checkpoint counts as written.

  def _line(self, values: Mapping[str, float]) -> str:
    parts = [f"loss {values['loss']:.4f}"]
    if "bits_per_byte" in values:
      parts.append(f"{values['bits_per_byte']:.3f} bits/byte")
    if "tokens_per_second" in values:
      parts.append(f"{human(values['tokens_per_second'])} tokens/s")
    if "mfu" in values:
      parts.append(f"MFU {values['mfu']:.1%}")
    return "  ".join(parts)

  def _eta(self, step: int, values: Mapping[str, float]) -> str:
    if "tokens_per_second" not in values:
      return ""
    left = round((self._steps - step) * self._tokens / values["tokens_per_second"])
    return f"  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


def with_bits(values: Mapping[str, float]) -> dict[str, float]:
  """Nats to bits.

  Args:
    values: with "nll", the mean nats of a target, "weights", the number of targets, and "bytes",
      how much text they stand for (0: not text).

  Returns:
    The values with "bits_per_token" and, for text, "bits_per_byte"; without "weights" and "bytes".
  """
  values = dict(values)
  targets, size = values.pop("weights"), values.pop("bytes")
  bits = values["nll"] / math.log(2)
  values["bits_per_token"] = bits
  if size:
    values["bits_per_byte"] = bits * targets / size
  return values


def human(n: float) -> str:
  """1234 -> "1.23k"."""
  for power, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
    if abs(n) >= 10**power:
      return f"{n / 10**power:.3g}{unit}"
  return f"{n:.3g}"


def read(path: Path) -> list[dict[str, Any]]:
  """The records of a .jsonl file. A last line that a kill cut short is left out."""
  records = []
  if path.exists():
    for line in path.read_text().splitlines():
      with contextlib.suppress(ValueError):
        records.append(json.loads(line))
  return records


def truncate(path: Path, step: int) -> list[dict[str, Any]]:
  """Drops the records after a step from a .jsonl file, all or nothing, and returns the rest."""
  records = [r for r in read(path) if r["step"] <= step]
  if path.exists():
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in records))
  return records


def write_atomically(path: Path, text: str) -> None:
  """Writes a file so that a kill leaves the old one or the new one."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text)
  os.replace(temporary, path)


def plot(workdir: Path, title: str) -> bool:
  """Draws a run's losses into loss.png and loss.svg. False if matplotlib is not installed."""
  try:
    import matplotlib.figure
  except ImportError:
    return False
  records = read(workdir / "metrics.jsonl")
  train = [r for r in records if "loss" in r]
  evals = [r for r in records if "eval/nll" in r]
  unit = "bits_per_byte" if all("bits_per_byte" in r for r in train) else "bits_per_token"
  figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
  axes = figure.subplots()
  steps, values = [r["step"] for r in train], [r[unit] for r in train]
  axes.plot(steps, values, color="#9ec5e8", linewidth=0.8, alpha=0.8)
  axes.plot(steps, _smooth(values), color="#1f5fa8", linewidth=2, label="training")
  if evals:
    x, y = [r["step"] for r in evals], [r[f"eval/{unit}"] for r in evals]
    axes.plot(x, y, "o-", color="#d1495b", linewidth=1.2, markersize=5, label="validation")
    axes.annotate(
      f"{y[-1]:.3f}", (x[-1], y[-1]), textcoords="offset points", xytext=(0, 10), ha="center",
      color="#d1495b", fontsize=10,
    )  # fmt: skip
  axes.set(xlabel="updates", ylabel=unit.replace("_", " "))
  axes.set_title(title, loc="left", fontsize=11)
  # The first updates fall from log2(vocabulary) and would flatten all the rest.
  late = [v for v in values[len(values) // 20 :] + [r[f"eval/{unit}"] for r in evals]]
  if late and math.isfinite(max(late)):
    spread = max(late) - min(late) or 1
    axes.set_ylim(min(late) - 0.08 * spread, max(late) + 0.08 * spread)
  axes.set_xlim(left=0)
  axes.grid(color="#dddddd", linewidth=0.6)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  for suffix in ("png", "svg"):
    figure.savefig(workdir / f"loss.{suffix}", dpi=160)
  return True


def _smooth(values: list[float]) -> list[float]:
  """The mean over a centred window of a thirtieth of the run, narrower towards both ends."""
  reach = len(values) // 60
  out = []
  for i in range(len(values)):
    r = min(reach, i, len(values) - 1 - i)
    out.append(sum(values[i - r : i + r + 1]) / (2 * r + 1))
  return out
