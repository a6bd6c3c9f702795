"""The router of Mixture-of-Memories: which memories, with what weights, and its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.errors import UserError
from attnlab.mixers import Context, Layer, configure, mixer
from attnlab.mixers.linear import Recent

B, T, D, M = 2, 9, 32, 5


def layer(**settings):
  cls = mixer("mom")
  sizes = dict(num_heads=2, head_dim=8, value_dim=6, memories=M, top_k=2)
  return cls(configure(cls, sizes | settings), Layer(D), jax.random.key(0))


def test_router():
  """The two most probable of five, their weights' sum 1, and the shared one's 1; the balance loss of Switch."""
  mom = layer(balance=0.5)
  x = jax.random.normal(jax.random.key(1), (B, T, D))
  ctx = Context(jnp.broadcast_to(jnp.arange(T), (B, T)))
  signals = mom.signals(x, Recent(mom, ctx, None), ctx)
  logits = np.asarray(x, np.float64).reshape(-1, D) @ np.asarray(mom.router.kernel[...], np.float64)
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  route, load = np.zeros((B * T, M + 1)), np.zeros(M)
  for t, probability in enumerate(p):
    best = np.argsort(-probability)[:2]
    route[t, best] = probability[best] / probability[best].sum()
    route[t, M] = 1
    load[best] += 1 / (2 * B * T)
  for head in range(2):
    got = signals["route"][:, :, head].reshape(-1, M + 1)
    np.testing.assert_allclose(got, route, rtol=1e-5, atol=1e-6)
  aux = mom(x, ctx).aux
  np.testing.assert_allclose(aux["memory_balance_loss"], 0.5 * M * load @ p.mean(0), rtol=1e-5)
  np.testing.assert_allclose(aux["memory_load_max"], M * load.max(), rtol=1e-5)


def test_more_than_there_are():
  with pytest.raises(UserError, match="top_k=6 of memories=5"):
    layer(top_k=6)
  with pytest.raises(UserError, match="as many heads of values as of keys"):
    layer(num_value_heads=4)
