"""The chips that costs are told for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TensorCore of a TPU, by data sheet.

  Attributes:
    topology: the name that libtpu knows.
    clock: GHz. 7x: what its peak at v6e's FLOPs a cycle comes to; no source gives it.
    bandwidth: GB/s of HBM, of one core.
    flops: bfloat16 multiplications and additions a cycle.
  """

  topology: str
  clock: float
  bandwidth: float
  flops: int


CHIPS = {
  "v4": Chip("v4:2x2x1", 1.05, 1228 / 2, 131072),
  "v5e": Chip("v5e:2x2", 1.5, 819, 131072),
  "v5p": Chip("v5p:2x2x1", 1.75, 2765 / 2, 131072),
  "v6e": Chip("v6e:2x2", 1.75, 1640, 524288),
  "7x": Chip("tpu7x:2x2x1", 2.2, 7380 / 2, 524288),
}
