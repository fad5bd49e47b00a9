"""Tokens as aligned pairs, and the rows that hold them."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from transformer.data.encoded import Encoded, encode_records
from transformer.data.source import Record
from transformer.data.tokenizers import Tokenizer
from transformer.types import Batch


class Pairs(NamedTuple):
    """Tokens of a document or a piece of one, each with its previous token and its loss weight."""

    inputs: Integer[np.ndarray, " n"]
    targets: Integer[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]


def make_pairs(tokenizer: Tokenizer, record: Record) -> Pairs:
    """The pairs of a record; a document without text has none."""
    return pairs_of(next(encode_records(tokenizer, [record])))


def pairs_of(encoded: Encoded) -> Pairs:
    """The pairs of encoded tokens, as views."""
    return Pairs(encoded.tokens[:-1], encoded.tokens[1:], encoded.weights)


def empty_batch(rows: int, length: int) -> Batch:
    """A batch of padding."""
    integers = np.zeros((4, rows, length), np.int32)
    return Batch(integers[0], integers[1], np.zeros((rows, length), np.float32), integers[2], integers[3])


def write_pairs(
    batch: Batch, row: int, column: int, pairs: Pairs, offset: int, segment: int, first_position: int = 0
) -> int:
    """Write as many pairs as fit, from `offset`, into a row from `column`; returns their number."""
    length = batch.inputs.shape[1]
    count = min(length - column, len(pairs.inputs) - offset)
    here, there = slice(column, column + count), slice(offset, offset + count)
    batch.inputs[row, here] = pairs.inputs[there]
    batch.targets[row, here] = pairs.targets[there]
    batch.weights[row, here] = pairs.weights[there]
    batch.segment_ids[row, here] = segment
    batch.positions[row, here] = arange(length)[:count] + first_position
    return count


@functools.cache
def arange(length: int) -> Int[np.ndarray, " n"]:
    """0, 1, ..., in a shared array: do not write to it."""
    return np.arange(length, dtype=np.int32)
