"""Pooling by the last token."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from transformer.model_kinds import POOLINGS, Pooling


@POOLINGS.register
@dataclasses.dataclass(frozen=True)
class LastPooling(Pooling):
    """The hidden state of the last token; in a decoder, it depends on all tokens (Neelakantan et al. 2022)."""

    kind = "last"

    def pool(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], scores: Callable[[], Array]
    ) -> Float[Array, "B D"]:
        """The hidden state of the valid token with the highest index."""
        last_B = jnp.max(jnp.where(valid_BT, jnp.arange(valid_BT.shape[1])[None], 0), axis=1)
        return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
