"""What kinds of objectives have in common: logits over a vocabulary, running text, examples."""

import dataclasses
from typing import TYPE_CHECKING

from transformer.objective import Objective
from transformer.validation import require, require_at_least

if TYPE_CHECKING:
    from transformer.config import Config


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


@dataclasses.dataclass(frozen=True)
class TextObjective(TokenObjective):
    """An objective that draws anew what counts in each row of running text."""

    reads = "text"

    def check(self, config: "Config") -> None:
        """Rows are not windows."""
        super().check(config)
        require(
            config.data.stride == 0,
            f"Windows that move on are for next_token, {self.kind} draws what counts in each row anew; got "
            f"data.stride={config.data.stride}, set it to 0.",
        )


@dataclasses.dataclass(frozen=True)
class ExampleObjective(Objective):
    """An objective on labelled texts or pairs."""

    def check(self, config: "Config") -> None:
        """Test examples have files of their own, and nothing is running text."""
        super().check(config)
        data = config.data
        require(
            data.test_fraction == 0,
            f"A test split of labelled texts or pairs has files of its own (transformer prepare --test), got data.test_fraction="
            f"{data.test_fraction}; set it to 0.",
        )
        require(
            len(data.weights) < 2,
            f"data.weights mix running text, got {' '.join(map(str, data.weights))} for the {self.kind} objective; leave them "
            "out.",
        )
        require(
            not (data.stride or data.limit),
            f"data.stride and data.limit are for running text, got stride={data.stride} and limit={data.limit} for the "
            f"{self.kind} objective; leave them out.",
        )
