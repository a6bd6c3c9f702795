"""Other libraries' GPU kernels on the same numbers, and clocks of them. What cannot be imported raises and says so."""

import concurrent.futures
import contextlib
import functools
import gc
import os
import sys
from collections.abc import Callable


def prepare(peer: Callable[[tuple], Callable], args: tuple) -> Callable[[tuple], Callable]:
  """Compiles a peer by calling it; then, of arguments: seconds of the kernels of a call, by the clock of ours.

  Of all configurations of its autotuners: while other processes keep the GPU busy none is timed.
  """
  call = peer(args)
  forget(_once)
  with _compiling_side_by_side():
    call()
  _synchronize()
  return functools.partial(_start, peer)


def _start(peer: Callable[[tuple], Callable], args: tuple) -> Callable[[], float]:
  from pallas_kernels import bench_gpu

  call = peer(args)
  forget(_briefly)
  call()  # tunes; what it compiled before is on disk
  _synchronize()

  def run():
    call()
    _synchronize()

  return bench_gpu.KernelClock(run)


def _synchronize() -> None:
  import torch

  torch.cuda.synchronize()


@contextlib.contextmanager
def _compiling_side_by_side():
  """All configurations of Triton's autotuners at once, a thread each: gradients of KDA have hundreds of seconds of
  them."""
  try:
    from triton.runtime import _async_compile
    from triton.runtime.autotuner import Autotuner
  except ImportError:  # no Triton, or one that compiles them one after the other
    yield
    return
  run = Autotuner.run

  def both(self, *args, **kwargs):
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:  # what does not compile, the tuner finds for itself
      with _async_compile.AsyncCompileMode(pool, ignore_errors=True):
        self.warmup(*args, **{name: x for name, x in kwargs.items() if name != "warmup"})
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
      _async_compile.active_mode.set(None)  # which it leaves where it is given up
    return run(self, *args, **kwargs)

  Autotuner.run = both
  try:
    yield
  finally:
    Autotuner.run = run


def _once(call: Callable, quantiles, **_) -> list[float]:
  """A Triton autotuner's clock: calls, and times nothing."""
  call()
  return [1.0 for _ in quantiles]


def _briefly(call: Callable, quantiles, **_) -> list[float]:
  """For a quarter as long as by default: 25 ms, some 50 calls, of each of hundreds of configurations."""
  from triton.testing import do_bench

  return do_bench(call, quantiles=quantiles, warmup=5, rep=25)


def forget(clock: Callable) -> None:
  """What Triton's autotuners have chosen; from now on they do so by this clock."""
  if "triton" in sys.modules:
    from triton.runtime.autotuner import Autotuner

    for tuner in gc.get_objects():
      if issubclass(type(tuner), Autotuner):  # isinstance asks proxies of what is no more
        tuner.cache.clear()
        tuner.do_bench = clock


def free() -> None:
  """Gives the memory that torch keeps for itself to whoever comes next."""
  gc.collect()
  if "torch" in sys.modules:
    import torch

    torch.cuda.empty_cache()


def _tensor(x):
  import torch

  return torch.from_dlpack(x).clone()


def _recurrent(s, r) -> dict:
  """fla's arguments of a recurrence."""
  tensors = {"q": _tensor(r.q), "k": _tensor(r.k), "v": _tensor(r.v)}
  tensors["g"] = _tensor(r.log_decay if s.decay == "channel" else r.log_decay[..., 0])
  if s.erase == "key":
    tensors["beta"] = _tensor(r.erase.beta)
  return tensors


def recurrence(s, whole: bool, args: tuple) -> Callable[[], None]:
  """fla's chunked kernel of a recurrence, with gradients if ``whole``."""
  import torch

  if s.erase == "none":
    from fla.ops.simple_gla import chunk_simple_gla as op
  elif s.decay == "channel":
    from fla.ops.kda import chunk_kda as op
  else:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as op
  tensors = _recurrent(s, *args)
  for x in tensors.values():
    x.requires_grad_(whole)
  do = torch.randn_like(tensors["v"])

  def call():
    with contextlib.nullcontext() if whole else torch.no_grad():
      o, _ = op(**tensors, scale=1.0)
      if whole:
        torch.autograd.grad(o, list(tensors.values()), do)

  return call


def step(s, tokens: int, args: tuple) -> Callable[[], None]:
  """fla's kernel of one token, so many times, from a float32 state."""
  import torch

  if s.erase == "none":
    from fla.ops.simple_gla import fused_recurrent_simple_gla as op
  elif s.decay == "channel":
    from fla.ops.kda import fused_recurrent_kda as op
  else:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule as op
  r, state = args
  tensors, initial = _recurrent(s, r), _tensor(state)

  def call():
    S = initial
    with torch.no_grad():
      for _ in range(tokens):
        _, S = op(**tensors, scale=1.0, initial_state=S, output_final_state=True)

  return call


def nsa(s, whole: bool, args: tuple) -> Callable[[], None]:
  """fla's NSA, its selected branch alone."""
  import torch

  try:
    from fla.ops.nsa import parallel_nsa as op
  except ImportError:
    from native_sparse_attention.ops.parallel import parallel_nsa as op
  q, k, v = (_tensor(x).requires_grad_(whole) for x in args[:3])
  indices = _tensor(args[3]).transpose(1, 2).contiguous().long()
  one = torch.ones(q.shape[:3], dtype=q.dtype, device=q.device)
  do = torch.randn(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)

  def call():
    with contextlib.nullcontext() if whole else torch.no_grad():
      o = op(
        q=q,
        k=k,
        v=v,
        g_slc=one,
        block_indices=indices,
        block_counts=s.top_k,
        block_size=s.block_size,
      )
      if whole:
        torch.autograd.grad(o, (q, k, v), do)

  return call
