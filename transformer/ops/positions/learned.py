"""Learned positions: one vector per position, added to the embeddings."""

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from transformer.model_kinds import POSITIONS, Parameter, Positions
from transformer.ops.ids import look_up
from transformer.types import Array
from transformer.validation import require_at_least

if TYPE_CHECKING:
    from transformer.model_config import ModelConfig


@POSITIONS.register
@dataclasses.dataclass(frozen=True)
class LearnedPositions(Positions):
    """A learned vector for each of max_length positions, added to the embeddings."""

    kind = "learned"
    absolute = True

    offset: int = 0
    """Unused rows of the table before the row of position 0 (RoBERTa, OPT: 2)."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "offset")

    def check_length(self, max_length: int, length: int) -> None:
        """The table has one vector for each position up to max_length."""
        if length > max_length:
            raise ValueError(
                f"Learned positions reach max_length={max_length} tokens, got {length}; raise max_length, shorten the "
                "sequence, or choose another kind of positions."
            )

    def num_parameters(self, config: "ModelConfig") -> int:
        """The table."""
        return (config.max_length + self.offset) * config.embed_dim

    def embed(self, x_BTD: Array, positions_BT: Array, max_length: int, parameter: Parameter) -> Array:
        """NaN for a position beyond the table."""
        self.check_length(max_length, positions_BT.shape[1])
        embed_dim = x_BTD.shape[-1]
        rows = max_length + self.offset
        table = parameter("embedding", (rows, embed_dim), ("position", "embed"), fan_in=embed_dim)
        vectors = look_up(table[self.offset :] if self.offset else table, positions_BT).astype(x_BTD.dtype)
        return x_BTD + jnp.broadcast_to(vectors, x_BTD.shape)
