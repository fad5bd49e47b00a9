"""Batches with one example a row, of similar length so that little is padding."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.examples import ExampleSource, TextExample
from transformer.data.rows import permutation
from transformer.data.tokenizers import Tokenizer
from transformer.types import LabelledBatch, PairBatch
from transformer.validation import require

_BATCHES_OF_CHUNK = 64
_ORDER = 1  # tells the order of a chunk's batches from other draws


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
        tokens = truncate(tokenizer.encode(example.text), config.sequence_length - 1, config.truncate)
        return np.concatenate([[tokenizer.end_of_text], tokens]), example.label

    def collate(encoded: Sequence[tuple[np.ndarray, int]], rows: int, length: int) -> LabelledBatch:
        labels, weights = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        labels[: len(encoded)], weights[: len(encoded)] = [label for _, label in encoded], 1
        return LabelledBatch(*_padded([tokens for tokens, _ in encoded], rows, length), labels, weights)

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
        inputs_BT, segment_ids_BT = _padded([target[:-1] for target in targets], rows, length)
        targets_BT, _ = _padded([target[1:] for target in targets], rows, length)
        weights_BT = segment_ids_BT.astype(np.float32)
        return PairBatch(*_padded(sources, rows, length), inputs_BT, targets_BT, weights_BT, segment_ids_BT)

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


def _padded(sequences: Sequence[np.ndarray], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [rows, length]."""
    tokens_BT, segment_ids_BT = np.zeros((2, rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence)], segment_ids_BT[row, : len(sequence)] = sequence, 1
    return tokens_BT, segment_ids_BT


def _batch(encoded: Sequence[Any], form: Form, config: DataConfig, rows: range) -> Any:
    """Some rows of a batch, padded to the shortest bucket that holds all of them."""
    longest = max(form.length(example) for example in encoded)
    length = next(bucket for bucket in buckets(config) if bucket >= longest)
    batch = form.collate(encoded, config.batch_size, length)
    return type(batch)(*(field[rows.start : rows.stop] for field in batch))


def buckets(config: DataConfig) -> tuple[int, ...]:
    """The lengths that batches may have: one program is compiled for each."""
    length = config.sequence_length
    return config.buckets or tuple(sorted({-(-length // 4), -(-length // 2), length}))


class ExampleBatches(grain.IterDataset):
    """Some rows of every batch of an endless training run.

    Each epoch has another order and drops what does not fill a batch. Examples of some dozens of batches are sorted by length
    before they are dealt to batches, and these are shuffled again. Batch `t` depends on `t` and the seed only, not on
    which process asks, so that the state is `t`.
    """

    def __init__(self, config: DataConfig, form: Form, source: ExampleSource, own_rows: range) -> None:
        super().__init__()
        self.config, self.form, self.own_rows = config, form, own_rows
        self.examples = source.examples("train")
        self.corpus = hashlib.sha256(source.fingerprint.encode()).hexdigest()[:16]
        self.batches_of_epoch = len(self.examples) // config.batch_size
        require(
            self.batches_of_epoch > 0,
            f"A training split must fill a batch, {source.name} has {len(self.examples)} examples and data.batch_size is "
            f"{config.batch_size}: set a smaller one.",
        )

    def __iter__(self) -> "_ExampleIterator":
        return _ExampleIterator(self)

    def chunk(self, epoch: int, index: int) -> list[list[Any]]:
        """The batches of a chunk, in the order they are used."""
        size, seed = self.config.batch_size, self.config.shuffle_seed
        order = permutation(len(self.examples), seed, epoch)
        count = min(_BATCHES_OF_CHUNK, self.batches_of_epoch - index * _BATCHES_OF_CHUNK)
        start = index * _BATCHES_OF_CHUNK * size
        encoded = [self.form.encode(self.examples[int(i)]) for i in order[start : start + count * size]]
        by_length = sorted(encoded, key=self.form.length)
        batches = [by_length[i * size : (i + 1) * size] for i in range(count)]
        return [batches[i] for i in permutation(count, seed, epoch, index, _ORDER)]


class _ExampleIterator(grain.DatasetIterator):
    def __init__(self, dataset: ExampleBatches) -> None:
        super().__init__()
        self._dataset, self._step = dataset, 0
        self._place: tuple[int, int] | None = None
        self._chunk: list[list[Any]] = []

    def __next__(self) -> Any:
        dataset = self._dataset
        epoch, of_epoch = divmod(self._step, dataset.batches_of_epoch)
        index, of_chunk = divmod(of_epoch, _BATCHES_OF_CHUNK)
        if self._place != (epoch, index):
            self._place, self._chunk = (epoch, index), dataset.chunk(epoch, index)
        self._step += 1
        return _batch(self._chunk[of_chunk], dataset.form, dataset.config, dataset.own_rows)

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step, "corpus": self._dataset.corpus}

    def set_state(self, state: dict[str, Any]) -> None:
        corpus = self._dataset.corpus
        require(
            state["corpus"] == corpus,
            f"A run must go on with the examples it began with (corpus {state['corpus']}), the source now gives corpus "
            f"{corpus}: restore it, or start a new run.",
        )
        self._step = state["step"]


@dataclasses.dataclass(frozen=True)
class ExampleEvaluationBatches:
    """A whole split, each example once, sorted by length within some dozens of batches; iterate as often as needed."""

    config: DataConfig
    form: Form
    examples: Callable[[], Sequence[TextExample]]
    own_rows: range

    def __iter__(self) -> Iterator[Any]:
        examples, size = self.examples(), self.config.batch_size
        of_chunk = size * _BATCHES_OF_CHUNK
        for start in range(0, len(examples), of_chunk):
            stop = min(start + of_chunk, len(examples))
            encoded = sorted((self.form.encode(examples[i]) for i in range(start, stop)), key=self.form.length)
            for first in range(0, len(encoded), size):
                yield _batch(encoded[first : first + size], self.form, self.config, self.own_rows)
