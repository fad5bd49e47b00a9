"""What the patterns of the Sparse Transformer have in common: blocks, and the stride between those seen from afar."""

import dataclasses

from transformer.model_kinds import Pattern
from transformer.validation import require_at_least


@dataclasses.dataclass(frozen=True)
class StridePattern(Pattern):
    """A pattern that repeats after some blocks."""

    block_size: int = 64
    """Tokens of a block."""
    stride: int = 8
    """Blocks after which the pattern repeats: of its local part, and to the next block that is seen beyond it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "block_size", "stride")
