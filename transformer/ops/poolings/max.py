"""Pooling by the maximum."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from transformer.model_kinds import POOLINGS, Pooling


@POOLINGS.register
@dataclasses.dataclass(frozen=True)
class MaxPooling(Pooling):
    """The maximum of each component."""

    kind = "max"

    def pool(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], scores: Callable[[], Array]
    ) -> Float[Array, "B D"]:
        """The maximum over the valid tokens."""
        return jnp.max(jnp.where(valid_BT[..., None], x_BTD, -jnp.inf), axis=1)
