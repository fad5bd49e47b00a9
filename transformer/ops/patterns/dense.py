"""The dense pattern: every block sees every other."""

import dataclasses
from typing import Any

from transformer.model_kinds import PATTERNS, Pattern


@PATTERNS.register
@dataclasses.dataclass(frozen=True)
class DensePattern(Pattern):
    """Every token sees all tokens that the mask allows."""

    kind = "dense"
    sees_all = True

    def restrict(self, mask: Any) -> Any:
        """The mask, unchanged."""
        return mask
