"""Beam search: the most likely continuations of prompts, or targets of sources, in one compiled loop over the cache."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.generation.beam_step import Limits, State, goes_on, grow, init_state
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

# New tokens have room for a multiple, so that few programs are compiled.
_ROOM_UNIT = 32


@dataclasses.dataclass(frozen=True)
class BeamConfig(Settings):
    """How continuations are searched for, as Hugging Face's transformers defines it.

    >>> translation = BeamConfig(num_beams=4, length_penalty=0.6)
    """

    num_beams: int = 4
    """Continuations that are kept while they grow; 1 is greedy decoding."""
    length_penalty: float = 1.0
    """A finished continuation's score is its log-probability divided by its length to this power, its end counted: above 0 longer
    ones gain, 0 compares plain log-probabilities."""
    early_stopping: Literal[True, False, "never"] = False
    """When a row stops: True, once it has num_beams finished continuations; False, once the best growing one would not be among
    them if it finished at its length now; "never", once it could not at any length (exact for a length_penalty of at least 0)."""
    num_return: int = 1
    """Best continuations to return."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "num_beams", "num_return")
        require(
            self.num_return <= self.num_beams,
            f"BeamConfig.num_return must be at most num_beams={self.num_beams}, got {self.num_return}; search with more beams.",
        )


def beam_config(beams: int, length_penalty: float, num_best: int) -> BeamConfig | None:
    """The search that a command asks for; None for 0 beams, with which the others mean nothing.

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

    Where a row has fewer possible ones, those left over have a length of 0 and a score of -inf.
    """

    def best(self, row: int) -> list[tuple[np.ndarray, float]]:
        """Tokens and score of each continuation of a row, the best first."""
        lengths_R, scores_R = self.lengths[row], self.scores[row]
        found = zip(self.tokens[row], lengths_R, scores_R, strict=True)
        return [(tokens[:length], float(score)) for tokens, length, score in found if score > -np.inf]

    tokens: np.ndarray  # int32 [B, R, max_new_tokens]; behind the length, the last token again
    lengths: np.ndarray  # int32 [B, R], the token at which it ended not counted
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
    """The most likely continuation of each prompt, or target of each source, that a beam search finds.

    Args:
        model: a decoder, whose prompts are continued, or an encoder-decoder, whose sources get targets.
        params: its parameters.
        rows: tokens of each prompt or source, which may differ in number; at least one a row.
        max_new_tokens: the longest continuation or target.
        num_beams: see `BeamConfig`, as for the next three.
        length_penalty: of the scores.
        early_stopping: when a row stops.
        num_return: best ones to return.
        end_of_text: the token at which one ends, or several; -1 if none does.
        start: the token that starts a target; -1: end_of_text, the first one.
        drawable: which tokens may be chosen, bool [V]; None for all. Others keep their probability, and it is lost.
        batch_size: rows that are searched together, those of similar length; 0 means all.

    Raises:
        ValueError: if a row is empty, holds a token outside the vocabulary, or too much is asked for; or if logits are NaN.
    """
    settings = BeamConfig(num_beams, length_penalty, early_stopping, num_return)
    vocab_size, translates = model.config.vocab_size, _translates(model)
    read = token_rows(rows, getattr(model, "source_vocab_size", 0) or vocab_size, "source" if translates else "prompt")
    require(max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    require(translates or start < 0, f"start is for an encoder-decoder, whose targets start with it, got {start}.")
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
    """Tokens, lengths and scores of the best of each row, in the order of the rows."""
    translates, count = _translates(model), int(limits.num_new)
    prepared = params
    if not translates:
        model, params = loop_model(model, params)
        prepared = prepare(model, params, batch_size * settings.num_beams)
    room = min(-(-count // _ROOM_UNIT) * _ROOM_UNIT, model.config.max_length or sys.maxsize)
    found: list[Any] = [()] * len(read)
    for chosen, tokens_BT, segment_ids_BT in source_batches(read, batch_size, model.config.max_length):
        arrays = tokens_BT, segment_ids_BT, np.int32(start), limits
        state: Any = _search(model, params, prepared, *arrays, room=room, settings=settings)
        state = jax.tree.map(np.asarray, state)
        for row, index in enumerate(chosen):
            _check_numbers(int(state.broken_B[row]), index, len(read[index]), translates)
            found[index] = _best(state, row, limits.ends_E, settings.num_return, count)
    return found


def _translates(model: Any) -> bool:
    """Whether a model reads a source, and says a target: an encoder-decoder."""
    return hasattr(model, "encode")


def _check_numbers(broken: int, index: int, length: int, translates: bool) -> None:
    """Raise UserError if the logits of a row were no numbers after `broken` new tokens."""
    marks_1N = np.full((1, max(broken, 0) + 1), 0)
    marks_1N[0, -1] = NO_TOKEN if broken >= 0 else 0
    what = f"the target of source {index}" if translates else f"prompt {index}"
    check_drawn(marks_1N, np.array([0 if translates else length]), what)


def _best(
    state: Any, row: int, ends_E: np.ndarray, num_return: int, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [R, N], lengths [R] and scores [R] of the best that a row has finished."""
    counts_R = np.where(state.is_done_BM, state.done_lengths_BM, 0)[row, :num_return]
    columns_RN = np.minimum(np.arange(max_new_tokens)[None], np.maximum(counts_R - 1, 0)[:, None])
    tokens_RN = np.take_along_axis(state.done_BMN[row, :num_return], columns_RN, axis=1)
    lengths_R = counts_R - ((counts_R > 0) & np.isin(tokens_RN[:, -1], ends_E))
    scores_R = np.where(counts_R > 0, state.done_scores_BM[row, :num_return], -np.inf)
    return tokens_RN, lengths_R.astype(np.int32), scores_R.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("model", "room", "settings"))
def _search(
    model: Any,
    params: PyTree,
    prepared: PyTree,
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    start: Any,
    limits: Limits,
    *,
    room: int,
    settings: BeamConfig,
) -> State:
    """The beams of each row when nothing better is to be found."""
    B, M = len(tokens_BT), settings.num_beams
    rows_R = jnp.repeat(jnp.arange(B), M)
    if not _translates(model):
        logits_BV, cache, step = _read_prompts(model, params, prepared, tokens_BT, segment_ids_BT, room)
    else:
        logits_BV, cache, step = _read_sources(model, params, tokens_BT, segment_ids_BT, start, room, rows_R)
    how = limits, settings.length_penalty, True if M == 1 else settings.early_stopping

    def one_more(state: State) -> State:
        last_BM = jax.lax.dynamic_index_in_dim(state.tokens_BMN, state.count - 1, axis=2, keepdims=False)
        logits_R1V, cache = step(last_BM.reshape(B * M, 1), state.cache)
        state, parents_BM = grow(state, logits_R1V.reshape(B, M, -1), *how)
        # What was read with a source is the same for all beams of a row.
        parents_R = (parents_BM + M * jnp.arange(B)[:, None]).reshape(-1)
        return state._replace(cache=take_rows(cache, parents_R, keep_encoded=True))

    state = init_state(jnp.any(segment_ids_BT != 0, axis=1), M, room, take_rows(cache, rows_R))
    state, _ = grow(state, jnp.broadcast_to(logits_BV[:, None], (B, M, logits_BV.shape[1])), *how)
    state = jax.lax.while_loop(lambda state: goes_on(state, limits, how[-1]), one_more, state)
    return state._replace(cache=())


def _read_prompts(
    model: Decoder, params: PyTree, prepared: PyTree, tokens_BT: Array, segment_ids_BT: Array, room: int
) -> tuple[Float[Array, "B V"], Any, Step]:
    """The logits of the first token behind each prompt, the cache, and how a further token is read."""
    (B, T), limit = tokens_BT.shape, model.config.max_length or sys.maxsize
    outputs: Any = model.apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=segment_ids_BT,
        prefix_BT=segment_ids_BT != 0 if model.bidirectional_prefix else None,
        cache=model.init_cache(B, min(T + room, limit)),
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
    room: int,
    rows_R: Int[Array, " R"],
) -> tuple[Float[Array, "B V"], Any, Step]:
    """The same of targets, whose first token is `start`."""
    B = len(source_BS)
    encoded_BSD: Any = model.apply({"params": params}, source_BS, segment_ids_BS=segment_ids_BS, method="encode")
    decode = functools.partial(model.apply, {"params": params}, method="decode")
    cache, start_B1 = model.init_cache(B, room), jnp.broadcast_to(start, (B, 1))
    outputs: Any = decode(start_B1, encoded_BSD, source_segment_ids_BS=segment_ids_BS, cache=cache)
    segment_ids_RS = jnp.take(segment_ids_BS, rows_R, axis=0)

    def step(last_R1: Array, cache: Any) -> Any:
        return decode(last_R1, source_segment_ids_BS=segment_ids_RS, cache=cache)

    return outputs[0][:, 0], outputs[1], step
