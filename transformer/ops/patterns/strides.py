"""The base of the Sparse Transformer's patterns: a block size, and the stride between visible distant blocks."""

import dataclasses

from transformer.model_kinds import Pattern
from transformer.validation import require_at_least


@dataclasses.dataclass(frozen=True)
class StridePattern(Pattern):
    """A pattern that repeats after some blocks."""

    block_size: int = 64
    """Tokens per block."""
    stride: int = 8
    """Period of the pattern in blocks: the size of its local part, and the distance between visible blocks beyond it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "block_size", "stride")
