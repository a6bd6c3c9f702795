"""What all tests share: eight virtual devices, no accelerator, test groups that stay together."""

import gc
import os
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

# Before jax starts its backend: flags are read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older emitters of fusions and one piece of code a program compile four times as fast, to code as good as the
# tests need: what is compiled is used once, and compiling is most of the time of most tests.
FAST = (
  "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
  " --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", FAST]
)
# Tracing makes many objects, nearly all of use: looking for garbage among them every 700 takes time and finds little.
gc.set_threshold(200_000, 50, 100)
# What looks for it all the same (jax's interpreters of kernels, now and then) need not look through what it has found
# alive before: nearly all of that is compiled programs, and going through those takes seconds each time.
gc.callbacks.append(
  lambda phase, info: gc.freeze() if phase == "stop" and info["generation"] == 2 else None
)
# Pallas's interpreter calls Python from within programs: what that computes must not wait for a
# thread that the program holds.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_disable_most_optimizations", True)


def typed_modules() -> list[str]:
  """Modules that write shapes in signatures, but for those whose dataclasses are pytrees: jax makes these of anything,
  not of arrays alone."""
  root = Path(__file__).parent.parent
  files = [f for top in ("attnlab", "pallas_kernels") for f in sorted((root / top).rglob("*.py"))]
  text = {f: f.read_text() for f in files}
  return [
    ".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    for f in files
    if "from jaxtyping import" in text[f] and "@jax.tree_util.register_dataclass" not in text[f]
  ]


# Shapes and dtypes in signatures hold: calls are checked against them while they are traced. Functions take numpy's
# arrays as jax's own do. ATTNLAB_TYPED=1 checks every module's.
TYPED = ("losses", "mixers.linear", "model", "moe", "nn")
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook(
  typed_modules() if "ATTNLAB_TYPED" in os.environ else [f"attnlab.{name}" for name in TYPED],
  "typed.check",
)


@pytest.fixture(scope="session")
def one_device():
  """Environment of a process on one device that compiles as the tests do."""
  return {"XLA_FLAGS": FAST, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(autouse=True)
def what_is_refused(request):
  """Tests of errors are of the functions' own checks, which stand behind those of their signatures."""
  jaxtyping.config.update("jaxtyping_disable", "raises" in request.function.__code__.co_names)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


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
