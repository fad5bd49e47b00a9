"""One step of beam search as in Hugging Face's transformers: from logits to growing and finished beams."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from transformer.types import Leaf, PyTree

NOTHING = -1e9
"""The score of a missing beam: below any log-probability, but finite, so that sums with it are finite too."""


class Limits(NamedTuple):
    """End and allowed tokens of continuations."""

    ends_E: Leaf  # int32 [E]
    drawable_V: Leaf  # bool [V], None for all
    num_new: Leaf  # int32, most new tokens


class State(NamedTuple):
    """M growing and M finished beams of each row, each by descending score."""

    tokens_BMN: Int[Array, "B M N"]
    scores_BM: Float[Array, "B M"]  # log-probabilities
    done_BMN: Int[Array, "B M N"]
    done_lengths_BM: Int[Array, "B M"]
    done_scores_BM: Float[Array, "B M"]  # divided by a power of the length
    is_done_BM: Bool[Array, "B M"]
    open_B: Bool[Array, " B"]  # whether a growing beam can still become one of the best
    num_tokens: Int[Array, ""]  # tokens of each growing beam
    broken_B: Int[Array, " B"]  # number of tokens before the first logits that are not finite, -1 if all are finite
    cache: PyTree


def init_state(open_B: Bool[Array, " B"], num_beams: int, room: int, cache: PyTree) -> State:
    """The state before the first token: one beam, so that no continuation is found several times."""
    B, M = len(open_B), num_beams
    nothing_BM = jnp.full((B, M), NOTHING, jnp.float32)
    tokens_BMN, zeros_BM = jnp.zeros((B, M, room), jnp.int32), jnp.zeros((B, M), jnp.int32)
    return State(
        tokens_BMN=tokens_BMN,
        scores_BM=nothing_BM.at[:, 0].set(0),
        done_BMN=tokens_BMN,
        done_lengths_BM=zeros_BM,
        done_scores_BM=nothing_BM,
        # The search does not wait for padding rows of the batch.
        is_done_BM=jnp.broadcast_to(~open_B[:, None], (B, M)),
        open_B=open_B,
        num_tokens=jnp.int32(0),
        broken_B=jnp.full((B,), -1, jnp.int32),
        cache=cache,
    )


def should_continue(state: State, limits: Limits, early_stopping: bool | str) -> Bool[Array, ""]:
    """Whether any row may still find a better continuation."""
    remain = jnp.any(state.open_B) & (state.num_tokens < limits.num_new) & jnp.all(state.broken_B < 0)
    return remain & ~jnp.all(state.is_done_BM) if early_stopping is True else remain


def grow(
    state: State, logits_BMV: Float[Array, "B M V"], limits: Limits, length_penalty: float, early_stopping: bool | str
) -> tuple[State, Int[Array, "B M"]]:
    """Extend the beams by one token; also returns each beam's parent, its index in the row, for the cache."""
    B, M, V = logits_BMV.shape
    exists_BM = state.scores_BM > NOTHING / 2
    broken_B = jnp.any(exists_BM & ~jnp.isfinite(jnp.max(logits_BMV, axis=-1)), axis=1)
    logp_BMV = jax.nn.log_softmax(logits_BMV.astype(jnp.float32), axis=-1)
    if limits.drawable_V is not None:
        logp_BMV = jnp.where(jnp.asarray(limits.drawable_V)[None, None], logp_BMV, -jnp.inf)
    # M candidates must remain if all others end.
    num_kept = min(max(2, 1 + len(limits.ends_E)) * M, M * V)
    sums_BK, index_BK = jax.lax.top_k((state.scores_BM[:, :, None] + logp_BMV).reshape(B, M * V), num_kept)
    parents_BK, new_BK = index_BK // V, index_BK % V
    tokens_BKN = _take(state.tokens_BMN, parents_BK).at[:, :, state.num_tokens].set(new_BK)
    num_tokens = state.num_tokens + 1
    ends_BK = jnp.isin(new_BK, limits.ends_E) | (num_tokens >= limits.num_new)

    scores_BM, chosen_BM = jax.lax.top_k(jnp.where(ends_BK, sums_BK + NOTHING, sums_BK), M)
    state = state._replace(
        tokens_BMN=_take(tokens_BKN, chosen_BM),
        scores_BM=scores_BM,
        num_tokens=num_tokens,
        broken_B=jnp.where(broken_B & (state.broken_B < 0), state.num_tokens, state.broken_B),
    )
    state = _finish(state, tokens_BKN, sums_BK, ends_BK, length_penalty, early_stopping)
    # Compare the best possible score of a growing beam with the worst score of the finished ones.
    longest = limits.num_new if early_stopping == "never" and length_penalty > 0 else num_tokens
    possible_B1 = scores_BM[:, :1] / _power(longest, length_penalty)
    worst_B1 = jnp.min(state.done_scores_BM, axis=1, keepdims=True)
    better_B = jnp.any(possible_B1 > jnp.where(state.is_done_BM, worst_B1, NOTHING), axis=1)
    return state._replace(open_B=state.open_B & better_B), _take(parents_BK, chosen_BM)


def _finish(
    state: State,
    tokens_BKN: Int[Array, "B K N"],
    sums_BK: Float[Array, "B K"],
    ends_BK: Bool[Array, "B K"],
    length_penalty: float,
    early_stopping: bool | str,
) -> State:
    """Add candidates that end to the finished beams, if they are among the first M candidates."""
    M, K = state.scores_BM.shape[1], sums_BK.shape[1]
    takes_B = state.open_B & ~jnp.all(state.is_done_BM, axis=1) if early_stopping is True else state.open_B
    joins_BK = ends_BK & (jnp.arange(K)[None] < M) & takes_B[:, None] & (sums_BK > NOTHING / 2)
    scores_BK = jnp.where(joins_BK, sums_BK / _power(state.num_tokens, length_penalty), NOTHING)
    scores_BM, chosen_BM = jax.lax.top_k(jnp.concatenate([state.done_scores_BM, scores_BK], axis=1), M)
    lengths_BK = jnp.full_like(tokens_BKN[:, :, 0], state.num_tokens)
    return state._replace(
        done_BMN=_take(jnp.concatenate([state.done_BMN, tokens_BKN], axis=1), chosen_BM),
        done_lengths_BM=_take(jnp.concatenate([state.done_lengths_BM, lengths_BK], axis=1), chosen_BM),
        done_scores_BM=scores_BM,
        is_done_BM=_take(jnp.concatenate([state.is_done_BM, joins_BK], axis=1), chosen_BM),
    )


def _power(length: Any, penalty: float) -> Float[Array, ""]:
    return jnp.asarray(length, jnp.float32) ** penalty


def _take(values: Array, chosen: Int[Array, "B M"]) -> Array:
    """The chosen beams of each row."""
    return jnp.take_along_axis(values, chosen.reshape(chosen.shape + (1,) * (values.ndim - 2)), axis=1)
