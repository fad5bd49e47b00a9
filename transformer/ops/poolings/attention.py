"""Pooling by a learned weighted mean."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from transformer.model_kinds import POOLINGS, Pooling


@POOLINGS.register
@dataclasses.dataclass(frozen=True)
class AttentionPooling(Pooling):
    """The mean of a text's hidden states, weighted by the softmax of learned scores."""

    kind = "attention"
    learned = True

    def pool(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], scores: Callable[[], Array]
    ) -> Float[Array, "B D"]:
        """Computed by `weighted_mean`."""
        return weighted_mean(x_BTD, valid_BT, scores().astype(jnp.float32))


def weighted_mean(
    x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], scores_BT: Float[Array, "B T"]
) -> Float[Array, "B D"]:
    """The mean of the valid vectors, weighted by the softmax of their scores."""
    # Rows without a valid vector would give NaN, and so would their gradient.
    any_B1 = jnp.any(valid_BT, axis=1, keepdims=True)
    weights_BT = jax.nn.softmax(jnp.where(valid_BT | ~any_B1, scores_BT, -jnp.inf), axis=1)
    return jnp.einsum("BT,BTD->BD", weights_BT, x_BTD)
