"""What the kernels cost on TPUs and GPUs that are not there; `python -m pallas_kernels.cost --help` says more."""

from pallas_kernels.cost.cases import Case, cases
from pallas_kernels.cost.chips import CHIPS, Chip
from pallas_kernels.cost.compiler import compile_case, environment, measure

__all__ = ["CHIPS", "Case", "Chip", "cases", "compile_case", "environment", "measure"]
