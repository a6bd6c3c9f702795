"""The annotations of the public API and of the programs hold together; setup.cfg lists the files."""

import subprocess
import sys
from pathlib import Path


def test_mypy():
  run = subprocess.run(
    [sys.executable, "-m", "mypy"], cwd=Path(__file__).parent.parent, capture_output=True, text=True
  )
  assert run.returncode == 0, run.stdout + run.stderr
