"""A straight line from the peak to the final value."""

import dataclasses

from transformer.optimizer import SCHEDULES
from transformer.schedules.falling import FallingSchedule
from transformer.types import Array


@SCHEDULES.register
@dataclasses.dataclass(frozen=True)
class LinearSchedule(FallingSchedule):
    """After warm-up, a straight line."""

    kind = "linear"

    def decay(self, count: Array, steps: int) -> Array:
        """`1 + (final - 1) * progress`."""
        return 1.0 + (self.final_fraction - 1.0) * self.progress(count, steps)
