"""What all tests share: eight virtual devices, no accelerator, runtime checks of array shapes."""

import os

import pytest

# Before jax starts: its flags are read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Tests of one xdist_group run on one worker: they share what is compiled."""
  from xdist.scheduler import LoadGroupScheduling

  return LoadGroupScheduling(config, log)
