"""The base of schedules that fall to a fraction of the peak at the last step."""

import dataclasses

import jax.numpy as jnp

from transformer.optimizer import Schedule
from transformer.types import Array
from transformer.validation import require_range


@dataclasses.dataclass(frozen=True)
class FallingSchedule(Schedule):
    """A schedule that falls to `final_fraction`."""

    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 0, 1 + 1e-9, "final_fraction")

    def first_decaying(self, last: int, steps: int) -> int:
        """The step before the first one below the peak; `last` is the last of `steps` steps."""
        del last, steps
        return self.warmup_steps

    def progress(self, count: Array, steps: int) -> Array:
        """0 while at the peak, 1 at the last step."""
        last = max(steps - 1, self.warmup_steps + 1)
        first = self.first_decaying(last, steps)
        return jnp.clip((count - first) / max(last - first, 1), 0.0, 1.0)
