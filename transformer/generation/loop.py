"""The generation loop of decoders and encoder-decoders: one token of every row at a time, until all rows have ended."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from transformer.generation.sampling import NO_TOKEN, SamplingConfig, only_drawable, penalize, sample_tokens
from transformer.types import Leaf, PyTree

Step = Callable[[Int[Array, "B 1"], Any], tuple[Float[Array, "B 1 V"], Any]]
"""The model: maps the latest token of each row and the cache to logits and the updated cache."""


class State(NamedTuple):
    """Growing rows: read tokens, new tokens, then zeros."""

    tokens_BP: Int[Array, "B P"]
    lengths_B: Int[Array, " B"]
    num_new: Int[Array, ""]
    ended_B: Bool[Array, " B"]
    cache: PyTree


class Draw(NamedTuple):
    """The inputs of sampling besides the logits."""

    key: Leaf
    rows_B: Leaf  # int32 [B], the number of each row
    ends_E: Leaf  # int32 [E], the ids at which a row ends
    drawable_V: Leaf  # bool [V], the ids that may be drawn; None for all


def extend(state: State, num_new: int | Array, step: Step, draw: Draw, sampling: SamplingConfig) -> State:
    """Draw tokens until each row has `num_new` new ones or all rows have ended."""

    def should_continue(state: State) -> Bool[Array, ""]:
        return (state.num_new < num_new) & ~jnp.all(state.ended_B)

    def decode_one(state: State) -> State:
        logits_B1V, cache = step(last_tokens(state.tokens_BP, state.lengths_B), state.cache)
        return append(state._replace(cache=cache), logits_B1V[:, 0], draw, sampling)

    return jax.lax.while_loop(should_continue, decode_one, state)


def append(state: State, logits_BV: Float[Array, "B V"], draw: Draw, sampling: SamplingConfig) -> State:
    """Draw the next token of each row; an ended row repeats its last token, a row without finite logits ends."""
    keys_B = row_keys(draw, state.lengths_B)
    logits_BV = adjusted_logits(logits_BV, state.tokens_BP, state.lengths_B, draw, sampling)
    last_B1 = last_tokens(state.tokens_BP, state.lengths_B)
    tokens_B = jnp.where(state.ended_B, last_B1[:, 0], sample_tokens(logits_BV, keys_B, sampling))
    return State(
        tokens_BP=state.tokens_BP.at[jnp.arange(len(tokens_B)), state.lengths_B].set(tokens_B),
        lengths_B=state.lengths_B + 1,
        num_new=state.num_new + 1,
        ended_B=state.ended_B | jnp.isin(tokens_B, draw.ends_E) | (tokens_B == NO_TOKEN),
        cache=state.cache,
    )


def row_keys(draw: Draw, positions_B: Int[Array, " B"]) -> Array:
    """A key for each row at its position."""
    return jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(draw.key, row), position))(
        jnp.asarray(draw.rows_B), positions_B
    )


def adjusted_logits(
    logits_BV: Float[Array, "B V"],
    tokens_BP: Int[Array, "B P"],
    lengths_B: Int[Array, " B"],
    draw: Draw,
    sampling: SamplingConfig,
) -> Float[Array, "B V"]:
    """Logits restricted to drawable tokens, with the repetition penalty; before temperature and filters."""
    logits_BV = only_drawable(logits_BV, draw.drawable_V)
    if sampling.repetition_penalty != 1:
        logits_BV = penalize(logits_BV, tokens_BP, lengths_B, sampling.repetition_penalty)
    return logits_BV


def last_tokens(tokens_BP: Int[Array, "B P"], lengths_B: Int[Array, " B"]) -> Int[Array, "B 1"]:
    """The last token of each row."""
    return jnp.take_along_axis(tokens_BP, lengths_B[:, None] - 1, axis=1)
