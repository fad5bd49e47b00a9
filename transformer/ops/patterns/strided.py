"""The strided pattern of the Sparse Transformer."""

import dataclasses

from transformer.model_kinds import PATTERNS
from transformer.ops.patterns.strides import StridePattern
from transformer.types import Array


@PATTERNS.register
@dataclasses.dataclass(frozen=True)
class StridedPattern(StridePattern):
    """The blocks fewer than `stride` away, and every `stride`-th one from there (Child et al. 2019).

    This is the union of the paper's two heads, with blocks of `block_size` tokens in place of its tokens. Rows are blocks of
    queries, columns blocks of keys, `1` means visible; with `stride=3` and a causal mask:

        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        0 1 1 1 1 0
        0 0 1 1 1 1
    """

    kind = "strided"

    def sees(self, query_blocks: Array, key_blocks: Array) -> Array:
        """Whether blocks with these numbers see these blocks of keys."""
        distance = abs(query_blocks - key_blocks)
        return (distance < self.stride) | (distance % self.stride == 0)
