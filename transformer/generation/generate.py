"""Continues prompts: fills a KV cache, then draws one token of every row at a time in a compiled loop."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from transformer.generation.loop import Draw, State, append, extend
from transformer.generation.prepare import DecodingModel
from transformer.generation.prompts import end_ids
from transformer.generation.sampling import SamplingConfig, check_drawable, check_drawn
from transformer.generation.window import check_window, num_dropped, windows
from transformer.layers.cache import cache_overflow, check_capacity, replace_rows
from transformer.memory import check_cache
from transformer.models.decoder import Decoder
from transformer.ops.ids import token_rows
from transformer.types import PyTree
from transformer.validation import require

# Prompts are padded to a power of two. The capacity of the cache is a multiple of this unit or of an eighth of a power of two.
# Therefore few programs are compiled.
_SHORTEST_PROMPT, _CAPACITY_UNIT = 16, 32

# Tokens that `stream` computes in one call, which costs about a tenth of a token.
_CHUNK = 8

Stopped = Callable[[int, np.ndarray], bool]
"""Whether the row with this number ends after these new tokens."""


class Generated(NamedTuple):
    """The continuation of each of B prompts, `tokens[b, : lengths[b]]`; the token that ended the row fills the array."""

    tokens: np.ndarray  # int32 [B, max_new_tokens]
    lengths: np.ndarray  # int32 [B], without end-of-text


class Generator:
    """A model and its parameters prepared for decoding, for many calls; the function `generate` prepares them in each call.

    Args:
        model: a decoder.
        params: its parameters.
        place: puts rows of prompts on devices.
        keep_first: None refuses rows longer than the model's max_length. A number continues them in a rolling window, which
            keeps this many first tokens of a row. Each time max_length tokens are read, the earlier half is dropped, and the
            later half is read again, at positions from 0. The logits equal the logits of the window alone.

    Example:
        >>> from transformer.model_config import ModelConfig
        >>> from transformer.models.init import init_params
        >>> model = Decoder(ModelConfig(vocab_size=11, max_length=16, num_layers=1, embed_dim=8))
        >>> params, _ = init_params(model, jax.random.key(0))
        >>> generator = Generator(model, params)
        >>> generator.generate([[1, 2, 3], [4]], max_new_tokens=5).tokens.shape
        (2, 5)
        >>> len(list(generator.stream([1, 2, 3], max_new_tokens=5)))
        5
    """

    def __init__(
        self,
        model: Decoder,
        params: PyTree,
        place: Callable[[np.ndarray], Any] = lambda rows: rows,
        *,
        keep_first: int | None = None,
    ) -> None:
        self._place, self._keep_first = place, keep_first
        self._target = DecodingModel(model, params)

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        seed: int = 0,
        end_of_text: int | Sequence[int] = -1,
        drawable: np.ndarray | None = None,
        row_numbers: Sequence[int] | None = None,
        stopped: Stopped | None = None,
    ) -> Generated:
        """Continue each prompt; see the function `generate`.

        Random draws depend on `row_numbers`, by default the indices of the prompts. `stopped` is called every few tokens, and
        ends a row by returning True.
        """
        state, draw = self._start(prompts, max_new_tokens, sampling, seed, end_of_text, drawable, row_numbers)
        read_B = np.array([len(prompt) for prompt in prompts])
        most_B = np.full(len(read_B), max_new_tokens)
        if stopped is None:
            state = self._extend(state, max_new_tokens, sampling, draw)
        else:
            state, most_B = self._extend_until(stopped, state, max_new_tokens, sampling, draw, read_B)
        steps_N = np.arange(max_new_tokens)
        # If all rows have ended early, each repeats its last token.
        columns_BN = read_B[:, None] + np.minimum(steps_N, int(state.num_new) - 1)
        tokens_BN = np.take_along_axis(np.asarray(state.tokens_BP), columns_BN, axis=1)
        check_drawn(tokens_BN, read_B)
        ended_BN = np.isin(tokens_BN, draw.ends_E)
        lengths_B = np.where(ended_BN.any(axis=1), ended_BN.argmax(axis=1), max_new_tokens)
        return Generated(tokens_BN.astype(np.int32), np.minimum(lengths_B, most_B).astype(np.int32))

    def stream(
        self,
        prompt: Sequence[int] | np.ndarray,
        *,
        max_new_tokens: int,
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        seed: int = 0,
        end_of_text: int | Sequence[int] = -1,
        drawable: np.ndarray | None = None,
    ) -> Iterator[int]:
        """Yield the tokens of `generate([prompt])` as they are drawn, without end-of-text."""
        state, draw = self._start([prompt], max_new_tokens, sampling, seed, end_of_text, drawable)
        given = 0
        while True:
            available = min(int(state.num_new), max_new_tokens)
            for token in np.asarray(state.tokens_BP)[0, len(prompt) + given : len(prompt) + available]:
                check_drawn(token[None, None], np.array([len(prompt) + given]))
                if token in draw.ends_E:
                    return
                given += 1
                yield int(token)
            if given == max_new_tokens:
                return
            state = self._extend(state, min(given + _CHUNK, max_new_tokens), sampling, draw)

    def _start(
        self,
        prompts: Any,
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        end_of_text: int | Sequence[int],
        drawable: np.ndarray | None,
        row_numbers: Sequence[int] | None = None,
    ) -> tuple[State, Draw]:
        """Read the prompts and draw the first token of each row."""
        vocab_size = self._target.model.config.vocab_size
        rows = token_rows(prompts, vocab_size, "prompt")
        require(
            len(rows) > 0, "There must be at least one prompt, got none; pass [[end_of_text]] to start a new document."
        )
        require(max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {max_new_tokens}.")
        ends_E = end_ids(end_of_text, vocab_size)
        check_drawable(drawable, vocab_size)
        longest = max(len(row) for row in rows)
        limit, capacity, width = self._sizes(longest, max_new_tokens)
        check_cache(self._target.model.config, len(rows), capacity)
        lengths_B = np.array([len(row) for row in rows], np.int32)
        dropped_B = num_dropped(lengths_B, limit)
        num_read = int(np.max(lengths_B - dropped_B))
        num_padded = min(max(_SHORTEST_PROMPT, 1 << (num_read - 1).bit_length()), capacity)
        tokens_BP = np.zeros((len(rows), width), np.int32)
        for index, row in enumerate(rows):
            tokens_BP[index, : len(row)] = row
        numbers_B = np.array(range(len(rows)) if row_numbers is None else row_numbers, np.int32)
        draw = Draw(jax.random.key(seed), numbers_B, ends_E, drawable)
        window = (self._place(tokens_BP), lengths_B, dropped_B)
        sizes = {"keep_first": self._keep_first or 0, "length": num_padded, "capacity": capacity}
        return self._prefill(window, draw, sampling, sizes), draw

    def _prefill(self, window: tuple[Any, ...], draw: Draw, sampling: SamplingConfig, sizes: dict[str, int]) -> State:
        """Read the prompts, and draw the first token of each row."""
        return _prefill(self._target.model, self._target.params, *window, draw, sampling=sampling, **sizes)

    def _sizes(self, longest: int, max_new_tokens: int) -> tuple[int, int, int]:
        """The model's length (0: no limit), slots of the cache, and width of the array of tokens."""
        limit, needed = self._target.model.config.max_length, longest + max_new_tokens
        width = rounded(needed)
        if limit == 0:
            return 0, width, width
        if self._keep_first is None:
            check_capacity(limit, longest, max_new_tokens)
        elif needed > limit:
            check_window(limit, self._keep_first)
        capacity = min(width, limit)
        return limit, capacity, capacity if needed <= limit else width

    def _extend(self, state: State, num_new: int, sampling: SamplingConfig, draw: Draw) -> State:
        """Extend rows to `num_new` new tokens, fewer if all have ended."""
        limit = self._target.model.config.max_length
        while int(state.num_new) < num_new and not np.all(state.ended_B):
            read_B = np.asarray(state.lengths_B) - 1  # the latest token is read with the next step
            room_B = limit - (read_B - num_dropped(read_B, limit))
            if limit and not room_B.all():
                state = self._roll(state, room_B == 0)
                room_B[room_B == 0] = limit - limit // 2
            end = min(num_new, int(state.num_new) + int(room_B.min())) if limit else num_new
            state, overflow = self._decode(state, end, sampling, draw)
            if overflow:
                raise RuntimeError(
                    "The cache must hold every token, but some were dropped; the generated tokens are wrong."
                )
        return state

    def _decode(self, state: State, num_new: int, sampling: SamplingConfig, draw: Draw) -> tuple[State, Any]:
        """Draw `num_new` tokens, fewer if all rows end or a window is full; also returns whether the cache overflowed."""
        params = self._target.prepared(len(state.tokens_BP))
        return _decode(self._target.model, params, state, np.int32(num_new), draw, sampling=sampling)

    def _extend_until(
        self, stopped: Stopped, state: State, num_new: int, sampling: SamplingConfig, draw: Draw, read_B: np.ndarray
    ) -> tuple[State, np.ndarray]:
        """Extend rows to `num_new` new tokens, fewer for stopped rows; also returns each row's limit of new tokens."""
        most_B = np.full(len(read_B), num_new)
        while True:
            now, tokens_BP, ended_B = int(state.num_new), np.asarray(state.tokens_BP), np.array(state.ended_B)
            for row, read in enumerate(read_B):
                if not ended_B[row] and stopped(row, tokens_BP[row, read : read + now]):
                    ended_B[row], most_B[row] = True, now
            if ended_B.all() or now == num_new:
                return state, most_B
            state = state._replace(ended_B=jnp.asarray(ended_B))
            state = self._extend(state, min(now + _CHUNK, num_new), sampling, draw)

    def _roll(self, state: State, full_B: np.ndarray) -> State:
        """Drop the earlier half of each full window, and read the later half again."""
        limit = self._target.model.config.max_length
        dropped_B = num_dropped(np.asarray(state.lengths_B), limit)
        sizes = {"keep_first": self._keep_first or 0, "length": limit // 2, "capacity": limit}
        return self._roll_caches(state, (full_B, dropped_B), sizes)

    def _roll_caches(self, state: State, rows: tuple[np.ndarray, ...], sizes: dict[str, int]) -> State:
        cache = roll_cache(self._target.model, self._target.params, state.cache, state.tokens_BP, *rows, **sizes)
        return state._replace(cache=cache)


def generate(
    model: Decoder,
    params: PyTree,
    prompts: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    end_of_text: int | Sequence[int] = -1,
    drawable: np.ndarray | None = None,
    keep_first: int | None = None,
) -> Generated:
    """Continue each prompt.

    Args:
        model: a decoder.
        params: its parameters.
        prompts: tokens of each row, at least one each; lengths may differ. `unpad` removes the padding of a batch.
        max_new_tokens: number of new tokens. With the longest prompt, it must not exceed the model's max_length, if there is
            one, unless `keep_first` is given.
        sampling: how tokens are drawn.
        seed: a draw depends only on the seed, the row's index among the prompts and the token's position. It depends neither
            on the other rows nor on max_new_tokens.
        end_of_text: the token at which a row ends, or several; -1 for none.
        drawable: the tokens that may be drawn, bool [V]; None for all. Use it if a table has rows without tokens.
        keep_first: as for a `Generator`.

    Raises:
        ValueError: a prompt is empty, is too long or has a token outside the vocabulary, or a row's logits are NaN.
    """
    return Generator(model, params, keep_first=keep_first).generate(
        prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, end_of_text=end_of_text, drawable=drawable
    )


def stream(
    model: Decoder,
    params: PyTree,
    prompt: Sequence[int] | np.ndarray,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    seed: int = 0,
    end_of_text: int | Sequence[int] = -1,
    drawable: np.ndarray | None = None,
    keep_first: int | None = None,
) -> Iterator[int]:
    """Yield the tokens of `generate(model, params, [prompt], ...)` as they are drawn, without end-of-text."""
    return Generator(model, params, keep_first=keep_first).stream(
        prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, end_of_text=end_of_text, drawable=drawable
    )


@functools.partial(jax.jit, static_argnames=("model", "keep_first", "length", "capacity", "sampling"))
def _prefill(
    model: Decoder,
    params: PyTree,
    tokens_BP: Int[Array, "B P"],
    lengths_B: Int[Array, " B"],
    dropped_B: Int[Array, " B"],
    draw: Draw,
    *,
    keep_first: int,
    length: int,
    capacity: int,
    sampling: SamplingConfig,
) -> State:
    """Read the windows of right-padded prompts, and draw the first token of each row."""
    tokens_BT = windows(tokens_BP, dropped_B, keep_first=keep_first, length=length)
    num_read_B = lengths_B - dropped_B
    logits_BTV, cache = read_rows(model, params, tokens_BT, num_read_B, capacity)
    logits_BV = jnp.take_along_axis(logits_BTV, num_read_B[:, None, None] - 1, axis=1)[:, 0]
    state = State(tokens_BP, lengths_B, jnp.int32(0), jnp.zeros((len(tokens_BP),), bool), cache)
    return append(state, logits_BV, draw, sampling)


@functools.partial(jax.jit, static_argnames=("model", "keep_first", "length", "capacity"), donate_argnames="cache")
def roll_cache(
    model: Decoder,
    params: PyTree,
    cache: PyTree,
    tokens_BP: Int[Array, "B P"],
    full_B: Bool[Array, " B"],
    dropped_B: Int[Array, " B"],
    *,
    keep_first: int,
    length: int,
    capacity: int,
) -> PyTree:
    """The cache with the next window of each full row; the window ends before the latest token."""
    tokens_BT = windows(tokens_BP, dropped_B, keep_first=keep_first, length=length)
    _, following = read_rows(model, params, tokens_BT, jnp.full_like(dropped_B, length), capacity)
    return replace_rows(cache, full_B, following)


def rounded(needed: int) -> int:
    """The capacity for at least this many tokens: one of few sizes."""
    unit = max(_CAPACITY_UNIT, 1 << max(0, needed.bit_length() - 3))
    return -(-needed // unit) * unit


def read_rows(
    model: Decoder, params: PyTree, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"], capacity: int
) -> tuple[Array, PyTree]:
    """Logits [B, T, V] and the cache of right-padded rows; for a prefix LM, the rows are its prefix."""
    B, T = tokens_BT.shape
    valid_BT = jnp.arange(T)[None] < lengths_B[:, None]
    return model.apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=valid_BT.astype(jnp.int32),
        prefix_BT=valid_BT if model.bidirectional_prefix else None,
        cache=model.init_cache(B, capacity),
    )


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def _decode(
    model: Decoder, params: PyTree, state: State, num_new: Any, draw: Draw, *, sampling: SamplingConfig
) -> tuple[State, Bool[Array, ""]]:
    """Draw `num_new` tokens of each row, fewer if all rows end; also returns whether the cache overflowed."""

    def step(last_B1: Array, cache: Any) -> Any:
        return model.apply({"params": params}, last_B1, cache=cache)

    state = extend(state, num_new, step, draw, sampling)
    return state, cache_overflow(state.cache)
