"""The base of sinusoidal and rotary positions: the base of their wavelengths."""

import dataclasses

from transformer.model_kinds import Positions
from transformer.validation import require


@dataclasses.dataclass(frozen=True)
class WavePositions(Positions):
    """Positions as angles; the wavelengths are powers of one base."""

    theta: float = 10_000.0
    """Base of the wavelengths."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.theta > 0, f"{type(self).__name__}.theta must be positive, got {self.theta}.")
