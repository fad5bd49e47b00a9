"""What objectives with logits over a vocabulary have in common."""

import dataclasses

from transformer.objective import Objective
from transformer.validation import require_at_least


@dataclasses.dataclass(frozen=True)
class TokenObjective(Objective):
    """An objective over a vocabulary."""

    loss_chunks: int = 1
    """Parts of each row whose logits are computed, and forgotten, one after another: memory for those of one part only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "loss_chunks")

    def in_chunks(self, count: int) -> Objective:
        """The same loss, whose logits are computed in so many parts."""
        return dataclasses.replace(self, loss_chunks=count)
