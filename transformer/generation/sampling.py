"""From logits to the next token: repetition penalty, greedy, temperature, top-k, top-p, min-p."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.types import UserError
from transformer.validation import Settings, require, require_at_least

NO_TOKEN = -2
"""Stands for a token that could not be drawn; -1, an end-of-text that never comes, is another."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    """How the next token is drawn: penalize repetitions, divide by the temperature, keep the top k, the top p, those above min_p.

    >>> greedy, creative = SamplingConfig(temperature=0), SamplingConfig(temperature=0.8, top_k=40, top_p=0.95)
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token each time (of equals, the one with the lowest number)."""
    top_k: int = 0
    """Draw among this many most likely tokens (of equals, those with the lowest numbers); 0 means all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that together reach this probability (equals as for top_k)."""
    min_p: float = 0.0
    """Draw among the tokens at least this many times as likely as the most likely one; 0 means all (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that the row has, prompt included, where they are positive, and multiplies them where they
    are negative: above 1 tokens are repeated less (Keskar et al. 2019, section 4.1)."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "temperature", "top_k")
        require(0 < self.top_p <= 1, f"SamplingConfig.top_p must be above 0 and at most 1, got {self.top_p}.")
        require(0 <= self.min_p <= 1, f"SamplingConfig.min_p must be at least 0 and at most 1, got {self.min_p}.")
        require(
            self.repetition_penalty > 0,
            f"SamplingConfig.repetition_penalty must be above 0, where 1 is none, got {self.repetition_penalty}.",
        )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0 or self.top_k == 1


GREEDY = SamplingConfig(temperature=0)
"""The most likely token each time."""


def sample_tokens(logits_BV: Float[Array, "B V"], keys_B: Any, config: SamplingConfig) -> Int[Array, " B"]:
    """One token for each row; `NO_TOKEN` where logits have NaN or +inf among them, or are all -inf.

    Args:
        logits_BV: float32.
        keys_B: a PRNG key for each row, so that a row's draw does not depend on the others; unused if greedy.
        config: how to draw. Its penalty is not applied (`penalize`).
    """
    is_distribution_B = jnp.isfinite(jnp.max(logits_BV, axis=-1))
    if config.greedy:
        tokens_B = jnp.argmax(logits_BV, axis=-1)
    else:
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, config))
    return jnp.where(is_distribution_B, tokens_B, NO_TOKEN).astype(jnp.int32)


def only_drawable(logits_BV: Float[Array, "B V"], drawable_V: Any) -> Float[Array, "B V"]:
    """Logits with -inf for tokens that may not be drawn; None: all may. Unusable logits stay so."""
    if drawable_V is None:
        return logits_BV
    broken_B1 = ~jnp.isfinite(jnp.max(logits_BV, axis=-1, keepdims=True))
    return jnp.where(broken_B1 | jnp.asarray(drawable_V)[None], logits_BV, -jnp.inf)


def check_drawable(drawable: np.ndarray | None, vocab_size: int) -> None:
    """Raise UserError unless it says of each token whether it may be drawn, and one may."""
    require(
        drawable is None or (drawable.shape == (vocab_size,) and bool(drawable.any())),
        f"drawable must be a truth value for each of vocab_size={vocab_size} tokens, one of them true, got "
        f"{None if drawable is None else drawable.shape}.",
    )


def penalize(
    logits_BV: Float[Array, "B V"], tokens_BP: Int[Array, "B P"], lengths_B: Int[Array, " B"], penalty: float
) -> Float[Array, "B V"]:
    """Logits in which those of the first `lengths_B` tokens of each row are penalized, each once (Keskar et al. 2019).

    >>> penalize(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[0, 1, 0, 2]]), jnp.array([3]), 2.0).tolist()
    [[1.0, -4.0, 2.0]]
    """
    B, V = logits_BV.shape
    counts_BP = jnp.arange(tokens_BP.shape[1])[None] < lengths_B[:, None]
    # A position that holds no token yet, or one that could not be drawn, is beyond the vocabulary: it is dropped.
    tokens_BP = jnp.where(counts_BP & (tokens_BP >= 0), tokens_BP, V)
    seen_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], tokens_BP].set(True, mode="drop")
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def check_drawn(tokens_BN: Int[np.ndarray, "B N"], read_B: Int[np.ndarray, " B"], what: str = "") -> None:
    """Raise UserError if a token could not be drawn, after `read_B` tokens of each row, of a prompt or of `what`."""
    for row, column in np.argwhere(tokens_BN == NO_TOKEN):
        raise UserError(
            f"Logits must be numbers, those of {what or f'prompt {row}'} are NaN or inf after {read_B[row] + column} tokens; "
            "the parameters are not finite, or overflow in half precision: take an earlier checkpoint, or dtype=float32."
        )


def filter_logits(logits_BV: Float[Array, "B V"], config: SamplingConfig) -> Float[Array, "B V"]:
    """Logits of the distribution that is drawn from, -inf for what cannot be drawn (temperature above 0).

    Top-k after Fan et al. 2018 (section 5.4), top-p after Holtzman et al. 2020 (section 3.1) among what top-k kept, min-p after
    Nguyen et al. 2024 (section 3.1).

    >>> logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    >>> jnp.isfinite(filter_logits(logits, SamplingConfig(top_p=0.6)))[0].tolist()
    [False, False, True, True]
    """
    logits_BV = logits_BV / config.temperature
    if config.top_k > 0 or config.top_p < 1:
        logits_BV = _keep_top(logits_BV, config)
    if config.min_p > 0:
        # A ratio of probabilities is a difference of logits.
        lowest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(jnp.float32(config.min_p))
        logits_BV = jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
    return logits_BV


def _keep_top(logits_BV: Float[Array, "B V"], config: SamplingConfig) -> Float[Array, "B V"]:
    """Logits of the top k and top p, -inf for others."""
    B, V = logits_BV.shape
    num_kept = min(config.top_k or V, V)
    if num_kept == V and config.top_p == 1:
        return logits_BV
    # From the most to the least likely, equals in the order of their numbers.
    sorted_BK, order_BK = jax.lax.top_k(logits_BV, num_kept)
    kept_BK = jnp.ones((B, num_kept), bool)
    if config.top_p < 1:
        # A token stays if those before it do not yet reach top_p: the first always does.
        reached_BK = jnp.cumsum(jax.nn.softmax(sorted_BK, axis=-1), axis=-1)
        kept_BK = jnp.pad(reached_BK[:, :-1], ((0, 0), (1, 0))) < config.top_p
    kept_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], order_BK].set(kept_BK)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)
