"""No positions: attention sees tokens as a set, except for its mask."""

import dataclasses

from transformer.model_kinds import POSITIONS, Positions


@POSITIONS.register
@dataclasses.dataclass(frozen=True)
class NoPositions(Positions):
    """No positions."""

    kind = "none"
