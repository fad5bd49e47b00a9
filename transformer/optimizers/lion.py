"""Lion: the sign of the momentum (Chen et al. 2023)."""

import dataclasses

import optax

from transformer.optimizer import OPTIMIZERS
from transformer.optimizers.bases import MomentOptimizer


@OPTIMIZERS.register
@dataclasses.dataclass(frozen=True)
class Lion(MomentOptimizer):
    """The sign of the momentum; it needs a learning rate about ten times smaller than AdamW's."""

    kind = "lion"

    def rule(self) -> optax.GradientTransformation:
        """The sign of momentum and gradient mixed by `b1`; the momentum decays by `b2`."""
        return optax.scale_by_lion(b1=self.b1, b2=self.b2, mu_dtype=self.first_moment())
