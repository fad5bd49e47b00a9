"""A constant learning rate after warm-up."""

import dataclasses

import jax.numpy as jnp

from transformer.optimizer import SCHEDULES, Schedule
from transformer.types import Array


@SCHEDULES.register
@dataclasses.dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """After warm-up, constant at the peak."""

    kind = "constant"

    def decay(self, count: Array, steps: int) -> Array:
        """1."""
        del steps
        return jnp.ones_like(count)
