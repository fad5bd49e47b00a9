"""Beam search for the most likely continuations of prompts or targets of sources, in one compiled loop over the cache."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.generation.beam_step import Limits, State, grow, init_state, should_continue
from transformer.generation.loop import Step
from transformer.generation.prepare import loop_model, prepare
from transformer.generation.prompts import end_ids
from transformer.generation.sampling import NO_TOKEN, check_drawable, check_drawn
from transformer.generation.translate import source_batches, start_and_ends
from transformer.layers.cache import check_capacity, take_rows
from transformer.memory import check_cache
from transformer.models.decoder import Decoder
from transformer.models.encoder_decoder import EncoderDecoder
from transformer.ops.ids import token_rows
from transformer.types import PyTree
from transformer.validation import Settings, require, require_at_least

# The capacity for new tokens is a multiple of this, so that few programs are compiled.
_ROOM_UNIT = 32


@dataclasses.dataclass(frozen=True)
class BeamConfig(Settings):
    """Settings of beam search, as in Hugging Face's transformers.

    >>> translation = BeamConfig(num_beams=4, length_penalty=0.6)
    """

    num_beams: int = 4
    """Number of growing continuations; 1 is greedy decoding."""
    length_penalty: float = 1.0
    """Exponent of the length, end token included, that divides the log-probability of a finished continuation. Values above 0
    favour longer continuations; 0 compares plain log-probabilities."""
    early_stopping: Literal[True, False, "never"] = False
    """When the search of a row stops. True: at num_beams finished continuations. False: when the best growing continuation
    would not be among them if it finished now. With "never": when it could not be among them at any length, which is exact
    for a length_penalty of at least 0."""
    num_return: int = 1
    """Number of best continuations to return."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_beams", "num_return")
        require(
            self.num_return <= self.num_beams,
            f"BeamConfig.num_return must be at most num_beams={self.num_beams}, got {self.num_return}; search with more beams.",
        )


def beam_config(beams: int, length_penalty: float, num_best: int) -> BeamConfig | None:
    """The beam search of a command; None for 0 beams, which allow no other setting.

    >>> beam_config(0, length_penalty=1.0, num_best=1) is None
    True
    """
    require(
        beams > 0 or (length_penalty == 1 and num_best == 1),
        f"length_penalty and num_best are for beam search, got {length_penalty} and {num_best} without; give beams (--beams).",
    )
    return BeamConfig(beams, length_penalty, num_return=num_best) if beams else None


class Beams(NamedTuple):
    """The R best continuations of each of B rows, the best first: `tokens[b, r, : lengths[b, r]]`.

    If a row has fewer possible continuations, the remaining ones have length 0 and score -inf.
    """

    def best(self, row: int) -> list[tuple[np.ndarray, float]]:
        """Tokens and score of each continuation of a row, the best first."""
        lengths_R, scores_R = self.lengths[row], self.scores[row]
        found = zip(self.tokens[row], lengths_R, scores_R, strict=True)
        return [(tokens[:length], float(score)) for tokens, length, score in found if score > -np.inf]

    tokens: np.ndarray  # int32 [B, R, max_new_tokens]; after the length, the last token is repeated
    lengths: np.ndarray  # int32 [B, R], without the end token
    scores: np.ndarray  # float32 [B, R]


def beam_search(
    model: Decoder | EncoderDecoder,
    params: PyTree,
    rows: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
    *,
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: Literal[True, False, "never"] = False,
    num_return: int = 1,
    end_of_text: int | Sequence[int] = -1,
    start: int = -1,
    drawable: np.ndarray | None = None,
    batch_size: int = 0,
) -> Beams:
    """Search for the most likely continuations of each prompt, or targets of each source.

    Args:
        model: a decoder continues prompts; an encoder-decoder gives targets of sources.
        params: its parameters.
        rows: tokens of each prompt or source, at least one each; lengths may differ.
        max_new_tokens: length of the longest continuation or target.
        num_beams: see `BeamConfig`.
        length_penalty: see `BeamConfig`.
        early_stopping: see `BeamConfig`.
        num_return: see `BeamConfig`.
        end_of_text: the end token, or several; -1 for none.
        start: the first token of a target; -1 means the first of end_of_text.
        drawable: the allowed tokens, bool [V]; None for all. Probabilities are not normalized again over them.
        batch_size: rows of a search, which have similar lengths; 0 means all rows.

    Raises:
        ValueError: a row is empty or has a token outside the vocabulary, max_new_tokens exceeds the model's length, or logits
            are NaN.
    """
    settings = BeamConfig(num_beams, length_penalty, early_stopping, num_return)
    vocab_size, translates = model.config.vocab_size, _translates(model)
    read = token_rows(rows, getattr(model, "source_vocab_size", 0) or vocab_size, "source" if translates else "prompt")
    require(max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    require(translates or start < 0, f"start is for targets of an encoder-decoder, got {start}; leave it out.")
    check_drawable(drawable, vocab_size)
    if translates:
        start, ends_E = start_and_ends(start, end_of_text, vocab_size)
    else:
        ends_E = end_ids(end_of_text, vocab_size)
    longest = 0 if translates else max([len(row) for row in read], default=0)
    batch_size = batch_size or max(1, len(read))
    check_capacity(model.config.max_length or sys.maxsize, longest, max_new_tokens)
    cached = model.config.decoder if translates else model.config
    check_cache(cached, batch_size * num_beams, longest + max_new_tokens, num_beams=num_beams)
    limits = Limits(ends_E, drawable, np.int32(max_new_tokens))
    found = _search_all(model, params, read, start, limits, batch_size, settings)
    shapes = (0, num_return, max_new_tokens), (0, num_return), (0, num_return)
    return Beams(*(np.stack(part) for part in zip(*found, strict=True))) if found else Beams(*map(np.zeros, shapes))


def _search_all(
    model: Any,
    params: PyTree,
    read: list[np.ndarray],
    start: int,
    limits: Limits,
    batch_size: int,
    settings: BeamConfig,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, lengths and scores of the best continuations of each row, in the order of the rows."""
    translates, count = _translates(model), int(limits.num_new)
    prepared = params
    if not translates:
        model, params = loop_model(model, params)
        prepared = prepare(model, params, batch_size * settings.num_beams)
    capacity = min(-(-count // _ROOM_UNIT) * _ROOM_UNIT, model.config.max_length or sys.maxsize)
    found: list[Any] = [()] * len(read)
    for chosen, tokens_BT, segment_ids_BT in source_batches(read, batch_size, model.config.max_length):
        arrays = tokens_BT, segment_ids_BT, np.int32(start), limits
        state: Any = _search(model, params, prepared, *arrays, capacity=capacity, settings=settings)
        state = jax.tree.map(np.asarray, state)
        for row, index in enumerate(chosen):
            _check_numbers(int(state.broken_B[row]), index, len(read[index]), translates)
            found[index] = _best(state, row, limits.ends_E, settings.num_return, count)
    return found


def _translates(model: Any) -> bool:
    """Whether a model is an encoder-decoder."""
    return hasattr(model, "encode")


def _check_numbers(broken: int, index: int, length: int, translates: bool) -> None:
    """Raise UserError if the logits of a row were not finite after `broken` new tokens."""
    marks_1N = np.full((1, max(broken, 0) + 1), 0)
    marks_1N[0, -1] = NO_TOKEN if broken >= 0 else 0
    what = f"the target of source {index}" if translates else f"prompt {index}"
    check_drawn(marks_1N, np.array([0 if translates else length]), what)


def _best(
    state: Any, row: int, ends_E: np.ndarray, num_return: int, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [R, N], lengths [R] and scores [R] of the best finished continuations of a row."""
    counts_R = np.where(state.is_done_BM, state.done_lengths_BM, 0)[row, :num_return]
    columns_RN = np.minimum(np.arange(max_new_tokens)[None], np.maximum(counts_R - 1, 0)[:, None])
    tokens_RN = np.take_along_axis(state.done_BMN[row, :num_return], columns_RN, axis=1)
    lengths_R = counts_R - ((counts_R > 0) & np.isin(tokens_RN[:, -1], ends_E))
    scores_R = np.where(counts_R > 0, state.done_scores_BM[row, :num_return], -np.inf)
    return tokens_RN, lengths_R.astype(np.int32), scores_R.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("model", "capacity", "settings"))
def _search(
    model: Any,
    params: PyTree,
    prepared: PyTree,
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    start: Any,
    limits: Limits,
    *,
    capacity: int,
    settings: BeamConfig,
) -> State:
    """The beams of each row at the end of the search."""
    B, M = len(tokens_BT), settings.num_beams
    rows_R = jnp.repeat(jnp.arange(B), M)
    if not _translates(model):
        logits_BV, cache, step = _read_prompts(model, params, prepared, tokens_BT, segment_ids_BT, capacity)
    else:
        logits_BV, cache, step = _read_sources(model, params, tokens_BT, segment_ids_BT, start, capacity, rows_R)
    how = limits, settings.length_penalty, True if M == 1 else settings.early_stopping

    def extend(state: State) -> State:
        last_BM = jax.lax.dynamic_index_in_dim(state.tokens_BMN, state.num_tokens - 1, axis=2, keepdims=False)
        logits_R1V, cache = step(last_BM.reshape(B * M, 1), state.cache)
        state, parents_BM = grow(state, logits_R1V.reshape(B, M, -1), *how)
        # All beams of a row share the encoder output.
        parents_R = (parents_BM + M * jnp.arange(B)[:, None]).reshape(-1)
        return state._replace(cache=take_rows(cache, parents_R, keep_encoded=True))

    state = init_state(jnp.any(segment_ids_BT != 0, axis=1), M, capacity, take_rows(cache, rows_R))
    state, _ = grow(state, jnp.broadcast_to(logits_BV[:, None], (B, M, logits_BV.shape[1])), *how)
    state = jax.lax.while_loop(lambda state: should_continue(state, limits, how[-1]), extend, state)
    return state._replace(cache=())


def _read_prompts(
    model: Decoder, params: PyTree, prepared: PyTree, tokens_BT: Array, segment_ids_BT: Array, capacity: int
) -> tuple[Float[Array, "B V"], Any, Step]:
    """The logits of the first token after each prompt, the cache, and the function that reads further tokens."""
    (B, T), limit = tokens_BT.shape, model.config.max_length or sys.maxsize
    outputs: Any = model.apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=segment_ids_BT,
        prefix_BT=segment_ids_BT != 0 if model.bidirectional_prefix else None,
        cache=model.init_cache(B, min(T + capacity, limit)),
    )
    logits_BTV, cache = outputs
    last_B = jnp.maximum(jnp.sum(segment_ids_BT != 0, axis=1) - 1, 0)
    logits_BV = jnp.take_along_axis(logits_BTV, last_B[:, None, None], axis=1)[:, 0]
    return logits_BV, cache, lambda last_R1, cache: model.apply({"params": prepared}, last_R1, cache=cache)  # pyright: ignore


def _read_sources(
    model: EncoderDecoder,
    params: PyTree,
    source_BS: Array,
    segment_ids_BS: Array,
    start: Any,
    capacity: int,
    rows_R: Int[Array, " R"],
) -> tuple[Float[Array, "B V"], Any, Step]:
    """The same for targets, which begin with `start`."""
    B = len(source_BS)
    encoded_BSD: Any = model.apply({"params": params}, source_BS, segment_ids_BS=segment_ids_BS, method="encode")
    decode = functools.partial(model.apply, {"params": params}, method="decode")
    cache, start_B1 = model.init_cache(B, capacity), jnp.broadcast_to(start, (B, 1))
    outputs: Any = decode(start_B1, encoded_BSD, source_segment_ids_BS=segment_ids_BS, cache=cache)
    segment_ids_RS = jnp.take(segment_ids_BS, rows_R, axis=0)

    def step(last_R1: Array, cache: Any) -> Any:
        return decode(last_R1, source_segment_ids_BS=segment_ids_RS, cache=cache)

    return outputs[0][:, 0], outputs[1], step
