"""Which sources run: what is measured is theirs."""

import contextlib
import functools
import pathlib
import subprocess


@functools.cache
def commit(*folders: str) -> str | None:
  """12 digits of it, and "-dirty" where one of the folders, beside this package, differs from it; None: not known."""

  def git(*args: str) -> subprocess.CompletedProcess[str]:
    where = pathlib.Path(__file__).resolve().parent.parent
    return subprocess.run(["git", *args], cwd=where, capture_output=True, text=True)

  with contextlib.suppress(OSError):
    if name := git("rev-parse", "--short=12", "HEAD").stdout.strip():
      return name + ("-dirty" if git("diff", "--quiet", "HEAD", "--", *folders).returncode else "")
  return None
