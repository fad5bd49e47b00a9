"""The positions of a block without its own."""

import dataclasses
from typing import TYPE_CHECKING

from transformer.model_kinds import POSITIONS, Positions
from transformer.types import UserError

if TYPE_CHECKING:
    from transformer.model_config import ModelConfig


@POSITIONS.register
@dataclasses.dataclass(frozen=True)
class InheritPositions(Positions):
    """The positions of the model (`BlockConfig.own_positions`)."""

    kind = "inherit"

    def within(self, model: Positions) -> Positions:
        """The model's."""
        return model

    def check(self, config: "ModelConfig") -> None:
        """A model has nothing to inherit from."""
        raise UserError("ModelConfig.positions must not be inherit, which is for the own positions of a block.")

    def check_own(self, block: object, embed_dim: int) -> None:
        """Nothing to check."""
