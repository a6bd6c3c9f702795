"""Short names of contents: of sources of data, tokenizers and examples."""

import hashlib
from typing import Any

import numpy as np


def digest(*parts: Any) -> str:
  """A short digest of strings, numbers, bytes and arrays, the same on every machine."""
  h = hashlib.blake2b(digest_size=16)
  for part in parts:
    if isinstance(part, np.ndarray):
      part = part.tobytes()
    data = part if isinstance(part, bytes) else str(part).encode("utf-8", "replace")
    h.update(len(data).to_bytes(8, "little") + data)
  return h.hexdigest()
