"""What pre-commit asks of a commit is asked of the tree: ruff, of one version everywhere."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
  done = subprocess.run(
    [sys.executable, "-m", "ruff", *command, "--no-cache", "--quiet", "."],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, f"ruff {' '.join(command)}:\n{done.stdout}{done.stderr}"


def test_ruff_is_the_same_in_pre_commit_and_here():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  (here,) = re.findall(r"^ruff==(.+)$", config["options.extras_require"]["test"], re.MULTILINE)
  text = (ROOT / ".pre-commit-config.yaml").read_text()
  assert re.search(r"ruff-pre-commit\n\s+rev: v(\S+)", text).group(1) == here
