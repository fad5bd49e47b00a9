"""Learning rates as functions of the step."""

import itertools

import jax.numpy as jnp
import optax

from transformer.config import Config, OptimizerConfig
from transformer.types import Array
from transformer.validation import require


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """`count -> learning rate`, where `count` is the number of steps already done.

    Warm-up is a straight line that would be 0 one step before the first and is at the peak after `warmup_steps`
    steps, so no step is spent on a learning rate of 0. Then, with progress 0 at the peak and 1 at the last step:

        cosine        final + (1 - final) * (1 + cos(pi * progress)) / 2   (Loshchilov and Hutter 2017)
        linear        1 + (final - 1) * progress
        inverse_sqrt  sqrt((warmup_steps + 1) / (count + 1))               (Vaswani et al. 2017, section 5.3)
        constant      1
        wsd           1, then linear over the last `decay_fraction` steps  (Hu et al. 2024, section 4)

    each times `learning_rate`, `final` being `final_fraction`. After each of `config.restarts` all of this begins anew, over the
    steps to the next one or the last.
    """
    bounds = (0, *config.restarts, steps)
    cycles = [_cycle(config, end - begin) for begin, end in itertools.pairwise(bounds)]
    return cycles[0] if len(cycles) == 1 else optax.join_schedules(cycles, list(config.restarts))


def _cycle(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """One warm-up and decay."""
    warmup, final = config.warmup_steps, config.final_fraction
    last = max(steps - 1, warmup + 1)
    decay_start = max(warmup, round(last - config.decay_fraction * steps)) if config.schedule == "wsd" else warmup

    def schedule(count: Array) -> Array:
        count = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((count - decay_start) / max(last - decay_start, 1), 0.0, 1.0)
        if config.schedule == "cosine":
            factor = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif config.schedule in ("linear", "wsd"):
            factor = 1.0 + (final - 1.0) * progress
        elif config.schedule == "inverse_sqrt":
            factor = jnp.sqrt((warmup + 1.0) / (jnp.maximum(count, warmup) + 1.0))
        else:
            factor = jnp.ones_like(count)
        return config.learning_rate * factor * jnp.minimum(1.0, (count + 1.0) / (warmup + 1.0))

    return schedule


def describe_change(before: Config, after: Config, done: int) -> str:
    """What becomes of the learning rate when a run goes on; empty where its schedule stays.

    Args:
        before: the config that the run has.
        after: the config that it goes on with.
        done: steps that it has taken.

    Raises:
        UserError: restarts before that step differ, so that the schedule would not be the one that was trained with.
    """
    changed = {step for step in {*before.optimizer.restarts} ^ {*after.optimizer.restarts} if step < done}
    taken = " ".join(str(step) for step in before.optimizer.restarts if step < done)
    require(
        not changed,
        f"optimizer.restarts before step {done}, which this run has taken, must stay as they were, {taken or 'none'}; "
        f"got {' '.join(map(str, after.optimizer.restarts)) or 'none'}. "
        + (
            f"Give --optimizer.restarts {taken} to keep the schedule"
            if taken
            else "Leave them out to keep the schedule"
        )
        + f", or --optimizer.restarts {f'{taken} {done}'.strip()} to begin a new one now.",
    )
    old, new = (make_schedule(c.optimizer, c.training.steps) for c in (before, after))
    if done == 0 or (before.optimizer, before.training.steps) == (after.optimizer, after.training.steps):
        return ""
    last, following = float(jnp.asarray(old(done - 1))), float(jnp.asarray(new(done)))
    text = f"learning rate {last:.3g} at step {done}, {following:.3g} at step {done + 1}"
    if done in after.optimizer.restarts:
        return f"{text}: a new schedule begins."
    return (
        f"{text}, as a schedule over {after.training.steps} steps has it; --optimizer.restarts "
        f"{' '.join(map(str, (*before.optimizer.restarts, done)))} begins a new one, with warm-up and decay, over the added "
        "steps."
    )
