"""Cross-entropy of logits, with label smoothing and z-loss, and what does not count left out."""

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

    A logit of -inf is that of an impossible token: smoothing is over the others, and the loss is finite unless such a token is
    the target. A target outside 0 ... V-1 gives NaN; `counted_only` takes out those that do not count.

    Example:
        >>> loss, nll = cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
        >>> round(float(nll[0]), 4)
        1.3863
    """
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    known = (targets >= 0) & (targets < logits.shape[-1])
    places = jnp.where(known, targets, 0)[..., None]
    target_logits = jnp.take_along_axis(logits, places, axis=-1, mode="promise_in_bounds")[..., 0]
    nll = jnp.where(known, log_normalizer - target_logits, jnp.nan)
    loss = nll
    if label_smoothing:
        possible = logits > -jnp.inf
        smooth = log_normalizer - jnp.mean(jnp.where(possible, logits, 0.0), axis=-1, where=possible)
        loss = (1.0 - label_smoothing) * nll + label_smoothing * smooth
    if z_loss:
        loss = loss + z_loss * jnp.square(log_normalizer)
    return loss, nll


def counted_only(
    weights: Float[Array, "*B"], predicted: Float[Array, "*B X"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B X"], Int[Array, "*B"]]:
    """Logits (or hidden states) and targets, zeros where the weight is 0: to multiply a loss by 0 is not enough if it is NaN.

    >>> counted_only(jnp.array([1.0, 0.0]), jnp.array([[2.0], [jnp.nan]]), jnp.array([0, -100]))[1].tolist()
    [0, 0]
    """
    counted = weights != 0
    return jnp.where(counted[..., None], predicted, 0), jnp.where(counted, targets, 0)
