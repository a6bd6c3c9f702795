"""What all tests share: eight virtual devices, no accelerator, test groups that stay together."""

import os

import jax
import pytest

# Before jax starts its backend: flags are read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Pallas's interpreter calls Python from within programs: what that computes must not wait for a
# thread that the program holds.
jax.config.update("jax_cpu_enable_async_dispatch", False)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
  """Tests of one xdist_group run on one worker (--dist loadgroup): they share what is compiled. Long ones may be long.

  pytest-xdist 3.8 writes a test's group into `_nodeid`; pytest 9.2 reads node ids from `_id`, so
  that the groups are lost without this.
  """
  for item in items:
    if any(item.iter_markers("slow")) or any(item.iter_markers("compile")):
      item.add_marker(pytest.mark.timeout(0))
    grouped = getattr(item, "_nodeid", item.nodeid)
    if grouped != item.nodeid:
      item._id = type(item._id).parse(grouped)
