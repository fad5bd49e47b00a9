"""A loss that reads the logits once, and once more for its gradient: accelerators have slow memory and fast arithmetic."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.ops.losses import LogitSummary, logit_of


def summarize(logits: Float[Array, "*B V"], targets: Int[Array, "*B"], with_mean: bool = False) -> LogitSummary:
    """`ops.losses.summarize` in one pass over the logits, with a gradient in one more pass.

    Plain JAX reads the logits for the maximum and again for the sum of exponentials. It adds the gradient of the target's logit
    by a scatter into an array of the logits' size. Here, one reduction computes maximum, sum and argmax (Milakov and Gimelshein
    2018). The gradient is one expression of the logits, which the compiler writes in the type of the next product.

    There is no forward-mode derivative. Reverse-mode derivatives of every order equal the reference's.

    Args:
        logits: float32, one row per token.
        targets: from 0 up to V; other ids give an undefined `target`.
        with_mean: also compute the mean of the possible tokens' logits.
    """
    return _summarize(with_mean, logits, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summarize(with_mean: bool, logits: Array, targets: Array) -> LogitSummary:
    axis = logits.ndim - 1
    operands: tuple[Array, ...] = (
        logits,
        jnp.ones_like(logits),
        jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis),
    )
    initial: tuple[Any, ...] = (jnp.float32(-jnp.inf), jnp.float32(0), jnp.int32(logits.shape[-1]))
    if with_mean:
        possible = logits > -jnp.inf
        operands += (jnp.where(possible, logits, 0.0), possible.astype(jnp.float32))
        initial += (jnp.float32(0), jnp.float32(0))
    peak, total, best, *sums = jax.lax.reduce(operands, initial, _combine, (axis,))
    mean = sums[0] / sums[1] if with_mean else jnp.zeros_like(peak)
    return LogitSummary(peak + jnp.log(total), logit_of(logits, targets), mean, best)


def _combine(first: tuple[Array, ...], second: tuple[Array, ...]) -> tuple[Array, ...]:
    """Combine two parts of a row: maxima, sums of `exp(logit - maximum)`, indices of the maxima, and plain sums."""
    (peak1, total1, best1, *sums1), (peak2, total2, best2, *sums2) = first, second
    peak = jnp.maximum(peak1, peak2)
    # Where both maxima are equal the factor is 1, even for two infinities.
    total1 *= jnp.where(peak1 == peak, 1.0, jnp.exp(peak1 - peak))
    total2 *= jnp.where(peak2 == peak, 1.0, jnp.exp(peak2 - peak))
    first_is_best = (peak1 > peak2) | ((peak1 == peak2) & (best1 < best2))
    sums = (a + b for a, b in zip(sums1, sums2, strict=True))
    return peak, total1 + total2, jnp.where(first_is_best, best1, best2), *sums


def _forward(with_mean: bool, logits: Array, targets: Array) -> tuple[LogitSummary, Any]:
    # Second derivatives differentiate this function, by the same rule: the reduction has no derivative of its own.
    found: Any = _summarize(with_mean, logits, targets)
    return found, (logits, targets, found.log_normalizer)


def _backward(with_mean: bool, residuals: Any, gradient: LogitSummary) -> tuple[Array, None]:
    logits, targets, log_normalizer = residuals
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    of_normalizer = gradient.log_normalizer[..., None] * jnp.exp(logits - log_normalizer[..., None])
    of_logits = of_normalizer + jnp.where(ids == targets[..., None], gradient.target[..., None], 0.0)
    if with_mean:
        possible = logits > -jnp.inf
        share = gradient.mean / jnp.sum(possible.astype(jnp.float32), axis=-1)
        of_logits += jnp.where(possible, share[..., None], 0.0)
    return of_logits, None


_summarize.defvjp(_forward, _backward)
