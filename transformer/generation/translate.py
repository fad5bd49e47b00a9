"""Turn sources into targets with an encoder-decoder: read the source once, then one compiled loop, greedily."""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from transformer.generation.sampling import (
    NO_TOKEN,
    SamplingConfig,
    check_drawable,
    check_drawn,
    only_drawable,
    sample_tokens,
)
from transformer.memory import check_cache
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.ops.ids import check_ids, token_rows
from transformer.types import PyTree
from transformer.validation import require

# Sources are padded to a multiple, so that few programs are compiled.
_LENGTH_UNIT = 16
_GREEDY = SamplingConfig(temperature=0)


class _Draw(NamedTuple):
    """Where a target starts and ends, and what may be drawn."""

    start: Any  # int32
    stop_E: Any  # int32
    drawable_V: Any  # bool, None for all


class _State(NamedTuple):
    """Targets as they grow: the token that starts them, the tokens drawn, then zeros."""

    tokens_BP: Int[Array, "B P"]
    count: Int[Array, ""]
    ended_B: Bool[Array, " B"]
    cache: Any


def translate(
    model: EncoderDecoder,
    params: PyTree,
    sources: Sequence[Sequence[int] | np.ndarray],
    *,
    end_of_text: int | Sequence[int],
    max_new_tokens: int,
    batch_size: int = 64,
    start: int = -1,
    drawable: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The most likely next token, again and again until end-of-text, for each source.

    Args:
        model: an encoder-decoder.
        params: its parameters.
        sources: tokens of each, as the model was trained on (with end-of-text at their end).
        end_of_text: the token that starts a target, and at which it ends; of several, each ends one.
        max_new_tokens: the longest target, at most the model's max_length, if it has one.
        batch_size: sources that are read together, those of similar length.
        start: the token that starts a target; -1: end_of_text.
        drawable: which tokens may be drawn, bool [V]; None for all.

    Returns:
        The tokens of each target, in the order of the sources, without end-of-text.

    Raises:
        ValueError: if a source is empty, holds a token outside the vocabulary, or too much is asked for; or if logits are NaN.
    """
    config = model.config
    rows = token_rows(sources, model.source_vocab_size or config.vocab_size, "source")
    stop_E = np.atleast_1d(np.asarray(end_of_text, np.int32))
    check_ids(stop_E, config.vocab_size, "end_of_text")
    start = int(stop_E[0]) if start < 0 else start
    check_ids(start, config.vocab_size, "start")
    check_drawable(drawable, config.vocab_size)
    draw = _Draw(np.int32(start), stop_E, drawable)
    limit = config.max_length or max_new_tokens
    require(
        1 <= max_new_tokens <= limit,
        f"max_new_tokens must be at least 1 and at most max_length={limit}, got {max_new_tokens}.",
    )
    check_cache(config, batch_size, max_new_tokens)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    targets: list[np.ndarray] = [np.empty(0, np.int32)] * len(rows)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(rows[index]) for index in chosen)
        length = max(longest, min(-(-longest // _LENGTH_UNIT) * _LENGTH_UNIT, config.max_length or sys.maxsize))
        source_BS, segment_ids_BS = np.zeros((2, batch_size, length), np.int32)
        for row, index in enumerate(chosen):
            source_BS[row, : len(rows[index])], segment_ids_BS[row, : len(rows[index])] = rows[index], 1
        tokens_BN = _translate(model, params, source_BS, segment_ids_BS, draw, max_new_tokens=max_new_tokens)
        for index, tokens in zip(chosen, np.asarray(tokens_BN), strict=False):
            check_drawn(tokens[None], np.array([0]), f"the target of source {index}")
            ended = np.flatnonzero(np.isin(tokens, stop_E))
            targets[index] = tokens[: ended[0]] if len(ended) else tokens
    return targets


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def _translate(
    model: EncoderDecoder,
    params: PyTree,
    source_BS: Int[Array, "B S"],
    segment_ids_BS: Int[Array, "B S"],
    draw: _Draw,
    *,
    max_new_tokens: int,
) -> Int[Array, "B N"]:
    batch_size = source_BS.shape[0]
    variables = {"params": params}

    def decode(tokens_B1: Array, cache: Any, memory_BSD: Any = None) -> Any:
        return model.apply(
            variables, tokens_B1, memory_BSD, source_segment_ids_BS=segment_ids_BS, cache=cache, method="decode"
        )

    def append(state: _State, logits_B1V: Array, cache: Any) -> _State:
        best_B = sample_tokens(only_drawable(logits_B1V[:, 0], draw.drawable_V), None, _GREEDY)
        best_B = jnp.where(state.ended_B, draw.stop_E[0], best_B)
        tokens_BP = jax.lax.dynamic_update_slice(state.tokens_BP, best_B[:, None], (0, state.count))
        ended_B = state.ended_B | jnp.isin(best_B, draw.stop_E) | (best_B == NO_TOKEN)
        return _State(tokens_BP, state.count + 1, ended_B, cache)

    def goes_on(state: _State) -> Bool[Array, ""]:
        return (state.count <= max_new_tokens) & ~jnp.all(state.ended_B)

    def step(state: _State) -> _State:
        last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BP, state.count - 1, 1, axis=1)
        return append(state, *decode(last_B1, state.cache))

    tokens_BP = jnp.full((batch_size, max_new_tokens + 1), draw.start, jnp.int32)
    # A row that only fills up the batch has nothing to say.
    ended_B = jnp.all(segment_ids_BS == 0, axis=1)
    state = _State(tokens_BP, jnp.int32(1), ended_B, model.init_cache(batch_size, max_new_tokens))
    memory_BSD = model.apply(variables, source_BS, segment_ids_BS=segment_ids_BS, method="encode")
    state = append(state, *decode(state.tokens_BP[:, :1], state.cache, memory_BSD))
    return jax.lax.while_loop(goes_on, step, state).tokens_BP[:, 1:]
