"""Frequencies of RoPE for texts longer than a model was first trained on."""

import math

import numpy as np
from jaxtyping import Float32

# What changes frequencies: (kind, factor, length, low, high). A pair that turns less than ``low`` times within
# ``length`` tokens, those of the first training, turns ``factor`` times as slowly; one that turns more than ``high``
# times stays as it is. Between them: "llama3" (arXiv:2407.21783) goes over linearly in the number of turns, "yarn"
# (arXiv:2309.00071) in the number of the pair, from a whole one to a whole one.
Scaling = tuple[str, float, int, float, float]


def scaled(theta: float, rotated: int, scaling: Scaling) -> Float32[np.ndarray, " half"]:
  """Radians a token of each pair of ``rotated`` channels.

  Raises:
    ValueError: a kind that is not known.
  """
  kind, factor, length, low, high = scaling
  pair = np.arange(rotated // 2)
  plain = theta ** (-2 * pair / rotated)
  if kind == "llama3":
    kept = (length * plain / (2 * math.pi) - low) / (high - low)
  elif kind == "yarn":
    first = max(math.floor(_pair(high, theta, rotated, length)), 0)
    last = min(math.ceil(_pair(low, theta, rotated, length)), rotated - 1)
    kept = 1 - (pair - first) / max(last - first, 1e-3)
  else:
    raise ValueError(f"scaling of frequencies is 'llama3' or 'yarn', not {kind!r}")
  kept = np.clip(kept, 0, 1)
  return np.float32(plain * (kept + (1 - kept) / factor))


def _pair(turns: float, theta: float, rotated: int, length: int) -> float:
  """The number, not whole, of the pair that turns so many times within ``length`` tokens."""
  return rotated * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))
