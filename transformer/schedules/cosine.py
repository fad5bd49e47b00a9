"""Half a cosine from the peak to the final value (Loshchilov and Hutter 2017)."""

import dataclasses

import jax.numpy as jnp

from transformer.optimizer import SCHEDULES
from transformer.schedules.falling import FallingSchedule
from transformer.types import Array


@SCHEDULES.register
@dataclasses.dataclass(frozen=True)
class CosineSchedule(FallingSchedule):
    """After warm-up, half a cosine."""

    kind = "cosine"

    def decay(self, count: Array, steps: int) -> Array:
        """`final + (1 - final) * (1 + cos(pi * progress)) / 2`."""
        final = self.final_fraction
        return final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * self.progress(count, steps)))
