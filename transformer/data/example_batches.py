"""Batches with one example per row, grouped by similar length to reduce padding."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain

from transformer.config import DataConfig
from transformer.data.draws import permutation
from transformer.data.example_tokens import open_encoded
from transformer.data.forms.examples import ExampleForm, buckets
from transformer.data.source import ExampleSource
from transformer.data.tokenizers import Tokenizer
from transformer.validation import require

_BATCHES_OF_CHUNK = 64
_ORDER = 1  # separates the random order of a chunk's batches from other draws


def _batch(encoded: Sequence[Any], form: ExampleForm, config: DataConfig, rows: range) -> Any:
    """Some rows of a batch, padded to the shortest bucket that holds all of them."""
    longest = max(form.length(example) for example in encoded)
    length = next(bucket for bucket in buckets(config) if bucket >= longest)
    batch = form.collate(encoded, config.batch_size, length)
    return type(batch)(*(field[rows.start : rows.stop] for field in batch))


def padding_of(lengths: Sequence[int], config: DataConfig) -> float:
    """The fraction of padding in batches, for the example lengths of one chunk."""
    ordered, total = sorted(lengths), 0
    for start in range(0, len(ordered), config.batch_size):
        of_batch = ordered[start : start + config.batch_size]
        total += len(of_batch) * next(bucket for bucket in buckets(config) if bucket >= of_batch[-1])
    return 1 - sum(ordered) / total


class ExampleBatches(grain.IterDataset):
    """Some rows of every batch of an endless training run.

    Each epoch has another order and drops its incomplete last batch. The examples of some dozens of batches (a chunk) are
    sorted by length and split into batches, which are shuffled again. Batch `t` depends only on `t` and the seed, not on the
    process: `t` is the whole state.
    """

    def __init__(
        self, config: DataConfig, form: ExampleForm, tokenizer: Tokenizer, source: ExampleSource, own_rows: range
    ) -> None:
        super().__init__()
        self.config, self.form, self.own_rows = config, form, own_rows
        self.examples = open_encoded(source, form, "train", tokenizer, config)
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
        """The batches of a chunk, in their final order."""
        size, seed = self.config.batch_size, self.config.shuffle_seed
        order = permutation(len(self.examples), seed, epoch)
        count = min(_BATCHES_OF_CHUNK, self.batches_of_epoch - index * _BATCHES_OF_CHUNK)
        start = index * _BATCHES_OF_CHUNK * size
        encoded = [self.examples[int(i)] for i in order[start : start + count * size]]
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
            f"A run must continue with the examples it began with (corpus {state['corpus']}), the source now gives corpus "
            f"{corpus}: restore it, or start a new run.",
        )
        self._step = state["step"]


@dataclasses.dataclass(frozen=True)
class ExampleEvaluationBatches:
    """A whole split, each example once, sorted by length within some dozens of batches; can be iterated repeatedly."""

    config: DataConfig
    form: ExampleForm
    examples: Callable[[], Sequence[Any]]
    """The encoded examples of the split."""
    own_rows: range

    def __iter__(self) -> Iterator[Any]:
        examples, size = self.examples(), self.config.batch_size
        of_chunk = size * _BATCHES_OF_CHUNK
        for start in range(0, len(examples), of_chunk):
            stop = min(start + of_chunk, len(examples))
            encoded = sorted((examples[i] for i in range(start, stop)), key=self.form.length)
            for first in range(0, len(encoded), size):
                yield _batch(encoded[first : first + size], self.form, self.config, self.own_rows)
