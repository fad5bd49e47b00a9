"""Learning rates as functions of the step."""

import jax.numpy as jnp
import optax

from transformer.config import OptimizerConfig
from transformer.types import Array


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """`count -> learning rate`, where `count` is the number of steps already done.

    Warm-up is a straight line that would be 0 one step before the first and is at the peak after `warmup_steps`
    steps, so no step is spent on a learning rate of 0. Then, with progress 0 at the peak and 1 at the last step:

        cosine        final + (1 - final) * (1 + cos(pi * progress)) / 2   (Loshchilov and Hutter 2017)
        linear        1 + (final - 1) * progress
        inverse_sqrt  sqrt((warmup_steps + 1) / (count + 1))               (Vaswani et al. 2017, section 5.3)
        constant      1
        wsd           1, then linear over the last `decay_fraction` steps  (Hu et al. 2024, section 4)

    each times `learning_rate`, `final` being `final_fraction`.
    """
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
