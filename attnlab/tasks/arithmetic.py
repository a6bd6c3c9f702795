"""Parity and modular arithmetic, as in "Unlocking State-Tracking in Linear RNNs" (arXiv:2411.12537, Table 3).

The paper trains on lengths 3 to 40 and evaluates on 40 to 256, in rows of 256: `min_length` and `max_length`.
"""

import dataclasses

import numpy as np

from attnlab.errors import UserError
from attnlab.tasks.base import Example, Task, labelled, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sized(Task):
  """A task whose examples have a random length.

  Attributes:
    min_length, max_length: of an example, with both ends; max_length 0: config.data.seq_len.
  """

  min_length: int = 3
  max_length: int = 0

  def check(self, seq_len: int) -> None:
    if not 3 <= self.min_length <= (self.max_length or seq_len) <= seq_len:
      raise UserError(
        f"min_length={self.min_length} and max_length={self.max_length} must lie between 3 and "
        f"config.data.seq_len={seq_len}, the first below the second"
      )

  def length(self, rng: np.random.Generator, seq_len: int) -> int:
    return int(rng.integers(self.min_length, (self.max_length or seq_len) + 1))


@register("parity")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(_Sized):
  """Random bits; the target at the last is whether their sum is odd.

  Attributes:
    everywhere: the parity so far is a target at every bit, which is faster to learn from.
  """

  everywhere: bool = False
  vocab_size = 2

  def labels(self, seq_len: int) -> int:
    return seq_len if self.everywhere else 1

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    n = self.length(rng, seq_len)
    bits = rng.integers(2, size=n)
    parities = np.cumsum(bits) % 2
    where = np.arange(n) if self.everywhere else np.array([n - 1])
    return labelled(bits, where, parities[where])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Arithmetic(_Sized):
  """An expression modulo `modulus`, then `=`, at which its value is the target.

  Ids: the numbers 0 .. modulus - 1, then + - * ( ) =, those of them that occur.

  Attributes:
    modulus: of all numbers.
  """

  modulus: int = 5

  def check(self, seq_len: int) -> None:
    super().check(seq_len)
    if self.modulus < 2:
      raise UserError(f"modulus={self.modulus} must be at least 2")

  def labels(self, seq_len: int) -> int:
    return 1


@register("modular_arithmetic")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularArithmetic(_Arithmetic):
  """`2 + 3 * 4 - 1 =`, with * before + and -. Lengths are even; an odd one is made one shorter."""

  @property
  def vocab_size(self) -> int:
    return self.modulus + 4

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    m, n = self.modulus, self.length(rng, seq_len) // 2
    numbers, operators = rng.integers(m, size=n), rng.integers(3, size=n - 1)
    total, term = 0, int(numbers[0])  # the sum before the term that is being multiplied
    for x, operator in zip(numbers[1:], operators, strict=True):
      if operator == 2:
        term = term * int(x) % m
      else:
        total, term = total + term, int(x) if operator == 0 else -int(x)
    inputs = np.empty(2 * n, np.int32)
    inputs[::2], inputs[1:-1:2], inputs[-1] = numbers, m + operators, m + 3
    return labelled(inputs, np.array([2 * n - 1]), np.array([(total + term) % m]))


@register("modular_arithmetic_brackets")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularArithmeticBrackets(_Arithmetic):
  """`( ( 2 - 3 ) * ( - 1 ) ) =`: random trees, every operation in brackets.

  Expressions of one to four ids are x, -x, (x), (-x); longer ones are (left op right), the length of left uniform.

  Attributes:
    multiply: use * too.
  """

  multiply: bool = True

  @property
  def vocab_size(self) -> int:
    return self.modulus + 6

  def example(self, rng: np.random.Generator, seq_len: int) -> Example:
    m = self.modulus
    ids = {symbol: m + i for i, symbol in enumerate("+-*()=")}
    inputs: list[int] = []

    def expression(length: int) -> int:
      """Writes an expression of so many ids; its value."""
      if length < 5:
        x = int(rng.integers(m))
        sign = [ids["-"]] if length in (2, 4) else []
        inputs.extend([ids["("], *sign, x, ids[")"]] if length > 2 else [*sign, x])
        return -x if sign else x
      left = int(rng.integers(1, length - 3))
      operator = "+-*"[rng.integers(3 if self.multiply else 2)]
      inputs.append(ids["("])
      a = expression(left)
      inputs.append(ids[operator])
      b = expression(length - 3 - left)
      inputs.append(ids[")"])
      return {"+": a + b, "-": a - b, "*": a * b}[operator] % m

    value = expression(self.length(rng, seq_len) - 1) % m
    inputs.append(ids["="])
    return labelled(np.array(inputs), np.array([len(inputs) - 1]), np.array([value]))
