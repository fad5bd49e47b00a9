"""The dense pattern: every block sees every other."""

import dataclasses

from transformer.model_kinds import PATTERNS, Pattern
from transformer.ops.masks import AttentionMask


@PATTERNS.register
@dataclasses.dataclass(frozen=True)
class DensePattern(Pattern):
    """Every token sees all tokens that the mask allows."""

    kind = "dense"
    sees_all = True

    def restrict(self, mask: AttentionMask) -> AttentionMask:
        """The mask, unchanged."""
        return mask
