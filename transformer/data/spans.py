"""Span corruption: which spans of a row are hidden, and the source and target that are made of it."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from transformer.config import ObjectiveConfig
from transformer.data.masking import Noise
from transformer.data.rows import random_at
from transformer.data.tokenizers import Tokenizer
from transformer.types import Batch, PairBatch

_KEY = 9  # tells these draws from those of other parts that use the same seed


def hide_spans(config: ObjectiveConfig, seed: int) -> Noise:
    """Give weight 1 to the tokens of random spans of a row and 0 to the others (Raffel et al. 2020, section 3.3.4).

    Spans do not touch; all ways to place as many of them on as many tokens are equally likely. A row is one text, as in
    the authors' data: its documents are not kept apart, prompts are part of them, and an end-of-text between them is a
    token like any other.
    """

    def noise(batch: Batch, row: int, place: tuple[int, ...]) -> None:
        random = random_at(seed, _KEY, *place)
        length = int(np.count_nonzero(batch.segment_ids[row]))
        hidden, spans = config.num_hidden(length)
        batch.weights[row] = 0
        if spans > 0:
            # Visible and hidden runs take turns; only the visible ones at the two ends may be empty.
            lengths = np.zeros(2 * spans + 1, int)
            lengths[::2] = _cut(length - hidden + 2, spans + 1, random)
            lengths[[0, -1]] -= 1
            lengths[1::2] = _cut(hidden, spans, random)
            batch.weights[row, :length] = np.repeat(np.arange(2 * spans + 1) % 2, lengths)

    return noise


def _cut(length: int, parts: int, random: np.random.RandomState) -> Int[np.ndarray, " parts"]:
    """Lengths of at least 1 that add up to `length`, each way to do so as likely."""
    ends = np.sort(random.permutation(length - 1)[: parts - 1]) + 1
    return np.diff(ends, prepend=0, append=length)


def span_pairs(config: ObjectiveConfig, tokenizer: Tokenizer, length: int) -> Callable[[Batch], PairBatch]:
    """What makes of rows of `length` tokens, of which those with a weight are hidden, sources and targets.

    In the source a sentinel stands for each hidden span; the target holds each sentinel and the tokens it stands for.
    Both end with end-of-text. Sentinels are the ids after the tokenizer's, in order.
    """
    hidden, spans = config.num_hidden(length)

    def convert(batch: Batch) -> PairBatch:
        rows = len(batch.inputs)
        source, source_segment_ids = np.zeros((2, rows, length - hidden + spans + 1), np.int32)
        target = np.zeros((rows, hidden + spans + 2), np.int32)
        segment_ids = np.zeros((rows, hidden + spans + 1), np.int32)
        for row in range(rows):
            valid = batch.segment_ids[row] > 0
            tokens, is_hidden = batch.inputs[row][valid], batch.weights[row][valid] > 0
            (starts,) = np.nonzero(np.diff(is_hidden, prepend=False) & is_hidden)
            if len(starts) == 0:
                continue
            sentinels = tokenizer.vocab_size + np.arange(len(starts))
            visible = tokens.copy()
            visible[starts] = sentinels
            kept = np.append(visible[~is_hidden | np.isin(np.arange(len(tokens)), starts)], tokenizer.end_of_text)
            told = np.insert(tokens, starts, sentinels)[np.insert(is_hidden, starts, True)]
            told = np.concatenate([[tokenizer.end_of_text], told, [tokenizer.end_of_text]])
            source[row, : len(kept)], source_segment_ids[row, : len(kept)] = kept, 1
            target[row, : len(told)], segment_ids[row, : len(told) - 1] = told, 1
        inputs, targets = target[:, :-1] * segment_ids, target[:, 1:]
        return PairBatch(source, source_segment_ids, inputs, targets, segment_ids.astype(np.float32), segment_ids)

    return convert
