"""A process that compiles, one program after the other, and may die of it."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator


def environment(extra: dict[str, str]) -> dict[str, str]:
  """This process's environment, in which modules of this repository are found, with more."""
  root = str(pathlib.Path(__file__).resolve().parents[2])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
  return os.environ | {"PYTHONPATH": path} | extra


class Child:
  """``python -m pallas_kernels.cost --child ...`` and its answers; it ends with the ``with``."""

  def __init__(self, arguments: list[str], env: dict[str, str], timeout: float):
    self._stderr = tempfile.TemporaryFile("w+")
    self._timeout = timeout
    command = [sys.executable, "-m", "pallas_kernels.cost", "--child", *arguments]
    out, err = subprocess.PIPE, self._stderr
    self._process = subprocess.Popen(command, env=env, stdout=out, stderr=err, text=True)
    self._clock = self._killed_later()

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._clock.cancel()
    self._process.kill()
    self._process.wait()
    self._stderr.close()

  def _killed_later(self) -> threading.Timer:
    timer = threading.Timer(self._timeout, self._process.kill)
    timer.daemon = True
    timer.start()
    return timer

  def answers(self) -> Iterator[tuple[str, dict]]:
    """(name, answer) of each program, up to the process's end. The timeout is for each."""
    for line in self._process.stdout:
      if line.startswith("RESULT "):
        self._clock.cancel()
        self._clock = self._killed_later()
        answer = json.loads(line[len("RESULT ") :])
        yield answer.pop("name"), answer
    self._process.wait()

  def last_words(self) -> str:
    """One line of what the process said before it died."""
    self._stderr.seek(0)
    text, code = self._stderr.read(), self._process.returncode
    how = f"the compiler ended with {signal.Signals(-code).name if code < 0 else f'exit {code}'}"
    hits = re.findall(r"(?:Check failed|RET_CHECK failure|INTERNAL:|F\d{4} [\d:.]+ +\d+ ).*", text)
    lines = hits or [
      line
      for line in text.splitlines()
      if line.strip() and not re.search("TPU_ACCELERATOR_TYPE|symbolize", line)
    ]
    return f"{how}: {lines[0].strip()[:200]}" if lines else how


def serve(names: list[str], compile_one: Callable[[str], list[dict]]) -> None:
  """The child's side: compiles the programs, a line of JSON on stdout for each."""
  for name in names:
    try:
      answer = {"rows": compile_one(name)}
    except Exception as error:
      text = str(error).strip() or type(error).__name__
      answer = {"error": f"{type(error).__name__}: {text.splitlines()[0]}"}
    print("RESULT " + json.dumps({"name": name} | answer), flush=True)
