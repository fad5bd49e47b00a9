"""Pooling by the mean."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from transformer.model_kinds import POOLINGS, Pooling
from transformer.ops.poolings.attention import weighted_mean


@POOLINGS.register
@dataclasses.dataclass(frozen=True)
class MeanPooling(Pooling):
    """The mean of a text's hidden states."""

    kind = "mean"

    def pool(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], scores: Callable[[], Array]
    ) -> Float[Array, "B D"]:
        """Equal weights."""
        return weighted_mean(x_BTD, valid_BT, jnp.zeros(valid_BT.shape, jnp.float32))
