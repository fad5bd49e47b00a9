"""Adafactor: second moments kept as rows and columns (Shazeer and Stern 2018)."""

import dataclasses

import optax

from transformer.optimizer import OPTIMIZERS, Optimizer


@OPTIMIZERS.register
@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Factored second moments and no first one; its learning rate is relative to the size of each parameter."""

    kind = "adafactor"
    # The update of each parameter is bounded and scaled by its root mean square: of a layer, or of a whole stack.
    fixed = ("model.scan_layers",)

    def rule(self) -> optax.GradientTransformation:
        """Factored second moments, updates clipped to RMS 1 and relative to the parameter's."""
        return optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        )
