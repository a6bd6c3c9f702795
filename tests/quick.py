"""Compiling for tests: what is compiled is used once, and most of XLA's time on a CPU is LLVM's optimisations."""

import functools

import jax

FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)
