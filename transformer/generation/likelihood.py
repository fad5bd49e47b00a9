"""Computes a model's log-probabilities of the tokens of given texts."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.generation.rows import Row, computed_rows, segment_ids_of
from transformer.ops.losses import cross_entropy
from transformer.trained import Trained
from transformer.types import Leaf, PyTree

_LOGIT_COLUMNS = 64  # positions of a chunk of logits


@dataclasses.dataclass(frozen=True)
class Scored:
    """A text and the log-probabilities of its tokens."""

    text: str
    tokens: Int[np.ndarray, " n"]
    """The scored tokens, int32."""
    log_probabilities: Float[np.ndarray, " n"]
    """Log-probability of each token given the previous ones (masked model: all others), float32, in nats."""

    @property
    def log_probability(self) -> float:
        """Log-probability of the whole text, in nats."""
        return float(self.log_probabilities.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-probability per token."""
        return math.exp(min(-self.log_probability / len(self.tokens), 700.0))

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def bits_per_byte(self) -> float:
        """Mean negative log-probability per byte of the text, in bits."""
        return -self.log_probability / math.log(2) / self.num_bytes


class Query(NamedTuple):
    """Tokens to score, with their context."""

    context: Int[np.ndarray, " c"]
    """Tokens before them, at least one."""
    tokens: Int[np.ndarray, " n"]


class TokenScores(NamedTuple):
    """Scores of the tokens of a query."""

    log_probabilities: Leaf
    """float32 [n], in nats."""
    most_likely: Leaf
    """float32 [n], 1 for the most likely token, else 0."""


# ---- Left to right ---------------------------------------------------------------------------------------------------


def next_token_scores(run: Trained, queries: Iterable[Query], *, batch_size: int, stride: int) -> Iterator[TokenScores]:
    """A decoder's log-probability of each token of each query, and whether the token is the most likely one.

    A query longer than the model's length is scored in windows. The first window is full, and each next one ends at most
    `stride` tokens later. Therefore its scored tokens have at least the model's length minus `stride` tokens before them. For a
    model with a bidirectional prefix, the context is the prefix.
    """
    limit = run.config.model.max_length
    lengths: collections.deque[list[int]] = collections.deque()

    def rows() -> Iterator[Row]:
        for context, tokens in queries:
            whole = np.concatenate([context, tokens]).astype(np.int32)
            inputs, targets = whole[:-1], whole[1:]
            parts = list(windows(len(inputs), len(context) - 1, limit, stride))
            lengths.append([stop - max(start, scored) for start, stop, scored in parts])
            for start, stop, _ in parts:
                prefix = (np.arange(start, stop) < len(context)).astype(np.int32)
                yield inputs[start:stop], targets[start:stop], prefix

    found = computed_rows(run, _next_token, rows(), batch_size, limit)
    for (inputs, _, _), scores in found:
        counts = lengths.popleft()
        parts = [[column[len(inputs) - counts[0] : len(inputs)] for column in scores]]
        for count, ((inputs, _, _), scores) in zip(counts[1:], found, strict=False):
            parts.append([column[len(inputs) - count : len(inputs)] for column in scores])
        yield TokenScores(*map(np.concatenate, zip(*parts, strict=True)))


def windows(length: int, first: int, limit: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """`(start, stop, scored)` of each window of at most `limit` tokens, which scores the targets from `scored` to `stop`.

    All windows together score each target from `first` to `length` once.

    >>> list(windows(10, first=0, limit=4, stride=2))
    [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    >>> list(windows(10, first=7, limit=4, stride=2))
    [(5, 9, 7), (6, 10, 9)]
    """
    scored = first
    while scored < length:
        stop = min(max(limit, scored + stride), length)
        yield max(0, stop - limit), stop, scored
        scored = stop


@functools.partial(jax.jit, static_argnums=0)
def _next_token(
    model: Any, params: PyTree, lengths_PB: Array, inputs_BT: Array, targets_BT: Array, prefix_BT: Array
) -> Any:
    hidden_BTD = model.apply(
        {"params": params},
        inputs_BT,
        segment_ids_BT=segment_ids_of(lengths_PB[0], inputs_BT),
        prefix_BT=prefix_BT > 0 if model.bidirectional_prefix else None,
        head=False,
    )
    return _scores(model, params, hidden_BTD, targets_BT)


# ---- Translations ----------------------------------------------------------------------------------------------------


def target_scores(
    run: Trained, pairs: Iterable[tuple[np.ndarray, Query]], *, batch_size: int
) -> Iterator[Float[np.ndarray, " n"]]:
    """An encoder-decoder's log-probability of each token of each target, given its source."""

    def rows() -> Iterator[Row]:
        for source, (context, tokens) in pairs:
            whole = np.concatenate([context, tokens]).astype(np.int32)
            yield whole[:-1], whole[1:], np.asarray(source, np.int32)

    for (inputs, _, _), scores in computed_rows(run, _target, rows(), batch_size, 0):
        yield scores[: len(inputs)]


@functools.partial(jax.jit, static_argnums=0)
def _target(
    model: Any, params: PyTree, lengths_PB: Array, inputs_BT: Array, targets_BT: Array, source_BS: Array
) -> Any:
    hidden_BTD = model.apply(
        {"params": params},
        source_BS,
        inputs_BT,
        source_segment_ids_BS=segment_ids_of(lengths_PB[2], source_BS),
        target_segment_ids_BT=segment_ids_of(lengths_PB[0], inputs_BT),
        head=False,
    )
    return _scores(model, params, hidden_BTD, targets_BT).log_probabilities


# ---- Masked models ---------------------------------------------------------------------------------------------------


def masked_scores(
    run: Trained,
    queries: Iterable[tuple[Query, np.ndarray]],
    mask: int,
    *,
    batch_size: int,
    stride: int,
) -> Iterator[Float[np.ndarray, " n"]]:
    """An encoder's log-probability of each token of each query, given all other tokens.

    The encoder reads one row for each token, in which that token is masked. The sum is the pseudo-log-likelihood of Salazar et
    al. (2020).

    Args:
        run: the trained model.
        queries: each with the ids after its tokens.
        mask: the id of the mask.
        batch_size: rows of a batch.
        stride: distance of the windows of a query longer than the model's length.
    """
    limit = run.config.model.max_length
    counts: collections.deque[int] = collections.deque()

    def rows() -> Iterator[Row]:
        for (context, tokens), following in queries:
            counts.append(len(tokens))
            whole = np.concatenate([context, tokens, following]).astype(np.int32)
            last = len(context) + len(tokens)
            for start, stop, scored in windows(len(whole), len(context), limit, stride):
                for index in range(scored, min(stop, last)):
                    masked = whole[start:stop].copy()
                    masked[index - start] = mask
                    yield masked, np.array([index - start]), whole[index : index + 1]

    found = computed_rows(run, _masked, rows(), batch_size, limit)
    for _, scores in found:
        others = itertools.islice(found, counts.popleft() - 1)
        yield np.concatenate([scores[:1], *(more[:1] for _, more in others)])


@functools.partial(jax.jit, static_argnums=0)
def _masked(
    model: Any, params: PyTree, lengths_PB: Array, tokens_BT: Array, indices_BN: Array, targets_BN: Array
) -> Any:
    hidden_BND = model.apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=segment_ids_of(lengths_PB[0], tokens_BT),
        indices_BN=indices_BN[:, :1],
        head=False,
        method="logits",
    )
    return _scores(model, params, hidden_BND, targets_BN[:, :1]).log_probabilities


# ---- Logits -----------------------------------------------------------------------------------------------------------


def _scores(
    model: Any, params: PyTree, hidden_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"]
) -> TokenScores:
    """Scores of the targets [B, T] from hidden states; logits are computed in chunks of positions."""
    B, T = targets_BT.shape
    columns = min(_LOGIT_COLUMNS, T)
    padding = -T % columns

    def of_columns(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits_BNV: Any = model.apply({"params": params}, part[0], method="project")
        found = cross_entropy(logits_BNV, part[1])
        return -found.nll, found.correct

    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)))
    parts = (hidden_BTD.reshape(B, -1, columns, hidden_BTD.shape[-1]), targets_BT.reshape(B, -1, columns))
    found_NBC = jax.lax.map(of_columns, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), parts))
    return TokenScores(*(jnp.swapaxes(x_NBC, 0, 1).reshape(B, -1)[:, :T] for x_NBC in found_NBC))
