"""Draws the next token from logits: repetition penalty, greedy, temperature, top-k, top-p, min-p."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.types import Leaf, UserError
from transformer.validation import Settings, require, require_at_least

NO_TOKEN = -2
"""Marks a token that could not be drawn; different from -1, which means no end-of-text."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    """How the next token is drawn; the filters apply in the order of the fields, after the repetition penalty.

    >>> greedy, creative = SamplingConfig(temperature=0), SamplingConfig(temperature=0.8, top_k=40, top_p=0.95)
    """

    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most likely token each time (among ties, the lowest id)."""
    top_k: int = 0
    """Draw among this many most likely tokens (among ties, the lowest ids); 0 means all."""
    top_p: float = 1.0
    """Draw among the fewest most likely tokens that together reach this probability (ties as for top_k)."""
    min_p: float = 0.0
    """Draw among the tokens at least this many times as likely as the most likely one; 0 means all (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """For tokens that occur in the row, prompt included: positive logits are divided by this number, negative ones multiplied.
    Above 1, tokens are repeated less often (Keskar et al. 2019, section 4.1)."""

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
        """Whether each token is the most likely one, without random draws."""
        return self.temperature == 0 or self.top_k == 1


GREEDY = SamplingConfig(temperature=0)
"""The most likely token each time."""


def sample_tokens(logits_BV: Float[Array, "B V"], keys_B: Leaf, config: SamplingConfig) -> Int[Array, " B"]:
    """Draw one token for each row; `NO_TOKEN` if a row's logits include NaN or +inf, or are all -inf.

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


def only_drawable(logits_BV: Float[Array, "B V"], drawable_V: Array | np.ndarray | None) -> Float[Array, "B V"]:
    """Logits with -inf for tokens that may not be drawn; None allows all. Logits with NaN or inf are unchanged."""
    if drawable_V is None:
        return logits_BV
    broken_B1 = ~jnp.isfinite(jnp.max(logits_BV, axis=-1, keepdims=True))
    return jnp.where(broken_B1 | jnp.asarray(drawable_V)[None], logits_BV, -jnp.inf)


def check_drawable(drawable: np.ndarray | None, vocab_size: int) -> None:
    """Raise UserError unless `drawable` has a truth value for each token, and one is true."""
    require(
        drawable is None or (drawable.shape == (vocab_size,) and bool(drawable.any())),
        f"drawable must be a truth value for each of vocab_size={vocab_size} tokens, one of them true, got "
        f"{None if drawable is None else drawable.shape}.",
    )


def penalize(
    logits_BV: Float[Array, "B V"], tokens_BP: Int[Array, "B P"], lengths_B: Int[Array, " B"], penalty: float
) -> Float[Array, "B V"]:
    """Penalize the logits of the first `lengths_B` tokens of each row, each token once (Keskar et al. 2019).

    >>> penalize(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[0, 1, 0, 2]]), jnp.array([3]), 2.0).tolist()
    [[1.0, -4.0, 2.0]]
    """
    B, V = logits_BV.shape
    counts_BP = jnp.arange(tokens_BP.shape[1])[None] < lengths_B[:, None]
    # Positions without a token get the index V, beyond the vocabulary, which `mode="drop"` ignores.
    tokens_BP = jnp.where(counts_BP & (tokens_BP >= 0), tokens_BP, V)
    seen_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], tokens_BP].set(True, mode="drop")
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def check_drawn(tokens_BN: Int[np.ndarray, "B N"], read_B: Int[np.ndarray, " B"], what: str = "") -> None:
    """Raise UserError if a token of a prompt or of `what` could not be drawn; `read_B` counts the tokens before."""
    for row, column in np.argwhere(tokens_BN == NO_TOKEN):
        raise UserError(
            f"Logits must be finite, the logits of {what or f'prompt {row}'} are NaN or inf after {read_B[row] + column} tokens; "
            "the parameters are not finite, or overflow in half precision: use an earlier checkpoint, or dtype=float32."
        )


def filter_logits(logits_BV: Float[Array, "B V"], config: SamplingConfig) -> Float[Array, "B V"]:
    """Logits of the sampling distribution, -inf for excluded tokens (temperature above 0).

    Top-k follows Fan et al. 2018 (section 5.4). Top-p follows Holtzman et al. 2020 (section 3.1), applied to the result of
    top-k. Min-p follows Nguyen et al. 2024 (section 3.1).

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
    """Logits of the tokens in top-k and top-p, -inf for others."""
    B, V = logits_BV.shape
    num_kept = min(config.top_k or V, V)
    if num_kept == V and config.top_p == 1:
        return logits_BV
    # From the most to the least likely, ties in the order of ids.
    sorted_BK, order_BK = jax.lax.top_k(logits_BV, num_kept)
    kept_BK = jnp.ones((B, num_kept), bool)
    if config.top_p < 1:
        # A token stays if the tokens before it do not reach top_p; the first one always stays.
        reached_BK = jnp.cumsum(jax.nn.softmax(sorted_BK, axis=-1), axis=-1)
        kept_BK = jnp.pad(reached_BK[:, :-1], ((0, 0), (1, 0))) < config.top_p
    kept_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], order_BK].set(kept_BK)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)
