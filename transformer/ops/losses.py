"""Cross-entropy of logits, with label smoothing and z-loss; targets of weight 0 are left out."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LogitSummary(NamedTuple):
    """Summary of the logits of each target that a loss needs; float32 except `best`."""

    log_normalizer: Array  # [*B], log sum_v exp(logit)
    target: Array  # [*B], the logit of the target; undefined for a target outside the vocabulary
    mean: Array  # [*B], mean of the logits of possible tokens (above -inf); 0 if not computed
    best: Array  # int32 [*B], the most likely token; the first of equals


Summarize = Callable[[Array, Array, bool], LogitSummary]
"""`(logits, targets, with_mean) -> LogitSummary`: the reference below, or `ops.fused_loss`."""


def summarize(logits: Float[Array, "*B V"], targets: Int[Array, "*B"], with_mean: bool = False) -> LogitSummary:
    """The reference, with derivatives of every order.

    Args:
        logits: float32, one row per token.
        targets: from 0 up to V; other ids give an undefined `target`.
        with_mean: also compute the mean.
    """
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = logit_of(logits, targets)
    mean = jnp.zeros_like(target)
    if with_mean:
        possible = logits > -jnp.inf
        mean = jnp.mean(jnp.where(possible, logits, 0.0), axis=-1, where=possible)
    return LogitSummary(log_normalizer, target, mean, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def logit_of(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The logit of each target; an arbitrary number for a target outside the vocabulary."""
    places = jnp.where(is_known(logits, targets), targets, 0)[..., None]
    return jnp.take_along_axis(logits, places, axis=-1, mode="promise_in_bounds")[..., 0]


def is_known(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Array:
    """Whether each target is in the vocabulary."""
    return (targets >= 0) & (targets < logits.shape[-1])


class TokenLoss(NamedTuple):
    """Loss of each target, float32."""

    loss: Array  # [*B], the training loss
    nll: Array  # [*B], negative log-likelihood, nats
    correct: Array  # [*B], 1 where the target is the most likely token, else 0


def cross_entropy(
    logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    summarize: Summarize = summarize,
) -> TokenLoss:
    """The training loss and the plain negative log-likelihood of each target, in nats, and whether the best guess hit it.

    With `p = softmax(logits)`, the training loss is
    `-(1 - s) log p[target] - s * mean_v log p[v] + z * (logsumexp logits)^2`, where `s` is `label_smoothing`
    (Szegedy et al. 2016, section 7) and `z` is `z_loss` (Chowdhery et al. 2022, section 5). The likelihood has
    neither term; scores are therefore comparable between runs.

    A logit of -inf marks an impossible token. Smoothing is over the other tokens, and the loss is finite unless the target is
    impossible. A target outside 0 ... V-1 gives NaN; `counted_only` removes such targets where their weight is 0.

    Args:
        logits: any floating-point type.
        targets: int32.
        label_smoothing: s, from 0 to 1.
        z_loss: z, at least 0.
        summarize: how the logits are read: the default has every derivative, `ops.fused_loss.summarize` reads them once.

    Example:
        >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).nll[0]), 4)
        1.3863
    """
    logits = logits.astype(jnp.float32)
    found = summarize(logits, targets, label_smoothing > 0)
    nll = jnp.where(is_known(logits, targets), found.log_normalizer - found.target, jnp.nan)
    loss = nll
    if label_smoothing:
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (found.log_normalizer - found.mean)
    if z_loss:
        loss = loss + z_loss * jnp.square(found.log_normalizer)
    return TokenLoss(loss, nll, (found.best == targets).astype(jnp.float32))


def counted_only(
    weights: Float[Array, "*B"], predicted: Float[Array, "*B X"], targets: Int[Array, "*B"]
) -> tuple[Float[Array, "*B X"], Int[Array, "*B"]]:
    """Logits (or hidden states) and targets, with zeros where the weight is 0: multiplying by 0 would not remove a NaN.

    >>> counted_only(jnp.array([1.0, 0.0]), jnp.array([[2.0], [jnp.nan]]), jnp.array([0, -100]))[1].tolist()
    [0, 0]
    """
    counted = weights != 0
    return jnp.where(counted[..., None], predicted, 0), jnp.where(counted, targets, 0)
