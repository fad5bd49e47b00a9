"""The fixed pattern of the Sparse Transformer."""

import dataclasses
from typing import Any

from transformer.model_kinds import PATTERNS
from transformer.ops.patterns.strides import StridePattern
from transformer.validation import require, require_at_least


@PATTERNS.register
@dataclasses.dataclass(frozen=True)
class FixedPattern(StridePattern):
    """The blocks of the same group of `stride`, and the last `summary` blocks of every group (Child et al. 2019).

    Both of the paper's heads in one, with blocks of `block_size` tokens for its tokens. Rows are blocks of queries, columns of
    keys, `1` means sees; with `stride=3`, `summary=1`, and causal besides:

        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 0 1 1 0 0
        0 0 1 1 1 0
        0 0 1 1 1 1
    """

    kind = "fixed"

    summary: int = 1
    """Blocks at the end of each group that everything sees."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "summary")
        require(
            self.summary <= self.stride,
            f"FixedPattern.summary must not exceed stride={self.stride}, got {self.summary}.",
        )

    def sees(self, query_blocks: Any, key_blocks: Any) -> Any:
        """Whether blocks with these numbers see these blocks."""
        same = query_blocks // self.stride == key_blocks // self.stride
        return same | (key_blocks % self.stride >= self.stride - self.summary)
