"""Generates targets with an encoder-decoder: encodes each source once, then runs the loop that decoders use too."""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from transformer.generation.loop import Draw, State, append, extend
from transformer.generation.sampling import GREEDY, SamplingConfig, check_drawable, check_drawn
from transformer.memory import check_cache
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.ops.ids import check_ids, token_rows
from transformer.types import PyTree
from transformer.validation import require

# Sources are padded to a multiple, so that few programs are compiled.
_LENGTH_UNIT = 16


def translate(
    model: EncoderDecoder,
    params: PyTree,
    sources: Sequence[Sequence[int] | np.ndarray],
    *,
    end_of_text: int | Sequence[int],
    max_new_tokens: int,
    batch_size: int = 64,
    start: int = -1,
    sampling: SamplingConfig = GREEDY,
    seed: int = 0,
    drawable: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Generate a target for each source, by default with the most likely token each time.

    Args:
        model: an encoder-decoder.
        params: its parameters.
        sources: tokens of each source, encoded as in training (with end-of-text at the end).
        end_of_text: the token that starts and ends a target; of several, each ends a target.
        max_new_tokens: length of the longest target, at most the model's max_length, if it has one.
        batch_size: sources of a batch, which have similar lengths.
        start: the first token of a target; -1 means the first of end_of_text.
        sampling: how tokens are drawn. A repetition penalty applies to tokens of the target, `start` included.
        seed: a draw depends only on the seed, the source's index and the token's position.
        drawable: the tokens that may be drawn, bool [V]; None for all.

    Returns:
        The tokens of each target, in the order of the sources, without end-of-text.

    Raises:
        ValueError: a source is empty or has a token outside the vocabulary, max_new_tokens exceeds the model's length, or
            logits are NaN.
    """
    config = model.config
    rows = token_rows(sources, model.source_vocab_size or config.vocab_size, "source")
    first, ends_E = start_and_ends(start, end_of_text, config.vocab_size)
    check_drawable(drawable, config.vocab_size)
    limit = config.max_length or max_new_tokens
    require(
        1 <= max_new_tokens <= limit,
        f"max_new_tokens must be at least 1 and at most max_length={limit}, got {max_new_tokens}.",
    )
    check_cache(config.decoder, batch_size, max_new_tokens)
    options: Any = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    targets: list[np.ndarray] = [np.empty(0, np.int32)] * len(rows)
    for chosen, source_BS, segment_ids_BS in source_batches(rows, batch_size, config.max_length):
        numbers_B = np.array([*chosen, *[0] * (batch_size - len(chosen))], np.int32)
        draw = Draw(jax.random.key(seed), numbers_B, ends_E, drawable)
        arrays = source_BS, segment_ids_BS, np.int32(first), draw
        tokens_BN = _translate(model, params, *arrays, **options)
        for index, tokens in zip(chosen, np.asarray(tokens_BN), strict=False):
            check_drawn(tokens[None], np.array([0]), f"the target of source {index}")
            ended = np.flatnonzero(np.isin(tokens, ends_E))
            targets[index] = tokens[: ended[0]] if len(ended) else tokens
    return targets


def start_and_ends(start: int, end_of_text: int | Sequence[int], vocab_size: int) -> tuple[int, Int[np.ndarray, " E"]]:
    """The token that starts a target, and the tokens that end it."""
    ends_E = np.atleast_1d(np.asarray(end_of_text))
    check_ids(ends_E, vocab_size, "end_of_text")
    start = int(ends_E[0]) if start < 0 else start
    check_ids(start, vocab_size, "start")
    return start, ends_E.astype(np.int32)


def source_batches(
    rows: Sequence[np.ndarray], batch_size: int, max_length: int
) -> Iterator[tuple[list[int], Int[np.ndarray, "B S"], Int[np.ndarray, "B S"]]]:
    """Batches of sources of similar length: indices, tokens and segment ids. Rows after the last source are padding."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for first in range(0, len(rows), batch_size):
        chosen = order[first : first + batch_size]
        longest = max(len(rows[index]) for index in chosen)
        length = max(longest, min(-(-longest // _LENGTH_UNIT) * _LENGTH_UNIT, max_length or sys.maxsize))
        source_BS, segment_ids_BS = np.zeros((2, batch_size, length), np.int32)
        for row, index in enumerate(chosen):
            source_BS[row, : len(rows[index])], segment_ids_BS[row, : len(rows[index])] = rows[index], 1
        yield chosen, source_BS, segment_ids_BS


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling"))
def _translate(
    model: EncoderDecoder,
    params: PyTree,
    source_BS: Int[Array, "B S"],
    segment_ids_BS: Int[Array, "B S"],
    start: Any,
    draw: Draw,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
) -> Int[Array, "B N"]:
    batch_size = source_BS.shape[0]
    variables = {"params": params}

    def decode(tokens_B1: Array, cache: Any, encoded_BSD: Any = None) -> Any:
        return model.apply(
            variables, tokens_B1, encoded_BSD, source_segment_ids_BS=segment_ids_BS, cache=cache, method="decode"
        )

    tokens_BP = jnp.zeros((batch_size, max_new_tokens + 1), jnp.int32).at[:, 0].set(start)
    encoded_BSD = model.apply(variables, source_BS, segment_ids_BS=segment_ids_BS, method="encode")
    logits_B1V, cache = decode(tokens_BP[:, :1], model.init_cache(batch_size, max_new_tokens), encoded_BSD)
    # Padding rows of the batch have ended.
    ended_B = jnp.all(segment_ids_BS == 0, axis=1)
    state = State(tokens_BP, jnp.ones((batch_size,), jnp.int32), jnp.int32(0), ended_B, cache)
    state = append(state, logits_B1V[:, 0], draw, sampling)
    return extend(state, max_new_tokens, decode, draw, sampling).tokens_BP[:, 1:]
