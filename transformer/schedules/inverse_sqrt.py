"""The inverse square root of the step number (Vaswani et al. 2017, section 5.3)."""

import dataclasses

import jax.numpy as jnp

from transformer.optimizer import SCHEDULES, Schedule
from transformer.types import Array


@SCHEDULES.register
@dataclasses.dataclass(frozen=True)
class InverseSqrtSchedule(Schedule):
    """After warm-up, proportional to the inverse square root of the step, for runs of any length."""

    kind = "inverse_sqrt"

    def decay(self, count: Array, steps: int) -> Array:
        """`sqrt((warmup_steps + 1) / (count + 1))`."""
        del steps
        return jnp.sqrt((self.warmup_steps + 1.0) / (jnp.maximum(count, self.warmup_steps) + 1.0))
