"""The fixed pattern of the Sparse Transformer."""

import dataclasses

from transformer.model_kinds import PATTERNS
from transformer.ops.patterns.strides import StridePattern
from transformer.types import Array
from transformer.validation import require, require_at_least


@PATTERNS.register
@dataclasses.dataclass(frozen=True)
class FixedPattern(StridePattern):
    """The blocks of the same group of `stride`, and the last `summary` blocks of every group (Child et al. 2019).

    This is the union of the paper's two heads, with blocks of `block_size` tokens in place of its tokens. Rows are blocks of
    queries, columns blocks of keys, `1` means visible; with `stride=3`, `summary=1`, and a causal mask:

        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 0 1 1 0 0
        0 0 1 1 1 0
        0 0 1 1 1 1
    """

    kind = "fixed"

    summary: int = 1
    """Blocks at the end of each group that are visible to all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "summary")
        require(
            self.summary <= self.stride,
            f"FixedPattern.summary must not exceed stride={self.stride}, got {self.summary}.",
        )

    def sees(self, query_blocks: Array, key_blocks: Array) -> Array:
        """Whether blocks with these numbers see these blocks of keys."""
        same = query_blocks // self.stride == key_blocks // self.stride
        return same | (key_blocks % self.stride >= self.stride - self.summary)
