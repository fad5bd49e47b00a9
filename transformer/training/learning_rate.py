"""Learning rates as functions of the step."""

import itertools

import jax.numpy as jnp
import optax

from transformer.config import Config
from transformer.optimizer import Optimizer
from transformer.types import Array
from transformer.validation import require


def make_schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """`count -> learning rate`, where `count` is the number of steps already done.

    Warm-up is linear: it would be 0 one step before the first, and reaches the peak after `warmup_steps` steps. No step is
    therefore spent on a learning rate of 0. Then the learning rate is the peak times `Schedule.decay`. After each of
    `schedule.restarts` the schedule starts again, over the steps to the next restart or the end.
    """
    restarts = config.schedule.restarts
    cycles = [_cycle(config, end - begin) for begin, end in itertools.pairwise((0, *restarts, steps))]
    return cycles[0] if len(cycles) == 1 else optax.join_schedules(cycles, list(restarts))


def _cycle(config: Optimizer, steps: int) -> optax.Schedule:
    """One warm-up and decay."""
    warmup = config.schedule.warmup_steps

    def schedule(count: Array) -> Array:
        count = jnp.asarray(count, jnp.float32)
        factor = config.schedule.decay(count, steps)
        return config.learning_rate * factor * jnp.minimum(1.0, (count + 1.0) / (warmup + 1.0))

    return schedule


def describe_change(before: Config, after: Config, done: int) -> str:
    """How the learning rate changes when a run is continued; empty if its schedule is unchanged.

    Args:
        before: the run's config.
        after: the config that continues it.
        done: number of steps already done.

    Raises:
        UserError: restarts before that step differ, and the schedule would not be the one of the training so far.
    """
    changed = {
        step for step in {*before.optimizer.schedule.restarts} ^ {*after.optimizer.schedule.restarts} if step < done
    }
    taken = " ".join(str(step) for step in before.optimizer.schedule.restarts if step < done)
    require(
        not changed,
        f"optimizer.schedule.restarts before step {done}, which this run has taken, must stay as they were, {taken or 'none'}; "
        f"got {' '.join(map(str, after.optimizer.schedule.restarts)) or 'none'}. "
        + (
            f"Give --optimizer.schedule.restarts {taken} to keep the schedule"
            if taken
            else "Leave them out to keep the schedule"
        )
        + f", or --optimizer.schedule.restarts {f'{taken} {done}'.strip()} to begin a new one now.",
    )
    old, new = (make_schedule(c.optimizer, c.training.steps) for c in (before, after))
    if done == 0 or (before.optimizer, before.training.steps) == (after.optimizer, after.training.steps):
        return ""
    last, following = float(jnp.asarray(old(done - 1))), float(jnp.asarray(new(done)))
    text = f"learning rate {last:.3g} at step {done}, {following:.3g} at step {done + 1}"
    if done in after.optimizer.schedule.restarts:
        return f"{text}: a new schedule begins."
    return (
        f"{text}, as a schedule over {after.training.steps} steps has it; --optimizer.schedule.restarts "
        f"{' '.join(map(str, (*before.optimizer.schedule.restarts, done)))} begins a new one, with warm-up and decay, over the "
        "added steps."
    )
