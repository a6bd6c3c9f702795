"""Linear recurrences: linear attention, state space models, delta rules, and everything between."""

from pallas_kernels.linear_recurrence.api import linear_recurrence, linear_recurrence_step
from pallas_kernels.linear_recurrence.recurrence import KeyErase, LowRankErase, Recurrence

__all__ = ["KeyErase", "LowRankErase", "Recurrence", "linear_recurrence", "linear_recurrence_step"]
