"""How labelled texts and pairs become batches: encoded, cut to the room of a row, padded."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.tokenizers import Tokenizer
from transformer.types import LabelledBatch, PairBatch


class TextExample(NamedTuple):
    """A text (of a pair, the source), and its class or its counterpart."""

    text: str
    label: int = 0
    target: str = ""


class Form(NamedTuple):
    """How examples become a batch."""

    encode: Callable[[TextExample], Any]
    """Tokens of an example."""
    length: Callable[[Any], int]
    """Positions that an encoded example needs."""
    collate: Callable[[Sequence[Any], int, int], Any]
    """`(encoded examples, rows, length)`: a batch, whose rows beyond the examples are filler."""
    lengths: Callable[[TextExample], dict[str, int]]
    """Tokens of each text of an example before it is cut: of what a row has room for `config.sequence_length - 1`."""


def labelled_form(tokenizer: Tokenizer, config: DataConfig) -> Form:
    """`LabelledBatch`es: end-of-text, which a classifier may pool, then as much of the text as a row has room for."""

    def encode(example: TextExample) -> tuple[np.ndarray, int]:
        return text_tokens(tokenizer, example.text, config), example.label

    def collate(encoded: Sequence[tuple[np.ndarray, int]], rows: int, length: int) -> LabelledBatch:
        labels, weights = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        labels[: len(encoded)], weights[: len(encoded)] = [label for _, label in encoded], 1
        return LabelledBatch(*padded([tokens for tokens, _ in encoded], rows, length), labels, weights)

    return Form(
        encode, lambda encoded: len(encoded[0]), collate, lambda example: {"texts": len(tokenizer.encode(example.text))}
    )


def pairs_form(source_tokenizer: Tokenizer, tokenizer: Tokenizer, config: DataConfig) -> Form:
    """`PairBatch`es: sources end with end-of-text, targets start and end with it; what does not fit in a row is cut."""

    def encode(example: TextExample) -> tuple[np.ndarray, np.ndarray]:
        room, end = config.sequence_length - 1, [tokenizer.end_of_text]
        source = source_tokens(source_tokenizer, example.text, config)
        target = tokenizer.encode(example.target)[:room]
        return source, np.concatenate([end, target, end])

    def collate(encoded: Sequence[tuple[np.ndarray, np.ndarray]], rows: int, length: int) -> PairBatch:
        sources, targets = [source for source, _ in encoded], [target for _, target in encoded]
        inputs_BT, segment_ids_BT = padded([target[:-1] for target in targets], rows, length)
        targets_BT, _ = padded([target[1:] for target in targets], rows, length)
        weights_BT = segment_ids_BT.astype(np.float32)
        return PairBatch(*padded(sources, rows, length), inputs_BT, targets_BT, weights_BT, segment_ids_BT)

    def lengths(example: TextExample) -> dict[str, int]:
        source, target = source_tokenizer.encode(example.text), tokenizer.encode(example.target)
        return {"sources": len(source), "targets": len(target)}

    return Form(encode, lambda encoded: max(len(encoded[0]), len(encoded[1]) - 1), collate, lengths)


def count_cut(form: Form, config: DataConfig, examples: Sequence[TextExample]) -> dict[str, int]:
    """How many texts of each kind (`texts`, or `sources` and `targets`) are longer than a row has room for, and so are cut."""
    cut: Counter[str] = Counter()
    for example in examples:
        cut.update({name: int(n > config.sequence_length - 1) for name, n in form.lengths(example).items()})
    return dict(cut)


def text_tokens(tokenizer: Tokenizer, text: str, config: DataConfig) -> Int[np.ndarray, " n"]:
    """A text as a classifier reads it: end-of-text, then as much as a row has room for."""
    tokens = truncate(tokenizer.encode(text), config.sequence_length - 1, config.truncate)
    return np.concatenate([[tokenizer.end_of_text], tokens])


def source_tokens(tokenizer: Tokenizer, text: str, config: DataConfig) -> Int[np.ndarray, " n"]:
    """A source as a translator reads it: as much as a row has room for, then end-of-text."""
    tokens = truncate(tokenizer.encode(text), config.sequence_length - 1, config.truncate)
    return np.append(tokens, tokenizer.end_of_text)


def truncate(tokens: Int[np.ndarray, " n"], room: int, keep: str) -> Int[np.ndarray, " m"]:
    """At most `room` tokens: the first (`head`), the last (`tail`), or half of each (`head_tail`)."""
    if len(tokens) <= room:
        return tokens
    head = {"head": room, "tail": 0, "head_tail": (room + 1) // 2}[keep]
    return np.concatenate([tokens[:head], tokens[len(tokens) - (room - head) :]])


def padded(sequences: Sequence[np.ndarray], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [rows, length]; rows beyond the sequences are filler."""
    tokens_BT, segment_ids_BT = np.zeros((2, rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)], segment_ids_BT[row, : len(sequence)] = sequence, 1
    return tokens_BT, segment_ids_BT


def by_length(sequences: Sequence[np.ndarray], batch_size: int) -> Iterator[list[int]]:
    """Indices of sequences of similar length, at most `batch_size` at a time; each index once."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))
