"""Cross-entropy of logits, with label smoothing and z-loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Per-target training loss and plain negative log-likelihood, both in nats and float32.

    With `p = softmax(logits)`, the training loss is
    `-(1 - s) log p[target] - s * mean_v log p[v] + z * (logsumexp logits)^2`, where `s` is `label_smoothing`
    (Szegedy et al. 2016, section 7) and `z` is `z_loss` (Chowdhery et al. 2022, section 5). The likelihood has
    neither term, so that scores are comparable between runs.

    Example:
        >>> loss, nll = cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
        >>> round(float(nll[0]), 4)
        1.3863
    """
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_normalizer - target_logits
    loss = nll
    if label_smoothing:
        smooth = log_normalizer - jnp.mean(logits, axis=-1)
        loss = (1.0 - label_smoothing) * nll + label_smoothing * smooth
    if z_loss:
        loss = loss + z_loss * jnp.square(log_normalizer)
    return loss, nll
