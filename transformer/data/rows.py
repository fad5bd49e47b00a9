"""Tokens as aligned pairs, and rows that pairs are written into."""

import functools
import json
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from transformer.data.documents import CONVERSATION
from transformer.data.source import Record
from transformer.data.tokenizers import Tokenizer
from transformer.data.tokenizers.chat import learnt_ids
from transformer.tokenizer import around_text, document_start
from transformer.types import Batch


class Pairs(NamedTuple):
    """Tokens of a document, or of a piece of one: each with the token before it, and how much it counts."""

    inputs: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]


def make_pairs(tokenizer: Tokenizer, record: Record) -> Pairs:
    """Pairs of a record; a document begins with `document_start` and ends with end-of-text.

    The prompt has weight 0. The first token of a piece that continues a document is read but is no target,
    since what precedes it is in another record. A document without text has no pairs. Of a tokenizer with ids on both sides of a
    text, as BERT's, the end is read too, with nothing to predict from it. Of a conversation, what an assistant says
    has weight 1; its template begins and ends it.
    """
    if record.prompt == CONVERSATION:
        ids, learnt = learnt_ids(tokenizer, json.loads(record.text))
        return Pairs(ids[:-1], ids[1:], learnt[1:].astype(np.float32))
    prompt = tokenizer.encode(record.prompt) if record.prompt else np.empty(0, np.int32)
    text = tokenizer.encode(record.text)
    start, end = np.array([[document_start(tokenizer)], [tokenizer.end_of_text]], np.int32)
    if len(text) == 0:
        return Pairs(text, text, np.empty(0, np.float32))
    closed = record.last and all(around_text(tokenizer))
    end = np.repeat(end, 2) if closed else end if record.last else end[:0]
    tokens = np.concatenate([start[:0] if record.continues else start, prompt, text, end])
    weights = np.ones(len(tokens) - 1, np.float32)
    weights[: len(prompt)] = 0
    if closed:
        weights[-1] = 0
    return Pairs(tokens[:-1], tokens[1:], weights)


def empty_batch(rows: int, length: int) -> Batch:
    """Padding only."""
    integers = np.zeros((4, rows, length), np.int32)
    return Batch(integers[0], integers[1], np.zeros((rows, length), np.float32), integers[2], integers[3])


def write_pairs(
    batch: Batch, row: int, column: int, pairs: Pairs, offset: int, segment: int, first_position: int = 0
) -> int:
    """Write pairs from `offset` on to a row from `column` on, as many as fit; returns how many."""
    length = batch.inputs.shape[1]
    count = min(length - column, len(pairs.inputs) - offset)
    here, there = slice(column, column + count), slice(offset, offset + count)
    batch.inputs[row, here] = pairs.inputs[there]
    batch.targets[row, here] = pairs.targets[there]
    batch.weights[row, here] = pairs.weights[there]
    batch.segment_ids[row, here] = segment
    batch.positions[row, here] = arange(length)[:count] + first_position
    return count


def packed_tokens(sizes: Iterable[int], length: int, most: int) -> int:
    """Tokens of records of these sizes in rows that follow each other, and the padding behind rows of `most` records (0: any).

    >>> packed_tokens([3, 1, 1, 6], length=8, most=0), packed_tokens([3, 1, 1, 6], length=8, most=3)
    (11, 14)
    """
    total = segment = 0
    for size in sizes:
        if size > 0 and segment == most > 0:
            total, segment = -(-total // length) * length, 0
        rows = (total + size) // length - total // length
        total += size
        # A record that ends a row leaves none for the next one.
        segment = (int(total % length > 0) if rows else segment + 1) if size else segment
    return total


@functools.cache
def arange(length: int) -> Int[np.ndarray, " n"]:
    """0, 1, ..., shared: do not write to it."""
    return np.arange(length, dtype=np.int32)
