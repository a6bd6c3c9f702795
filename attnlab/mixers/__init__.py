"""Sequence mixers: attention of every kind, one file each."""

from attnlab.mixers.base import (
  Context,
  Layer,
  Mixer,
  MixerOutput,
  configure,
  mix,
  mixer,
  mixers,
  register,
)

__all__ = [
  "Context",
  "Layer",
  "Mixer",
  "MixerOutput",
  "configure",
  "mix",
  "mixer",
  "mixers",
  "register",
]
