"""Adam with decoupled weight decay (Kingma and Ba 2015; Loshchilov and Hutter 2019)."""

import dataclasses

import optax

from transformer.optimizer import OPTIMIZERS
from transformer.optimizers.bases import AdaptiveOptimizer


@OPTIMIZERS.register
@dataclasses.dataclass(frozen=True)
class AdamW(AdaptiveOptimizer):
    """Adam with decoupled weight decay."""

    kind = "adamw"

    def rule(self) -> optax.GradientTransformation:
        """The first moment divided by the root of the second."""
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps, mu_dtype=self.first_moment())
