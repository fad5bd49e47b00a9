"""Adafactor: factored second moments (Shazeer and Stern 2018)."""

import dataclasses

import optax

from transformer.optimizer import OPTIMIZERS, Optimizer


@OPTIMIZERS.register
@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
    """Factored second moments and no first moment; its learning rate is relative to the size of each parameter."""

    kind = "adafactor"
    # The update of each array is bounded and scaled by its root mean square: one layer's, or a whole scanned stack's.
    fixed = ("model.scan_layers",)

    def rule(self) -> optax.GradientTransformation:
        """Factored second moments; updates are clipped to RMS 1 and scaled by the parameter's RMS."""
        return optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        )
