"""Skipping a step whose gradient is far larger than those before it: a batch that would throw the run back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.training.state import TrainState
from transformer.types import Statistics

WINDOW = 128
"""Steps whose median a gradient's norm is compared with."""
FEWEST = 16
"""Norms without which none is a spike."""


class Spikes(NamedTuple):
    """The norms of the latest gradients, whether their steps counted or not: a rise that lasts becomes the median."""

    norms: Any  # float32 [WINDOW], that of step t at t % WINDOW; NaN where there was none
    skipped_spikes: Any  # int32 scalar, of the whole run


def make_spikes(factor: float) -> Spikes | tuple[()]:
    """Before the first step; () where none is skipped (`factor`, which is `training.skip_spikes`, is 0)."""
    return Spikes(jnp.full(WINDOW, jnp.nan, jnp.float32), jnp.int32(0)) if factor > 0 else ()


def skip_spike(
    state: TrainState, new_state: TrainState, statistics: Statistics, factor: float
) -> tuple[TrainState, Statistics]:
    """The step, unless the norm of its gradient exceeds `factor` times the median of the norms before.

    Of a skipped step the step counter, the norm and what is carried to the next rows go on; parameters, optimizer and average
    keep their bits. A norm that is not finite is no spike, and not remembered.

    Args:
        state: before the step, with `Spikes`.
        new_state: after it.
        statistics: of the step, with the gradient's norm. Sums over devices, so that all agree.
        factor: above 1.

    Returns:
        The state to go on with, and the statistics with the run's `skipped_spikes`.
    """
    norms, skipped_spikes = state.spikes
    norm = statistics["grad_norm"].astype(jnp.float32)
    finite = jnp.isfinite(norm)
    enough = jnp.sum(~jnp.isnan(norms)) >= FEWEST
    spike = finite & enough & (norm > factor * jnp.nanmedian(norms))
    at = state.step % WINDOW
    spikes = Spikes(norms.at[at].set(jnp.where(finite, norm, norms[at])), skipped_spikes + spike.astype(jnp.int32))
    kept = optax.tree.where(spike, state._replace(carry=new_state.carry), new_state)
    kept = kept._replace(step=new_state.step, spikes=spikes)
    return kept, {**statistics, "skipped_spikes": spikes.skipped_spikes}


def updates_done(state: TrainState) -> jax.Array:
    """Steps that changed the parameters, by which the schedule and the average go: without the skipped ones."""
    done = state.step
    if state.loss_scale:
        done = done - state.loss_scale.skipped_steps
    return done - state.spikes.skipped_spikes if state.spikes else done
