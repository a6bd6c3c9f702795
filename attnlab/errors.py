"""Errors that a user can cause, and that are told in one line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """Bad input: a config, data, a checkpoint or shapes. The message says what is wrong and what would be right."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
  """An error for a name that is not known, with the nearest known ones first.

  Args:
    what: what the name is of, as it stands in a sentence ("config key", "mixer").
    name: the name that was asked for.
    known: all names that would have been right.
  """
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
  return UserError(f"unknown {what} {name!r}: {hint}known: {', '.join(known) or 'none'}")
