"""The strided pattern of the Sparse Transformer."""

import dataclasses
from typing import Any

from transformer.model_kinds import PATTERNS
from transformer.ops.patterns.strides import StridePattern


@PATTERNS.register
@dataclasses.dataclass(frozen=True)
class StridedPattern(StridePattern):
    """The blocks fewer than `stride` away, and every `stride`-th one from there (Child et al. 2019).

    Both of the paper's heads in one, with blocks of `block_size` tokens for its tokens. Rows are blocks of queries, columns of
    keys, `1` means sees; with `stride=3`, and causal besides:

        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        0 1 1 1 1 0
        0 0 1 1 1 1
    """

    kind = "strided"

    def sees(self, query_blocks: Any, key_blocks: Any) -> Any:
        """Whether blocks with these numbers see these blocks."""
        distance = abs(query_blocks - key_blocks)
        return (distance < self.stride) | (distance % self.stride == 0)
