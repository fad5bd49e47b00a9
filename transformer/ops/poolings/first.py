"""Pooling by the first token."""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Bool, Float

from transformer.model_kinds import POOLINGS, Pooling


@POOLINGS.register
@dataclasses.dataclass(frozen=True)
class FirstPooling(Pooling):
    """The hidden state of the first token (Devlin et al. 2019)."""

    kind = "first"

    def pool(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"], scores: Callable[[], Array]
    ) -> Float[Array, "B D"]:
        """The hidden state at index 0, even if it is padding."""
        return x_BTD[:, 0]
