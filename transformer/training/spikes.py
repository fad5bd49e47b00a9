"""Skips a step whose gradient is far larger than recent ones: a batch that would set the run back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.training.state import TrainState
from transformer.types import Leaf, Statistics

WINDOW = 128
"""Number of recent steps whose median norm is the reference."""
FEWEST = 16
"""Number of norms required before a step can be a spike."""


class Spikes(NamedTuple):
    """The norms of recent gradients, of skipped steps too: after a lasting rise, the median rises as well."""

    norms: Leaf  # float32 [WINDOW]; step t at t % WINDOW; NaN before the first
    skipped_spikes: Leaf  # int32 scalar, of the whole run


def make_spikes(factor: float) -> Spikes | tuple[()]:
    """The state before the first step; () if no step is skipped (`factor`, which is `training.skip_spikes`, is 0)."""
    return Spikes(jnp.full(WINDOW, jnp.nan, jnp.float32), jnp.int32(0)) if factor > 0 else ()


def skip_spike(
    state: TrainState, new_state: TrainState, statistics: Statistics, factor: float
) -> tuple[TrainState, Statistics]:
    """The step, unless the norm of its gradient exceeds `factor` times the median of the recent norms.

    In a skipped step, the step counter, the norms and the carry advance; parameters, optimizer state and average keep their
    bits. A norm that is not finite is no spike, and is not recorded.

    Args:
        state: the state before the step, with `Spikes`.
        new_state: the state after it.
        statistics: of the step, with the gradient's norm; sums over devices, which therefore agree.
        factor: above 1.

    Returns:
        The state to continue with, and the statistics with the run's `skipped_spikes`.
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
    """The number of steps that changed the parameters (none skipped), which the schedule and the average count."""
    done = state.step
    if state.loss_scale:
        done = done - state.loss_scale.skipped_steps
    return done - state.spikes.skipped_spikes if state.spikes else done
