"""One chunk of one head, as the TPU kernels compute it: arrays in registers and VMEM, two axes each.

The mathematics is that of ``xla.py``. What differs is what a TPU wants: products of 128 x 128 and few
of them (rows that meet the same matrix are stacked), the state transposed (its decay is then a row
that broadcasts over sublanes), and columns of gates spread over all lanes once (so that their
gradients add up elementwise, and are summed over lanes once).

Everything here is differentiated by ``jax.vjp`` inside the backward kernel. The functions with a rule
of their own have it to choose the form of a product, or to drop work that AD cannot see is none.

Precision: with bfloat16 inputs a product takes one pass of the matrix unit (operands rounded to
bfloat16, sums in float32), with float32 inputs the six passes of HIGHEST. Cumulative decays and the
triangular inverse never see operands of eight bits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))

# Rows of the blocks on the diagonal that the inverse substitutes row by row. With 32, and a product less in the chain,
# Qwen3-Next takes 644 bundles forward and 1210 backward per 128 tokens and head on v6e, with 16 it takes 526 and 958: a
# row is a broadcast and a gather that wait for the row before.
_BASE = 16


# --- products ---


def _product(a: Array, b: Array, form, precision=None) -> Array:
  dimensions = (form, ((), ()))
  return jax.lax.dot_general(
    a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def _parts(x: Array, count: int) -> list[Array]:
  """``x`` as a sum of bfloat16 arrays, eight bits more with each."""
  parts = []
  for _ in range(count):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return parts


def dot3(a: Array, b: Array) -> Array:
  """``a b`` in three passes: 16 bits of each operand. One product three times as deep: sums stay in the matrix unit.

  What the triangular inverse needs and nothing else does. Its relative error, of 128 rows, in one pass, three and
  six: 8e-3, 1e-5 and 2e-7 with keys of correlation 0.5 and beta 1; 4e-2, 1e-4 and 1e-6 with 0.9 and 1.9. Rounding the
  exact inverse to bfloat16 costs 1e-3. One pass would save a quarter of Qwen3-Next's forward bundles on v6e (395
  against 526) and a tenth of the backward's (873 against 958).
  """
  (ah, al), (bh, bl) = _parts(a, 2), _parts(b, 2)
  return _product(jnp.concatenate([ah, ah, al], axis=1), jnp.concatenate([bh, bl, bh]), NN)


def dot_ones(x: Array, ones: Array, *, left: bool = False, parts: int = 3) -> Array:
  """``x @ ones`` (``ones @ x`` if left) for a matrix of zeros and ones: exact products of ``parts`` x 8 bits."""
  ones = ones.astype(jnp.bfloat16)
  return sum(_product(ones, p, NN) if left else _product(p, ones, NN) for p in _parts(x, parts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(a: Array, b: Array, form, exact: bool) -> Array:
  """``a b``, ``a b^T`` or ``a^T b`` (NN, NT, TN), in float32 if ``exact``, else in one pass."""
  if exact:
    return _product(a, b, form, jax.lax.Precision.HIGHEST)
  return _product(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), form)


def _dot_forward(a, b, form, exact):
  return dot(a, b, form, exact), (a, b)


def _dot_backward(form, exact, residuals, g):
  a, b = residuals
  if form == NN:
    return dot(g, b, NT, exact), dot(a, g, TN, exact)
  if form == NT:
    return dot(g, b, NN, exact), dot(g, a, TN, exact)
  return dot(b, g, NT, exact), dot(a, g, NN, exact)


dot.defvjp(_dot_forward, _dot_backward)


def _iota(shape, axis, block: int = 1):
  """Indices along an axis, or which block (of a power of two of indices) each is in."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis) >> (block.bit_length() - 1)


# --- the triangular system ---


def unit_lower_inverses(Ls: list[Float[Array, "C C"]], exact: bool) -> list[Float[Array, "C C"]]:
  """``(I + L)^-1`` for strictly lower triangular matrices ``L``; C is 16 times a power of two.

  Diagonal blocks of 16 rows by substitution in float32, all of them at once: side by side in lanes,
  a row of every block is one row. Then blocks are joined two by two as in ``triangular.py``, only
  the rows of the second of two blocks being computed. Each step is one of a long chain; what keeps
  the machine busy meanwhile is that several matrices go through it side by side.
  """
  C = Ls[0].shape[0]
  product = functools.partial(dot, form=NN, exact=True) if exact else dot3
  row, block = _iota((_BASE, C), 0), _iota((_BASE, C), 1, _BASE)
  eye = jnp.where(_iota((_BASE, C), 1) == block * _BASE + row, 1.0, 0.0)

  def pack(L):
    out = L[:_BASE]
    for b, rows in enumerate(_blocks(L, _BASE)[1:], 1):
      out = jnp.where(block == b, rows, out)
    return out

  packed = [pack(L) for L in Ls]
  Xs = [eye] * len(Ls)
  for s in range(_BASE - 1):  # rows up to s are done
    at = block * _BASE + s
    Xs = [
      X - jnp.take_along_axis(P, at, axis=1) * X[s : s + 1] for X, P in zip(Xs, packed, strict=True)
    ]
  Xs = [jnp.concatenate([jnp.where(block == b, X, 0.0) for b in range(C // _BASE)]) for X in Xs]
  h = _BASE
  while h < C:
    sees = _sees(C, h)
    halves = [_halves(X, h) for X in Xs]
    between = [
      jnp.where(sees, product(second, L), 0.0) for (_, second), L in zip(halves, Ls, strict=True)
    ]
    Xs = [
      _join(first, second - product(b, X), h)
      for (first, second), b, X in zip(halves, between, Xs, strict=True)
    ]
    h *= 2
  return Xs


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def solve(
  As: list[Float[Array, "C C"]],
  Rs: list[Float[Array, "C V"]],
  betas: list[Float[Array, "C C"] | None],
  exact: bool,
) -> list[Float[Array, "C V"]]:
  """``(I + beta A)^-1 (beta R)`` for strictly lower triangular A; ``beta`` of a row in all its lanes, or none (1)."""
  return _solve_forward(As, Rs, betas, exact)[0]


def _lanes(x: Array, n: int) -> Array:
  """``x``, which holds one value a row in all of its lanes, with ``n`` lanes."""
  W = x.shape[1]
  if n > W:
    x = jnp.concatenate([x] * -(-n // W), axis=1)
  return x if x.shape[1] == n else jnp.split(x, [n], axis=1)[0]


def _times(x: Array, rows: Array | None) -> Array:
  """``x`` with its rows scaled by what ``rows`` holds in all of its lanes; None: by one."""
  return x if rows is None else x * _lanes(rows, x.shape[1])


def _solve_forward(As, Rs, betas, exact):
  Xs = unit_lower_inverses([_times(A, b) for A, b in zip(As, betas, strict=True)], exact)
  systems = zip(Xs, Rs, betas, strict=True)
  Us = [dot(X, _times(R, beta), NN, exact) for X, R, beta in systems]
  return Us, (As, Rs, betas, Xs, Us)


def _solve_backward(exact, residuals, dUs):
  parts = [_solve_one_backward(exact, *x) for x in zip(*residuals, dUs, strict=True)]
  return tuple(list(x) for x in zip(*parts, strict=True))


def _solve_one_backward(exact, A, R, beta, X, U, dU):
  """Entries of A's gradient on and above the diagonal are not masked: what made A knows them zero."""
  dR = dot(X, dU, TN, exact)
  dL = -dot(dR, U, NT, exact)
  if beta is None:
    return dL, dR, None
  of_A, of_R = dL * A, dR * R
  if of_A.shape == of_R.shape:
    dbeta = of_A + of_R
  else:
    dbeta = of_A + jnp.where(_iota(of_A.shape, 1) == 0, jnp.sum(of_R, axis=1, keepdims=True), 0.0)
  return _times(dL, beta), _times(dR, beta), dbeta


solve.defvjp(_solve_forward, _solve_backward)


# --- comparing rows with columns under the decay between them ---


@jax.custom_vjp
def decay_matrix(
  column: Float[Array, "C C"], row: Float[Array, "1 C"], mask: Bool[Array, "C C"]
) -> Float[Array, "C C"]:
  """``exp(column_i - row_j)`` where the mask is set (the exponent is <= 0 there), else 0."""
  return jnp.exp(jnp.where(mask, column - row, -jnp.inf))


def _decay_matrix_forward(column, row, mask):
  D = decay_matrix(column, row, mask)
  return D, D


def _decay_matrix_backward(D, dD):
  change = dD * D
  return change, -jnp.sum(change, axis=0, keepdims=True), None


decay_matrix.defvjp(_decay_matrix_forward, _decay_matrix_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def compare_channels(
  rows: tuple[Array, ...],
  cols: tuple[Array, ...],
  decays: tuple[Float[Array, "C K"], ...],
  G: Float[Array, "C K"],
  masks: tuple[Bool[Array, "C C"], ...],
  base: int,
  exact: bool,
) -> tuple[tuple[Float[Array, "C C"], ...], ...]:
  """``sum_d rows_id cols_jd exp(decay_id - G_jd)`` where the rows' mask is set, for all rows with all columns.

  Rows come with a decay (or all with one) and a mask that lies on or below the diagonal. Rows of the second half of a
  block of 2 h tokens are compared with columns of the first half through the block's middle, which makes both factors
  <= 1. Blocks of ``base`` tokens on the diagonal go through theirs, which does not: decays must be bounded so that exp
  of base / 2 of them is a number.
  """
  return _compare_forward(rows, cols, decays, G, masks, base, exact)[0]


def _blocks(x: Array, h: int) -> list[Array]:
  return [x[s : s + h] for s in range(0, x.shape[0], h)]


def _halves(x: Array, h: int) -> tuple[Array, Array]:
  """All first halves, and all second halves, of the blocks of 2 h rows."""
  blocks = _blocks(x, h)
  return jnp.concatenate(blocks[0::2]), jnp.concatenate(blocks[1::2])


def _join(first: Array, second: Array, h: int) -> Array:
  """The inverse of ``_halves``."""
  pairs = zip(_blocks(first, h), _blocks(second, h), strict=True)
  return jnp.concatenate([x for pair in pairs for x in pair])


def _middle(G: Array, size: int, count: int) -> Array:
  """The cumulative decay at the middle of each block of ``size`` rows, ``count`` times each."""
  half = size // 2
  rows = [jnp.broadcast_to(b[half - 1 : half], (count, G.shape[1])) for b in _blocks(G, size)]
  return jnp.concatenate(rows)


def _levels(C: int, base: int) -> list[int]:
  levels = []
  while (C := C // 2) >= base:
    levels.append(C)
  return levels


def _sees(C: int, h: int) -> Bool[Array, "C/2 C"]:
  """Which columns the second halves of blocks of 2 h rows see."""
  shape = (C // 2, C)
  return _iota(shape, 1, h) == 2 * _iota(shape, 0, h)


def _near(C: int, base: int) -> Bool[Array, "C C"]:
  return _iota((C, C), 0, base) == _iota((C, C), 1, base)


def _factors(decays, G, base):
  """For each level (0: the blocks on the diagonal), factors of the rows and of the columns."""
  C = G.shape[0]
  middle = _middle(G, base, base)
  factors = {0: ([jnp.exp(d - middle) for d in decays], jnp.exp(middle - G))}
  for h in _levels(C, base):
    middle = _middle(G, 2 * h, h)
    rows = [jnp.exp(_halves(d, h)[1] - middle) for d in decays]
    factors[h] = rows, jnp.exp(middle - _halves(G, h)[0])
  return factors


def _operands(rows, cols, factors, h):
  """What a level multiplies: rows of second halves, columns of first halves (zeros between), stacked."""
  r, c = factors[h]
  r = r * (len(rows) // len(r))
  if h == 0:
    rows = [x * f for x, f in zip(rows, r, strict=True)]
    cols = [x * c for x in cols]
  else:
    rows = [_halves(x, h)[1] * f for x, f in zip(rows, r, strict=True)]
    cols = [_halves(x, h)[0] * c for x in cols]
    cols = [_join(x, jnp.zeros_like(x), h) for x in cols]
  return jnp.concatenate(rows), jnp.concatenate(cols), r, c


def _compare_forward(rows, cols, decays, G, masks, base, exact):
  C = G.shape[0]
  factors = _factors(decays, G, base)
  rs, cs, _, _ = _operands(rows, cols, factors, 0)
  near = _near(C, base)

  def tiles(Z):
    return [jnp.split(z, len(cols), axis=1) for z in jnp.split(Z, len(rows))]

  out = [[jnp.where(near, z, 0.0) for z in line] for line in tiles(dot(rs, cs, NT, exact))]
  for h in _levels(C, base):
    rs, cs, _, _ = _operands(rows, cols, factors, h)
    sees = _sees(C, h)
    for i, line in enumerate(tiles(dot(rs, cs, NT, exact))):
      for j, z in enumerate(line):
        first, second = _halves(out[i][j], h)
        out[i][j] = _join(first, jnp.where(sees, z, second), h)
  out = tuple(tuple(jnp.where(m, x, 0.0) for x in line) for m, line in zip(masks, out, strict=True))
  return out, (rows, cols, factors, masks)


def _compare_backward(base, exact, residuals, douts):
  """A decay enters as ``rows * exp(decay)``, so its gradient is that times the operand's; a column's, minus it.

  With the operands as the products saw them, rounded: then what rows gain is what columns lose to the
  last bit, and the gradient of a decay is no difference of two roundings.
  """
  rows, cols, factors, masks = residuals
  C = rows[0].shape[0]
  douts = [[jnp.where(m, d, 0.0) for d in line] for m, line in zip(masks, douts, strict=True)]

  def gather(pick):
    lines = [[pick(d) for d in line] for line in douts]
    lines = [x[0] if len(x) == 1 else jnp.concatenate(x, axis=1) for x in lines]
    return jnp.concatenate(lines)

  def through(h, dZ):
    """Gradients of operands and factors, of a level's rows (second halves) and of all columns."""
    rs, cs, r, c = _operands(rows, cols, factors, h)
    if not exact:
      rs, cs = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (rs, cs))
    back, forth = dot(dZ, cs, NN, exact), dot(dZ, rs, TN, exact)
    drows = [d * f for d, f in zip(jnp.split(back, len(rows)), r, strict=True)]
    dcols = jnp.split(forth, len(cols))
    return drows, dcols, c, jnp.split(back * rs, len(rows)), sum(jnp.split(forth * cs, len(cols)))

  near = _near(C, base)
  drows, dcols, c, ddecays, dG = through(0, gather(lambda d: jnp.where(near, d, 0.0)))
  dcols = [d * c for d in dcols]
  for h in _levels(C, base):
    sees = _sees(C, h)
    dZ = gather(lambda d, h=h, sees=sees: jnp.where(sees, _halves(d, h)[1], 0.0))
    level_rows, level_cols, c, level_decays, level_G = through(h, dZ)
    dG = dG + level_G
    for i, (x, g) in enumerate(zip(level_rows, level_decays, strict=True)):
      first, second = _halves(drows[i], h)
      drows[i] = _join(first, second + x, h)
      first, second = _halves(ddecays[i], h)
      ddecays[i] = _join(first, second + g, h)
    for j, x in enumerate(level_cols):
      first, second = _halves(dcols[j], h)
      dcols[j] = _join(first + _halves(x, h)[0] * c, second, h)
  if len(factors[0][0]) == 1:
    ddecays = [sum(ddecays)]
  return tuple(drows), tuple(dcols), tuple(ddecays), -dG, None


compare_channels.defvjp(_compare_forward, _compare_backward)


# --- the chunk ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """What a chunk of one head is computed from, in float32.

  Attributes:
    G: cumulative log decay with a token's own. Scalar: [C, C], a token's value in all lanes. Channel: [C, K].
    before: the same without the token's own, where something reads the undecayed state.
    last: that of the chunk's last token, [1, C] or [1, K].
    G_row: scalar decay: G with tokens in lanes. None for a channel decay.
    beta: [C, C], a token's value in all lanes.
  """

  q: Float[Array, "C K"]
  k: Float[Array, "C K"]
  v: Float[Array, "C V"]
  G: Float[Array, "C CK"] | None = None
  before: Float[Array, "C CK"] | None = None
  last: Float[Array, "1 CK"] | None = None
  G_row: Float[Array, "1 C"] | None = None
  beta: Float[Array, "C C"] | None = None
  a: Float[Array, "C K"] | None = None
  b: Float[Array, "C K"] | None = None
  bonus: Float[Array, "1 K"] | None = None


@dataclasses.dataclass(frozen=True)
class Masks:
  """Which tokens of a chunk meet; the last three are None without segments, [C, 1], [C, 1] and [1, 1] with.

  Attributes:
    seen, strictly: [C, C], on and below, or below the diagonal, within a segment.
    from_state: tokens of the segment that the state belongs to.
    to_state: tokens of the last segment.
    keep: whether the state's segment is the last one.
  """

  seen: Array
  strictly: Array
  from_state: Array | None = None
  to_state: Array | None = None
  keep: Array | None = None


def _exp(decay: Array | None, mask: Array | None, width: int) -> Array | None:
  """``exp(decay)`` where the mask is set, else 0; None for ones everywhere."""
  if decay is None:
    return None if mask is None else jnp.where(mask, jnp.ones((mask.shape[0], width)), 0.0)
  return jnp.exp(decay) if mask is None else jnp.where(mask, jnp.exp(decay), 0.0)


def _stack(parts: list[Array]) -> Array:
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def chunks(
  Sts: list[Float[Array, "V K"]],
  xs: list[Chunk],
  masks: Masks,
  *,
  undecayed: bool,
  base: int,
  exact: bool,
) -> tuple[list[Float[Array, "C V"]], list[Float[Array, "V K"]]]:
  """Outputs and next states (transposed) of one chunk of several heads.

  ``undecayed``: which state an erase reads. ``base``: of ``compare_channels``. ``exact``: float32 products.
  """
  heads = [_head(St, x, masks, undecayed, base, exact) for St, x in zip(Sts, xs, strict=True)]
  systems = [next(head) for head in heads]
  solutions = systems
  if systems[0] is not None:
    solutions = solve(*(list(x) for x in zip(*systems, strict=True)), exact)
  results = [head.send(solution) for head, solution in zip(heads, solutions, strict=True)]
  return tuple(list(x) for x in zip(*results, strict=True))


def _head(St, x: Chunk, masks: Masks, undecayed: bool, base: int, exact: bool):
  """One head, in two parts: yields its triangular system, or None; is sent the solution, and yields the results.

  So the systems of all heads are solved side by side.
  """
  C = x.q.shape[0]
  product = functools.partial(dot, exact=exact)
  channel = x.G is not None and x.G_row is None
  # q, and what erases, read the state; k, and what an erase writes along, are written to it.
  erases = x.k if x.beta is not None else x.b
  rows = [x.q] if erases is None else [x.q, erases]
  cols = [x.k] if x.a is None else [x.k, x.a]
  early = [x.bonus is not None] if erases is None else [x.bonus is not None, undecayed]
  decays = [x.before if e else x.G for e in early]
  within = [masks.strictly if e or i else masks.seen for i, e in enumerate(early)]

  one = decays[0] is decays[-1]
  sees = [_exp(decays[0], masks.from_state, C)]
  sees.append(sees[0] if one else _exp(decays[-1], masks.from_state, C))
  left = _exp(None if x.G is None else x.last - x.G, masks.to_state, C)
  keep = _exp(x.last, masks.keep, C)

  # Tokens with tokens, and tokens with the state. A scalar decay scales products, a channel's their operands.
  if channel:
    compared = compare_channels(
      tuple(rows),
      tuple(cols),
      tuple(decays[:1] if one else decays),
      x.G,
      tuple(within),
      base,
      exact,
    )
    seen = product(_stack([_times(r, s) for r, s in zip(rows, sees, strict=False)]), St, NT)
    seen = jnp.split(seen, len(rows))
  else:
    products = jnp.split(product(_stack(rows), _stack(cols), NT), len(rows))
    compared = []
    D = None if x.G is None else decay_matrix(decays[0], x.G_row, within[0])
    for i, (z, decay, mask) in enumerate(zip(products, decays, within, strict=True)):
      line = jnp.split(z, len(cols), axis=1)
      if D is None:
        compared.append([jnp.where(mask, z, 0.0) for z in line])
        continue
      if i:
        D = jnp.where(mask, D, 0.0) if one else decay_matrix(decay, x.G_row, mask)
      compared.append([z * D for z in line])
    seen = jnp.split(product(_stack(rows), St, NT), len(rows))
    seen = [_times(y, s) for y, s in zip(seen, sees, strict=False)]

  # What is written, and what each token reads of it.
  o = seen[0]
  if x.a is not None:
    given = jnp.split(product(_stack([compared[0][0], compared[1][0]]), x.v, NN), 2)
    erased = yield -compared[1][1], given[1] + seen[1], None
    written = [x.v, erased]
    o = o + given[0] + product(compared[0][1], erased, NN)
  else:
    solution = yield None if x.beta is None else (compared[1][0], x.v - seen[1], x.beta)
    written = [x.v if solution is None else solution]
    o = o + product(compared[0][0], written[0], NN)
  if x.bonus is not None:
    o = o + jnp.sum(x.q * x.k * x.bonus, axis=1, keepdims=True) * x.v

  # The next state.
  if channel:
    cols = [_times(c, left) for c in cols]
  else:
    written = [_times(w, left) for w in written]
  yield o, _times(St, keep) + product(_stack(written), _stack(cols), TN)
