"""Dynamic loss scaling, without which small gradients of float16 activations underflow to zero."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.model_config import ModelConfig
from transformer.training.state import TrainState
from transformer.types import Leaf, Statistics
from transformer.validation import require

INITIAL, SMALLEST, LARGEST = 2.0**15, 1.0, 2.0**24
PERIOD = 2000
"""Consecutive good steps after which the scale doubles."""
FINITE = ("loss", "objective", "grad_norm")
"""Statistics that must be finite; otherwise the step is skipped."""


class LossScale(NamedTuple):
    """The factor of the loss during differentiation (Micikevicius et al. 2018, section 3.2)."""

    scale: Leaf  # float32 scalar, a power of two: scaling is exact
    good_steps: Leaf  # int32 scalar, steps since the scale changed
    skipped_steps: Leaf  # int32 scalar, of the whole run


def make_loss_scale(config: ModelConfig) -> LossScale | tuple[()]:
    """The scale before the first step of a model; () if activations are not float16 and nothing is scaled."""
    require(
        config.param_dtype == "float32",
        f"Training needs model.param_dtype=float32, got {config.param_dtype!r}, in which most updates round to nothing, and sums "
        f"of gradients and averages with them; model.dtype={config.param_dtype} alone computes in it.",
    )
    if config.dtype != "float16":
        return ()
    return LossScale(jnp.float32(INITIAL), jnp.int32(0), jnp.int32(0))


def keep_if_finite(state: TrainState, new_state: TrainState, statistics: Statistics) -> tuple[TrainState, Statistics]:
    """Keep the step if its numbers are finite; else skip it: the counter and the carry advance, and the scale is halved.

    Args:
        state: the state before the step.
        new_state: the state after it, with the scale that it used.
        statistics: of the step, with the norm of the unscaled gradient; sums over devices, which therefore agree.

    Returns:
        The state to continue with, and the statistics with the next step's `loss_scale` and the run's `skipped_steps`.
    """
    scale, good_steps, skipped_steps = state.loss_scale
    finite = jnp.all(jnp.isfinite(jnp.stack([statistics[name] for name in FINITE])))
    doubles = good_steps + 1 >= PERIOD
    new_scale = LossScale(
        scale=jnp.where(finite, jnp.where(doubles, jnp.minimum(2 * scale, LARGEST), scale), scale / 2),
        good_steps=jnp.where(finite & ~doubles, good_steps + 1, 0),
        skipped_steps=skipped_steps + jnp.where(finite, 0, 1),
    )
    # A selection instead of a branch: XLA fuses it with the update.
    kept = optax.tree.where(finite, new_state, state)
    # The data advance, and the Transformer-XL memory with them: an older memory would belong to other tokens or documents.
    carry = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), new_state.carry)
    kept = kept._replace(step=new_state.step, carry=carry, loss_scale=new_scale)
    return kept, {**statistics, "loss_scale": new_scale.scale, "skipped_steps": new_scale.skipped_steps}
