"""Batches for training, from endless virtual streams, and for evaluation, over a whole split in order."""

import atexit
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from transformer.config import DataConfig
from transformer.data.documents import CONVERSATION
from transformer.data.encoded import Encoded
from transformer.data.registry import open_sources
from transformer.data.rows import Pairs, empty_batch, make_pairs, pairs_of, write_pairs
from transformer.data.source import Source
from transformer.data.streams import StreamBatches
from transformer.data.tokenizers import Tokenizer
from transformer.data.tokens import document_tokens, open_tokens
from transformer.types import Batch, CheckpointableIterator, Noise, PyTree, UserError
from transformer.validation import require

Convert = Callable[[Batch], Any]
"""Converts a batch to another type of batch, row by row."""

_MAX_STREAMS = 64
_PREFETCHED_BATCHES = 8


def train_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    process_index: int = 0,
    process_count: int = 1,
    sources: Sequence[Source] = (),
    noise: Noise | None = None,
    convert: Convert | None = None,
    continued: bool = False,
    joined: bool = False,
) -> CheckpointableIterator:
    """An endless iterator over this process's rows of each batch, from the training split.

    The rows of all processes together do not depend on the number of processes. The state is
    `{"step": t, "streams": {"0": ..., ...}, ...}` with the streams that this process reads. The union of the `streams` of all
    processes restores any number of processes.

    `sources` are the opened sources of `config`, if available; `noise` changes every row, and `convert` makes another type of
    batch. With `continued`, row i of a batch continues row i of the previous batch, and its positions continue. With
    `joined`, the documents of a row are one text, and their number is unlimited. Joined rows, windows (`pack=False`) and rows
    of one text each are full, and their batches have no segment ids.
    """
    rows = own_rows(config, process_index, process_count)
    require(
        not config.best_fit or (config.pack and not continued and not joined),
        "Best-fit packing is of packed rows whose documents are kept apart, got data.best_fit=True and rows that are "
        f"{'continued' if continued else 'joined' if joined else 'windows'}; set data.best_fit=False.",
    )
    sources = sources or open_sources(config)
    num_streams = count_streams(config, sources, tokenizer, continued)
    tokens = [open_tokens(source, "train", tokenizer) for source in sources]
    for source, of_source in zip(sources, tokens, strict=True):
        _check_length(config, source.name, of_source)
    most = training_limit(config, continued, joined)
    batches = StreamBatches(config, sources, tokens, num_streams, rows, noise, continued, most)
    if convert is not None:
        batches = batches.map(convert)
    # The result of a user-defined conversion of windows is unknown.
    return prefetched(batches.map(whole_rows) if joined or (not config.pack and convert is None) else batches)


def whole_rows(batch: PyTree) -> PyTree:
    """A batch whose rows are one document each, without the redundant segment ids."""
    names = [name for name in batch._fields if name.endswith("segment_ids")]
    require(
        all((getattr(batch, name) == 1).all() for name in names),
        "Windows of text (data.pack=False) must be one document each, got segment ids other than 1 from Objective.changes; set "
        "data.pack=True.",
    )
    return batch._replace(**dict.fromkeys(names))


def prefetched(batches: grain.IterDataset) -> CheckpointableIterator:
    """An iterator that prefetches a few batches in a thread; its state belongs to the last batch returned."""
    iterator = _PrefetchIterator(iter(batches), _PREFETCHED_BATCHES)
    atexit.register(_close, weakref.ref(iterator))  # its thread must end before the interpreter does
    return iterator


class _PrefetchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Grain's destructor prints an error if modules have already been torn down.
        if not is_finalizing():
            super().__del__()


def _close(reference: "weakref.ref[_PrefetchIterator]") -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """A whole split in order, each document exactly once; can be iterated repeatedly.

    Rows are packed and their documents kept apart, whatever `config.pack` says. A document longer than a row continues in the
    next row, without its context. With `config.stride`, a row is a window of one document, and only targets that the previous
    window did not score have weight. With `continued`, the split is cut into as many equal parts as a batch has rows, and row
    i of the batches reads part i. The last batch is padded with rows of weight 0.
    """

    config: DataConfig
    tokenizer: Tokenizer
    split: str
    sources: tuple[Source, ...]
    own_rows: range
    noise: Noise | None = None
    convert: Convert | None = None
    continued: bool = False
    joined: bool = False

    def __iter__(self) -> Iterator[Any]:
        batches = self._continued_batches() if self.continued else self._batches()
        for index, batch in enumerate(batches):
            if self.noise is not None:
                for row in self.own_rows:
                    self.noise(batch, row, (index, row))
            own = Batch(*(field[self.own_rows.start : self.own_rows.stop] for field in batch))
            yield own if self.convert is None else self.convert(own)

    def _batches(self) -> Iterator[Batch]:
        size, length = self.config.batch_size, self.config.sequence_length
        most = segment_limit(self.config, self.continued, self.joined) or length
        batch, row, column, segment = empty_batch(size, length), 0, 0, 0
        for pairs in self._windows():
            offset = 0
            while offset < len(pairs.inputs):
                if column == length or segment == most or (self.config.stride > 0 and column > 0):
                    row, column, segment = row + 1, 0, 0
                if row == size:
                    yield batch
                    batch, row = empty_batch(size, length), 0
                segment += 1
                count = write_pairs(batch, row, column, pairs, offset, segment)
                offset, column = offset + count, column + count
        if column > 0:
            yield batch

    def _continued_batches(self) -> Iterator[Batch]:
        size, length = self.config.batch_size, self.config.sequence_length
        # Views of stored data: two bytes for each token of the split.
        documents = list(self.documents())
        starts = np.cumsum([0, *(len(pairs.inputs) for pairs in documents)])
        num_tokens = int(starts[-1])
        part = -(-num_tokens // (size * length)) * length
        for start in range(0, part, length):
            batch = empty_batch(size, length)
            for row in range(size):
                begin = row * part + start
                first = index = int(np.searchsorted(starts, begin, side="right")) - 1
                column = 0
                while column < length and begin + column < num_tokens:
                    offset = begin + column - int(starts[index])
                    # A document cut between two parts restarts in the second part, without context.
                    position = min(offset, start + column)
                    column += write_pairs(batch, row, column, documents[index], offset, index - first + 1, position)
                    index += 1
            yield batch

    def _windows(self) -> Iterator[Pairs]:
        """Documents; with a stride, windows of them, whose first tokens are context without loss."""
        length, stride = self.config.sequence_length, self.config.stride
        for pairs in self.documents():
            if stride == 0:
                yield pairs
                continue
            scored = 0
            while scored < len(pairs.inputs):
                stop = min(scored + (stride if scored else length), len(pairs.inputs))
                start = max(0, stop - length)
                weights = pairs.weights[start:stop].copy()
                weights[: scored - start] = 0
                yield Pairs(pairs.inputs[start:stop], pairs.targets[start:stop], weights)
                scored = stop

    def texts(self) -> Iterator[str]:
        """The scored text, without prompts: long texts in pieces, as much as the limit allows; of conversations, the replies."""
        if self.config.limit > 0 or any(source.encoded for source in self.sources):
            for pairs in self.documents():
                yield self._learnt(pairs)
            return
        for source in self.sources:
            for record in source.records(self.split):
                replies = record.prompt == CONVERSATION
                yield self._learnt(make_pairs(self.tokenizer, record)) if replies else record.text

    def _learnt(self, pairs: Pairs) -> str:
        return self.tokenizer.decode(pairs.targets[pairs.weights > 0])

    def documents(self) -> Iterator[Pairs]:
        """The scored documents, the last one cut at the limit."""
        left = self.config.limit or sys.maxsize
        for source in self.sources:
            # With a limit, tokens beyond it need not be encoded.
            for encoded in document_tokens(source, self.split, self.tokenizer, self.config.limit):
                pairs = pairs_of(encoded)
                yield Pairs(*(field[:left] for field in pairs))
                left -= len(pairs.inputs)
                if left <= 0:
                    return


def evaluation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    *,
    process_index: int = 0,
    process_count: int = 1,
    sources: Sequence[Source] = (),
    noise: Noise | None = None,
    convert: Convert | None = None,
    continued: bool = False,
    joined: bool = False,
) -> EvaluationBatches:
    """This process's rows of the batches that cover the split: each target exactly once."""
    rows = own_rows(config, process_index, process_count)
    sources = tuple(sources or open_sources(config))
    for source in sources:
        source.records(split)  # report a missing split now, not at the first evaluation
    return EvaluationBatches(config, tokenizer, split, sources, rows, noise, convert, continued, joined)


def segment_limit(config: DataConfig, continued: bool, joined: bool) -> int:
    """Most documents of a packed row; 0 means no limit."""
    return 0 if continued or joined else config.max_segments


def training_limit(config: DataConfig, continued: bool, joined: bool) -> int:
    """`segment_limit` of training rows, which are packed, or windows with any number of documents."""
    return segment_limit(config, continued, joined) if config.pack else 0


# ---- Checks ----------------------------------------------------------------------------------------------------------


def own_rows(config: DataConfig, process_index: int, process_count: int) -> range:
    """The rows of a batch that a process reads."""
    size = config.batch_size
    require(
        size % process_count == 0,
        f"data.batch_size must be divisible by the number of processes ({process_count}), got {size}.",
    )
    return range(size * process_index // process_count, size * (process_index + 1) // process_count)


def _count_records(source: Source, tokenizer: Tokenizer) -> int:
    return len(source.records("train") if source.encoded is None else source.encoded("train", tokenizer))


def count_streams(config: DataConfig, sources: Sequence[Source], tokenizer: Tokenizer, continued: bool = False) -> int:
    """The number of streams over which the training split of each source is distributed."""
    fewest, name = min((_count_records(source, tokenizer), source.name) for source in sources)
    require(
        not continued or config.batch_size <= fewest,
        f"A memory needs a stream of text for each of {config.batch_size} rows, {name} has {fewest} records: set a "
        "smaller data.batch_size or data.record_bytes.",
    )
    if config.num_streams == 0 and continued:
        return config.batch_size
    if config.num_streams == 0:
        most = min(_MAX_STREAMS, config.batch_size, fewest)
        return max(streams for streams in range(1, most + 1) if config.batch_size % streams == 0)
    require(
        config.num_streams <= fewest,
        f"data.num_streams must not exceed the records of a source, got {config.num_streams} streams and {name} has "
        f"{fewest} records: leave it 0 (automatic), or set a smaller data.record_bytes.",
    )
    return config.num_streams


def _check_length(config: DataConfig, name: str, records: Sequence[Encoded]) -> None:
    tokens = 0
    for encoded in records:
        tokens += encoded.num_targets
        if tokens >= config.sequence_length:
            return
    raise UserError(
        f"A corpus must fill at least one sequence, the training split of {name} has {tokens} tokens and "
        f"data.sequence_length is {config.sequence_length}: add text, or set a smaller data.sequence_length."
    )
