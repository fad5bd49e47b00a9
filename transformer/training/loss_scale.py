"""Dynamic loss scaling, without which small gradients of float16 activations are zero."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.model_config import ModelConfig
from transformer.training.state import TrainState
from transformer.types import Statistics
from transformer.validation import require

INITIAL, SMALLEST, LARGEST = 2.0**15, 1.0, 2.0**24
PERIOD = 2000
"""Good steps in a row after which the scale doubles."""
FINITE = ("loss", "objective", "grad_norm")
"""Statistics that must be finite for a step to count."""


class LossScale(NamedTuple):
    """What the loss is multiplied by before the gradient is taken (Micikevicius et al. 2018, section 3.2)."""

    scale: Any  # float32 scalar, a power of two: scaling rounds nothing
    good_steps: Any  # int32 scalar, steps since the scale changed
    skipped_steps: Any  # int32 scalar, of the whole run


def make_loss_scale(config: ModelConfig) -> LossScale | tuple[()]:
    """The scale before the first step of a model; () where activations are not float16 and nothing is scaled."""
    require(
        config.param_dtype == "float32",
        f"Training needs model.param_dtype=float32, got {config.param_dtype!r}, in which most updates round to nothing, and sums "
        f"of gradients and averages with them; model.dtype={config.param_dtype} alone computes in it.",
    )
    if config.dtype != "float16":
        return ()
    return LossScale(jnp.float32(INITIAL), jnp.int32(0), jnp.int32(0))


def keep_if_finite(state: TrainState, new_state: TrainState, statistics: Statistics) -> tuple[TrainState, Statistics]:
    """The step if its numbers are finite; else the step counter, the carry and half the scale, and all else as before.

    Args:
        state: before the step.
        new_state: after it, with the scale it was taken with.
        statistics: of the step, with the norm of the unscaled gradient. Sums over devices, so that all agree.

    Returns:
        The state to go on with, and the statistics with the next step's `loss_scale` and the run's `skipped_steps`.
    """
    scale, good_steps, skipped_steps = state.loss_scale
    finite = jnp.all(jnp.isfinite(jnp.stack([statistics[name] for name in FINITE])))
    doubles = good_steps + 1 >= PERIOD
    new_scale = LossScale(
        scale=jnp.where(finite, jnp.where(doubles, jnp.minimum(2 * scale, LARGEST), scale), scale / 2),
        good_steps=jnp.where(finite & ~doubles, good_steps + 1, 0),
        skipped_steps=skipped_steps + jnp.where(finite, 0, 1),
    )
    # A selection, not a branch: XLA fuses it with the update.
    kept = optax.tree.where(finite, new_state, state)
    # The data go on, and what is remembered with them: an older memory would be of other tokens, or of another document.
    carry = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), new_state.carry)
    kept = kept._replace(step=new_state.step, carry=carry, loss_scale=new_scale)
    return kept, {**statistics, "loss_scale": new_scale.scale, "skipped_steps": new_scale.skipped_steps}
