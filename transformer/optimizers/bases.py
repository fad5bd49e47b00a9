"""Bases of optimizers with moving averages of the gradient."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from transformer.optimizer import Optimizer
from transformer.validation import require_at_least, require_range


@dataclasses.dataclass(frozen=True)
class MomentOptimizer(Optimizer):
    """An optimizer with a first moment of configurable type."""

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment (Lion: of the first moment; b1 mixes it with the gradient)."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the first moment; bfloat16 halves its memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 0, 1, "b1", "b2")

    def first_moment(self) -> np.dtype | None:
        """The type of the first moment as optax takes it."""
        return None if self.moment_dtype == "float32" else jnp.dtype(self.moment_dtype)


@dataclasses.dataclass(frozen=True)
class AdaptiveOptimizer(MomentOptimizer):
    """An optimizer that divides by the root of the second moment."""

    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "eps")
