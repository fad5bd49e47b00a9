"""Warm-up, stable, decay (Hu et al. 2024, section 4)."""

import dataclasses

from transformer.optimizer import SCHEDULES
from transformer.schedules.linear import LinearSchedule
from transformer.validation import require_range


@SCHEDULES.register
@dataclasses.dataclass(frozen=True)
class WSDSchedule(LinearSchedule):
    """After warm-up constant at the peak, then a straight line over the last steps."""

    kind = "wsd"

    decay_fraction: float = 0.2
    """Fraction of the steps in which the learning rate falls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 0, 1 + 1e-9, "decay_fraction")

    def first_decaying(self, last: int, steps: int) -> int:
        """The step after which `decay_fraction` of the steps remain."""
        return max(self.warmup_steps, round(last - self.decay_fraction * steps))
