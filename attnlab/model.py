"""The language model: embed -> scan over superblocks -> norm -> logits; training, prefill and decoding.

A superblock is one period of the layer pattern, so that a hybrid is one scan too. Layers that do not fill a period, and
leading layers with a dense MLP before a mixture of experts, stand outside it. Modules are pytrees: plain jax.jit,
jax.grad, jax.lax.scan and jax.checkpoint apply.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnlab import sharding
from attnlab.errors import UserError, unknown
from attnlab.losses import cross_entropy
from attnlab.mixers import Context, Layer, Mixer, configure, mix, mixer
from attnlab.moe import MoE
from attnlab.nn import RMSNorm, SwiGLU, param
from attnlab.pattern import LayerSpec, parse_pattern
from attnlab.settings import Range, check_ranges

Cache = dict[str, Any]

# What the backward pass keeps of a layer; the rest it computes again.
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

DTYPES = ("float32", "bfloat16")  # of activations

_RANGES = {
  **dict.fromkeys(("num_layers", "d_model", "mlp.expert_hidden", "mlp.top_k"), Range(least=1)),
  **dict.fromkeys(("mlp.groups", "mlp.top_groups"), Range(least=1)),
  **dict.fromkeys(("vocab_size", "z_loss", "mlp.hidden", "mlp.experts"), Range(least=0)),
  **dict.fromkeys(
    ("mlp.shared_experts", "mlp.balance", "mlp.bias_rate", "mlp.dense_layers"), Range(least=0)
  ),
  **dict.fromkeys(("norm_eps", "mlp.routed_scale"), Range(above=0)),
}


def check(config) -> None:
  """Raises UserError for the first thing in a ``model`` section that cannot work, as far as no layer need be built."""
  check_ranges("model", config, _RANGES)
  if config.remat not in REMAT:
    raise unknown("config.model.remat", config.remat, REMAT)
  if config.dtype not in DTYPES:
    raise unknown("config.model.dtype", config.dtype, DTYPES)
  pattern = parse_pattern(config.pattern)
  for spec in pattern.period + pattern.tail:
    mixer_config(config, spec)
  if config.mlp.experts and not config.mlp.hidden:
    raise UserError(
      f"config.model.mlp.hidden = 0 is a model without MLPs, and config.model.mlp.experts = {config.mlp.experts} would"
      " be left out: give hidden a size, or set experts to 0"
    )
  if config.mlp.dense_layers + len(pattern.tail) > config.num_layers:
    raise UserError(
      f"config.model.num_layers = {config.num_layers} is less than the pattern's last"
      f" {len(pattern.tail)} layers and the {config.mlp.dense_layers} of config.model.mlp.dense_layers"
    )


class Block(nnx.Module):
  """One layer: ``x += mixer(norm(x)); x += mlp(norm(x))``."""

  def __init__(self, config, spec: LayerSpec, layer: Layer, dense: bool, key: Array):
    mix, mlp = jax.random.split(key)
    cls = mixer(spec.mixer)
    self.mixer_norm = RMSNorm(layer.d_model, layer.norm_eps)
    self.mixer = cls(mixer_config(config, spec), layer, mix)
    m = config.mlp
    self.mlp_norm = RMSNorm(layer.d_model, layer.norm_eps) if m.hidden else None
    self.mlp: SwiGLU | MoE | None
    if not m.hidden:
      self.mlp = None  # mixers alone, as in synthetic benchmarks
    elif dense or not m.experts:
      self.mlp = SwiGLU(mlp, layer.d_model, m.hidden)
    else:
      self.mlp = MoE(
        mlp,
        layer.d_model,
        m.expert_hidden,
        experts=m.experts,
        top_k=m.top_k,
        shared=m.shared_experts,
        router=m.router,
        scale=m.routed_scale,
        balance=m.balance,
        shared_gate=m.shared_gate,
        bias_rate=m.bias_rate,
        groups=m.groups,
        top_groups=m.top_groups,
      )

  def __call__(self, x: Float[Array, "B T D"], ctx: Context, cache: Cache | None):
    out = mix(self.mixer, self.mixer_norm(x), ctx, cache)
    x = x + out.y
    aux = dict(out.aux)
    if self.mlp is not None and self.mlp_norm is not None:
      y = self.mlp_norm(x)
      if isinstance(self.mlp, MoE):
        y, router = self.mlp(y, None if ctx.segment_ids is None else ctx.segment_ids > 0)
        aux |= router
      else:
        y = self.mlp(y)
      x = x + y
    return x, out.cache, aux, ctx.shared | out.shared


class Superblock(nnx.Module):
  """One period of the pattern."""

  def __init__(self, config, specs: tuple[LayerSpec, ...], layer: Layer, key: Array):
    keys = jax.random.split(key, len(specs))
    self.layers = nnx.List(
      Block(config, spec, dataclasses.replace(layer, index=layer.index + i), False, k)
      for i, (spec, k) in enumerate(zip(specs, keys, strict=True))
    )


def layer_specs(config) -> list[LayerSpec]:
  """The spec of each layer."""
  pattern = parse_pattern(config.pattern)
  repeated = range(config.num_layers - len(pattern.tail))
  return [*(pattern.period[i % len(pattern.period)] for i in repeated), *pattern.tail]


def scanned(config) -> tuple[int, int, int]:
  """Layers before the scan, superblocks in it, and layers of a superblock; the layers that are left come after it."""
  pattern = parse_pattern(config.pattern)
  lead, period = config.mlp.dense_layers if config.mlp.experts else 0, len(pattern.period)
  return lead, (config.num_layers - lead - len(pattern.tail)) // period, period


def mixer_config(config, spec: LayerSpec) -> Any:
  """The settings of a mixer: its defaults, the config's, the layer's own."""
  cls = mixer(spec.mixer)
  return configure(cls, dict(config.mixers.get(cls.name, {})) | dict(spec.settings))


class Model(nnx.Module):
  """A decoder of tokens.

  Args:
    config: the ``model`` section of a config, vocab_size resolved (configs/base.py documents it).
    key: a PRNG key.
  """

  def __init__(self, config, key: Array):
    check(config)
    pattern = parse_pattern(config.pattern)
    specs, L, D = pattern.period, config.num_layers, config.d_model
    if config.vocab_size < 1:
      raise UserError(f"config.model.vocab_size = {config.vocab_size} must be at least 1")
    self.dtype = config.dtype
    self.remat, self.z_loss, self.d_model = config.remat, config.z_loss, D
    self.dense = config.dense  # at call time: the weights are the same
    self.shared = tuple(sorted(_shared(config, specs + pattern.tail).items()))
    keys = jax.random.split(key, 5)
    init = jax.nn.initializers.normal(D**-0.5)
    vocabulary = ((config.vocab_size, D), ("vocab", "embed"))
    self.embedding = param(keys[0], init, *vocabulary, weight_decay=False)
    tied = config.tie_embeddings
    self.head = None if tied else param(keys[1], init, *vocabulary, weight_decay=False)
    self.norm = RMSNorm(D, config.norm_eps)

    lead, periods, P = scanned(config)
    after = lead + periods * P
    every = layer_specs(config)
    layer = Layer(D, 0, L, config.norm_eps)

    def block(i, key, dense):
      return Block(config, every[i], dataclasses.replace(layer, index=i), dense, key)

    def outside(key, indices, dense):
      return nnx.List(block(i, jax.random.fold_in(key, i), dense) for i in indices)

    self.lead = outside(keys[2], range(lead), True)
    self.tail = outside(keys[3], range(after, L), False)
    turned = specs[lead % P :] + specs[: lead % P]  # the period as it goes on after the lead
    starts = lead + P * jnp.arange(periods)
    stack = jax.vmap(
      lambda i, k: Superblock(config, turned, dataclasses.replace(layer, index=i), k)
    )
    self.blocks = stack(starts, jax.random.split(keys[4], periods)) if periods else None

  # The three ways through the layers.

  def loss(self, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """The training loss of a batch (attnlab.data): weighted mean of nll, plus z-loss and the layers' own losses.

    With "labels" [B, K], positions of the row, it is the loss of the targets there.

    Returns:
      The loss, and metrics: nll (nats), accuracy, both means by weight; weight; the layers' scalars.
    """
    nll, lse, correct, w, aux = self.scores(batch)
    weight = w.sum()
    mean = lambda y: (w * y).sum() / jnp.maximum(weight, 1e-9)  # noqa: E731
    metrics = {"nll": mean(nll), "accuracy": mean(correct), "weight": weight} | aux
    loss = metrics["nll"] + sum(v for k, v in aux.items() if k.endswith("_loss"))
    if self.z_loss:
      loss += self.z_loss * mean(lse**2)
    return loss, metrics

  def scores(self, batch: dict[str, Array]) -> tuple[Array, Array, Array, Array, dict[str, Array]]:
    """Of every target, or with "labels" those alone: nll, log Z, whether it is right, weight, each [B, T] or [B, K];
    and the layers' scalars."""
    x, aux = self._through(batch)
    targets, w = batch["targets"], batch["weights"]
    if "labels" in batch:  # no logits where nothing is to be predicted
      every = sharding.whole_rows(x), targets, w
      x, targets, w = (sharding.take(y, batch["labels"]) for y in every)
      nll, lse, correct = cross_entropy(x, self._head(), targets)
    else:
      nll, lse, correct = self._cross_entropy(x, targets)
    nll, lse, correct, w = (sharding.put(y, "rows", None) for y in (nll, lse, correct, w))
    return nll, lse, correct, w, aux

  def token_nll(self, batch: dict[str, Array]) -> Float[Array, "B T"]:
    """The loss of each target in nats, whatever its weight."""
    x, _ = self._through(batch)
    return sharding.put(self._cross_entropy(x, batch["targets"])[0], "rows", None)

  def forward(
    self,
    inputs: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Logits of every token, float32."""
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    ctx = Context(positions, segment_ids, dense=self.dense)
    x, _, _ = self._layers(self._embed(inputs), ctx, None)
    return self._logits(x)

  def prefill(
    self, tokens: Int[Array, "B T"], cache: Cache, segment_ids: Int[Array, "B T"] | None = None
  ) -> tuple[Float[Array, "B V"], Cache]:
    """Reads prompts into a cache.

    Args:
      tokens: the prompts, or their continuation; shorter ones are padded on the left.
      cache: of ``init_cache`` or of an earlier call.
      segment_ids: 0 on padding, 1 on the prompt; None: no padding.

    Returns:
      Logits of the last token, and the cache.
    """
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    real = (segment_ids > 0).astype(jnp.int32)
    positions = jnp.maximum(cache["position"][:, None] + jnp.cumsum(real, axis=1) - 1, 0)
    layers = {k: v for k, v in cache.items() if k != "position"}
    ctx = Context(positions, segment_ids, dense=self.dense)
    x, layers, _ = self._layers(self._embed(tokens), ctx, layers)
    position = cache["position"] + real.sum(axis=1)
    return self._logits(x[:, -1:])[:, 0], layers | {"position": position}

  def decode_step(
    self, tokens: Int[Array, " B"], cache: Cache
  ) -> tuple[Float[Array, "B V"], Cache]:
    """One more token of every sequence: its logits and the cache after it."""
    return self.prefill(tokens[:, None], cache)

  def init_cache(self, batch: int, max_len: int) -> Cache:
    """Empty caches of all layers, for sequences of up to ``max_len`` tokens; jax.eval_shape of it is their spec."""

    def new(blocks):
      return [b.mixer.init_cache(batch, max_len, jnp.dtype(self.dtype)) for b in blocks]

    cache: Cache = {"position": jnp.zeros(batch, jnp.int32)}
    cache["lead"] = new(self.lead)
    cache["tail"] = new(self.tail)
    if self.blocks is not None:
      cache["blocks"] = jax.vmap(lambda superblock: new(superblock.layers))(self.blocks)
    return cache

  def mixers(self) -> Iterator[tuple[Mixer, int]]:
    """Every mixer that is built, and how many layers it stands for: in the scan, one for all superblocks."""
    for block in (*self.lead, *self.tail):
      yield block.mixer, 1
    if self.blocks is not None:
      for block in self.blocks.layers:
        yield block.mixer, len(jax.tree.leaves(block.mixer_norm)[0])

  # What they share.

  def _through(self, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """All layers over a batch, of rows in parts where the mesh shares them (``sharding.split_rows``)."""
    tokens, positions, ids = (
      sharding.split_rows(batch[name]) for name in ("inputs", "positions", "segment_ids")
    )
    ctx = Context(positions, ids, dense=self.dense, parts=sharding.size("context"))
    x, _, aux = self._layers(self._embed(tokens), ctx, None)
    return x, aux

  def _cross_entropy(self, x: Array, targets: Int[Array, "B T"]) -> list[Float[Array, "B T"]]:
    """Of what ``_through`` gives."""
    scores = cross_entropy(x, self._head(), sharding.split_rows(targets))
    return [sharding.whole_rows(y) for y in scores]

  def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    # Unit variance at the start, whether or not the same rows make the logits.
    table = self.embedding[...] * self.d_model**0.5
    return sharding.look_up(table, tokens, self.dtype)

  def _head(self) -> Float[Array, "V D"]:
    return (self.embedding if self.head is None else self.head)[...]

  def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    head = sharding.put(self._head(), None, None).astype(x.dtype)
    return jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)

  def _layers(self, x: Array, ctx: Context, cache: Cache | None):
    """All layers and the last norm: x, the new cache, and the mean over layers of each auxiliary scalar."""
    shapes = {k: (*x.shape[:2], *shape) for k, shape in self.shared}
    dtype = lambda name: jnp.int32 if name.endswith("_ids") else x.dtype  # noqa: E731
    shared = {k: sharding.zeros(shape, dtype(k)) for k, shape in shapes.items()}
    collected: dict[str, list[Array]] = {}

    def apply(block: Block, x, shared, cache):
      ctx_here = dataclasses.replace(ctx, shared=shared)
      run = lambda block, x, ctx, cache: block(x, ctx, cache)  # noqa: E731
      if cache is None and REMAT[self.remat] is not None:
        run = jax.checkpoint(run, policy=REMAT[self.remat])
      return run(block, x, ctx_here, cache)

    def through(blocks, x, shared, caches):
      """Some layers in turn."""
      new, scalars = [], {}
      for i, block in enumerate(blocks):
        x, c, aux, shared = apply(block, x, shared, caches and caches[i])
        new.append(c)
        for k, v in aux.items():
          scalars.setdefault(k, []).append(v)
      return x, shared, (None if caches is None else new), scalars

    def collect(scalars):
      for k, v in scalars.items():
        collected.setdefault(k, []).extend(jnp.ravel(a) for a in v)

    new: Cache = {}
    x, shared, new["lead"], scalars = through(self.lead, x, shared, cache and cache["lead"])
    collect(scalars)
    if self.blocks is not None:

      def body(carry, xs):
        superblock, caches = xs
        x, shared, caches, scalars = through(superblock.layers, *carry, caches)
        return (x, shared), (caches, scalars)

      xs = (self.blocks, None if cache is None else cache["blocks"])
      (x, shared), (new["blocks"], scalars) = jax.lax.scan(body, (x, shared), xs)
      collect(scalars)
    x, shared, new["tail"], scalars = through(self.tail, x, shared, cache and cache["tail"])
    collect(scalars)
    aux = {k: jnp.concatenate(v).mean() for k, v in collected.items()}
    return self.norm(x), (None if cache is None else new), aux


def _shared(config, specs: tuple[LayerSpec, ...]) -> dict[str, tuple[int, ...]]:
  """What layers of the pattern hand on to later ones: name -> shape after [B, T]."""
  out: dict[str, tuple[int, ...]] = {}
  for spec in specs:
    cls = mixer(spec.mixer)
    for name, shape in cls.shared(mixer_config(config, spec), config.d_model).items():
      if out.setdefault(name, shape) != shape:
        raise UserError(f"layers of pattern {config.pattern!r} disagree on the shape of {name!r}")
  return out
