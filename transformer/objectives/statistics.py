"""The sums over weighted targets that every objective with a cross-entropy reports."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.config import ObjectiveConfig
from transformer.ops.losses import cross_entropy
from transformer.types import Statistics


def token_statistics(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], weights: Float[Array, "*B"], config: ObjectiveConfig
) -> Statistics:
    """Sums over targets, float32.

    `loss` (negative log-likelihood, nats), `weight` (targets), `correct` (targets that were the most likely), and
    `objective` (what is minimised: the loss with label smoothing and z-loss).
    """
    objective, nll = cross_entropy(logits, targets, label_smoothing=config.label_smoothing, z_loss=config.z_loss)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return {
        "loss": jnp.sum(nll * weights),
        "weight": jnp.sum(weights),
        "correct": jnp.sum(correct * weights),
        "objective": jnp.sum(objective * weights),
    }
