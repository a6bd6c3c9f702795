"""What all tests share: eight virtual devices, no accelerator, runtime checks of array shapes."""

import os

# Before jax starts: its flags are read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
