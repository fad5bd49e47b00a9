"""Batches from records: virtual streams that any number of processes read alike, and whole splits in order."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float, Int

from transformer.config import DataConfig
from transformer.data.prepare import Record, Source, open_sources, whole_documents
from transformer.data.tokenizers import Tokenizer
from transformer.types import Batch, CheckpointableIterator, UserError
from transformer.validation import require

_MAX_STREAMS = 64
_PREFETCHED_BATCHES = 8
_GOLDEN_RATIO = 0.6180339887498949


class Pairs(NamedTuple):
    """Tokens of a document, or of a piece of one, as aligned pairs."""

    inputs: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]


def make_pairs(tokenizer: Tokenizer, record: Record) -> Pairs:
    """Each token of a record with the one before it; end-of-text stands before a document and after it.

    The prompt has weight 0. The first token of a piece that continues a document is read but not a target,
    since what precedes it is in another record. A document without text has no pairs.
    """
    prompt = tokenizer.encode(record.prompt) if record.prompt else np.empty(0, np.int32)
    text = tokenizer.encode(record.text)
    end = np.array([tokenizer.end_of_text], np.int32)
    before = end[:0] if record.continues else end
    after = end if record.last else end[:0]
    if len(text) == 0:
        before = after = prompt = end[:0]
    tokens = np.concatenate([before, prompt, text, after])
    weights = np.ones(max(len(tokens) - 1, 0), np.float32)
    weights[: len(prompt)] = 0
    return Pairs(tokens[:-1], tokens[1:], weights)


def train_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    process_index: int = 0,
    process_count: int = 1,
    sources: Sequence[Source] = (),
) -> CheckpointableIterator:
    """An endless iterator over this process's rows of each batch, from the training split.

    The rows of all processes together do not depend on how many there are. `sources` are those of `config`, if they
    are open already. The state is `{"step": t, "streams": {"0": ..., ...}}` with the streams this process reads: the union of
    the states of all processes restores any number of them.
    """
    own_rows = _own_rows(config, process_index, process_count)
    sources = sources or open_sources(config)
    records = [source.records("train") for source in sources]
    for source, of_source in zip(sources, records, strict=True):
        _check_length(config, tokenizer, source.name, of_source)
    fewest, name = min((len(of_source), source.name) for source, of_source in zip(sources, records, strict=True))
    num_streams = _num_streams(config, fewest, name)
    batches = _Batches(config, tokenizer, sources, records, num_streams, own_rows)
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_PREFETCHED_BATCHES))


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """A whole split, in order, each document once and whole; iterate as often as needed.

    Rows are always packed and kept apart; a document longer than a row goes on in the next one, without its context. The
    last batch is filled up with rows of weight 0.
    """

    config: DataConfig
    tokenizer: Tokenizer
    split: str
    sources: tuple[Source, ...]
    own_rows: range

    def __iter__(self) -> Iterator[Batch]:
        size, length = self.config.batch_size, self.config.sequence_length
        rows = slice(self.own_rows.start, self.own_rows.stop)
        batch, row, column, segment = _empty(size, length), 0, 0, 0
        for pairs in self._pairs():
            offset = 0
            while offset < len(pairs.inputs):
                if column == length:
                    row, column, segment = row + 1, 0, 0
                if row == size:
                    yield Batch(*(field[rows] for field in batch))
                    batch, row = _empty(size, length), 0
                segment += 1
                count = _write(batch, row, column, pairs, offset, segment)
                offset, column = offset + count, column + count
        if column > 0:
            yield Batch(*(field[rows] for field in batch))

    def _pairs(self) -> Iterator[Pairs]:
        for source in self.sources:
            for prompt, text in whole_documents(source, self.split):
                yield make_pairs(self.tokenizer, Record(text, prompt, continues=False, last=True))


def evaluation_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    split: str,
    *,
    process_index: int = 0,
    process_count: int = 1,
    sources: Sequence[Source] = (),
) -> EvaluationBatches:
    """This process's rows of the batches that cover the split: every target of it exactly once."""
    own_rows = _own_rows(config, process_index, process_count)
    sources = tuple(sources or open_sources(config))
    for source in sources:
        source.records(split)  # a missing split is an error now, not at the first evaluation
    return EvaluationBatches(config, tokenizer, split, sources, own_rows)


# ---- Rows ------------------------------------------------------------------------------------------------------------


def _empty(rows: int, length: int) -> Batch:
    integers = np.zeros((4, rows, length), np.int32)
    return Batch(integers[0], integers[1], np.zeros((rows, length), np.float32), integers[2], integers[3])


@functools.cache
def _arange(length: int) -> Int[np.ndarray, " n"]:
    return np.arange(length, dtype=np.int32)


def _write(batch: Batch, row: int, column: int, pairs: Pairs, offset: int, segment: int) -> int:
    """Write pairs from `offset` on to a row from `column` on, as many as fit; returns how many."""
    length = batch.inputs.shape[1]
    count = min(length - column, len(pairs.inputs) - offset)
    here, there = slice(column, column + count), slice(offset, offset + count)
    batch.inputs[row, here] = pairs.inputs[there]
    batch.targets[row, here] = pairs.targets[there]
    batch.weights[row, here] = pairs.weights[there]
    batch.segment_ids[row, here] = segment
    batch.positions[row, here] = _arange(length)[:count]
    return count


class _Cursor:
    """Reads one source's share of one stream: which record, and where in it the next row starts."""

    def __init__(self, records: Sequence[Record], tokenizer: Tokenizer, seed: int, name: str) -> None:
        pairs = grain.MapDataset.source(records).shuffle(seed=seed).repeat()  # in another order each epoch
        self._pairs_of_record = pairs.map(functools.partial(make_pairs, tokenizer))
        self._epoch = len(records)
        self._name = name
        self._pairs: Pairs | None = None
        self.record = 0
        self.offset = 0

    def set_state(self, record: int, offset: int) -> None:
        self.record, self.offset, self._pairs = record, offset, None

    def fill(self, batch: Batch, row: int) -> None:
        column, segment, last_written = 0, 0, self.record
        while column < batch.inputs.shape[1]:
            if self._pairs is None:
                self._pairs = self._pairs_of_record[self.record]
            if len(self._pairs.inputs) > 0:
                segment, last_written = segment + 1, self.record
                count = _write(batch, row, column, self._pairs, self.offset, segment)
                column, self.offset = column + count, self.offset + count
            if self.offset == len(self._pairs.inputs):
                self.set_state(self.record + 1, 0)
                require(
                    self.record - last_written <= self._epoch,
                    f"A stream must hold text, one of {self._name} has {self._epoch} records without any: "
                    "set a smaller data.num_streams.",
                )


# ---- Streams ---------------------------------------------------------------------------------------------------------


class _Subset(Sequence[Record]):
    def __init__(self, records: Sequence[Record], indices: Int[np.ndarray, " n"]) -> None:
        self._records = records
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._records[int(self._indices[index])]


class _Batches(grain.IterDataset):
    """The rows of every batch: which stream each comes from, and which source a stream's row is drawn from.

    With no more streams than rows, stream s fills the same rows of each batch, next to each other; with more, they take turns.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        records: Sequence[Sequence[Record]],
        num_streams: int,
        own_rows: range,
    ) -> None:
        super().__init__()
        self.config = config
        self.own_rows = own_rows
        self.num_streams = num_streams
        self.corpus = hashlib.sha256("\0".join(source.fingerprint for source in sources).encode()).hexdigest()[:16]
        self._tokenizer = tokenizer
        self._names = [source.name for source in sources]
        self._records = records
        # RandomState's streams are frozen: the deal is the same under any version of NumPy.
        self._deals = [
            np.random.RandomState(self._seed(index)).permutation(len(of_source))
            for index, of_source in enumerate(records)
        ]
        weights = np.array(config.weights or [1.0] * len(sources))
        self._shares = np.cumsum(weights / weights.sum())

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)

    @property
    def rows_per_stream(self) -> int:
        return max(1, self.config.batch_size // self.num_streams)

    @property
    def turns(self) -> int:
        return max(1, self.num_streams // self.config.batch_size)

    def place(self, row: int, step: int) -> tuple[int, int]:
        """The stream that row `row` of batch `step` comes from, and which of the stream's rows it is."""
        stream = row // self.rows_per_stream + self.config.batch_size * (step % self.turns)
        return stream, step // self.turns * self.rows_per_stream + row % self.rows_per_stream

    def source(self, stream: int, row_of_stream: int) -> int:
        # A golden-ratio sequence, staggered: even over the streams at any step, and over time in any stream.
        point = (row_of_stream * _GOLDEN_RATIO + stream / self.num_streams) % 1.0
        return min(int(np.searchsorted(self._shares, point, side="right")), len(self._shares) - 1)

    def cursors(self, stream: int) -> list[_Cursor]:
        """One for each source."""
        return [
            _Cursor(
                _Subset(records, deal[stream :: self.num_streams]), self._tokenizer, self._seed(index, stream), name
            )
            for index, (records, deal, name) in enumerate(zip(self._records, self._deals, self._names, strict=True))
        ]

    def _seed(self, *place: int) -> int:
        return int(np.random.SeedSequence((self.config.shuffle_seed, *place)).generate_state(1)[0])


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, batches: _Batches) -> None:
        super().__init__()
        self._batches = batches
        self._step = 0
        per_stream, own = batches.rows_per_stream, batches.own_rows
        # A stream whose rows are shared with another process is read whole, and the other's rows dropped.
        self._rows = range(own.start // per_stream * per_stream, -(-own.stop // per_stream) * per_stream)
        streams = sorted({batches.place(row, step)[0] for row in self._rows for step in range(batches.turns)})
        self._cursors = {stream: batches.cursors(stream) for stream in streams}

    def __next__(self) -> Batch:
        batches = self._batches
        batch = _empty(len(self._rows), batches.config.sequence_length)
        for index, row in enumerate(self._rows):
            stream, row_of_stream = batches.place(row, self._step)
            self._cursors[stream][batches.source(stream, row_of_stream)].fill(batch, index)
        self._step += 1
        if not batches.config.pack:
            batch.segment_ids[:] = 1
            batch.positions[:] = _arange(batches.config.sequence_length)[None]
        own = slice(batches.own_rows.start - self._rows.start, batches.own_rows.stop - self._rows.start)
        return Batch(*(field[own] for field in batch))

    def get_state(self) -> dict[str, Any]:
        streams = {
            str(stream): [[cursor.record, cursor.offset] for cursor in cursors]
            for stream, cursors in self._cursors.items()
        }
        return {
            "step": self._step,
            "corpus": self._batches.corpus,
            "num_streams": self._batches.num_streams,
            "streams": streams,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        require(
            state["corpus"] == self._batches.corpus and state["num_streams"] == self._batches.num_streams,
            f"A run must go on with the text it began with ({state['num_streams']} streams of corpus {state['corpus']}), "
            f"the sources are now {self._batches.num_streams} streams of corpus {self._batches.corpus}: "
            "restore the text, or start a new run.",
        )
        missing = [stream for stream in self._cursors if str(stream) not in state["streams"]]
        if missing:
            raise ValueError(
                f"The state must hold every stream this process reads, streams {missing} are missing: "
                "merge the `streams` of all processes that wrote it."
            )
        self._step = state["step"]
        for stream, cursors in self._cursors.items():
            for cursor, (record, offset) in zip(cursors, state["streams"][str(stream)], strict=True):
                cursor.set_state(record, offset)


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _own_rows(config: DataConfig, process_index: int, process_count: int) -> range:
    size = config.batch_size
    require(
        size % process_count == 0,
        f"data.batch_size must be divisible by the number of processes ({process_count}), got {size}.",
    )
    return range(size * process_index // process_count, size * (process_index + 1) // process_count)


def _num_streams(config: DataConfig, fewest: int, name: str) -> int:
    if config.num_streams == 0:
        most = min(_MAX_STREAMS, config.batch_size, fewest)
        return max(streams for streams in range(1, most + 1) if config.batch_size % streams == 0)
    require(
        config.num_streams <= fewest,
        f"data.num_streams must not exceed the records of a source, got {config.num_streams} streams and {name} has "
        f"{fewest} records: leave it 0 (automatic), or set a smaller data.record_bytes.",
    )
    return config.num_streams


def _check_length(config: DataConfig, tokenizer: Tokenizer, name: str, records: Sequence[Record]) -> None:
    tokens = 0
    for index in range(len(records)):
        tokens += len(make_pairs(tokenizer, records[index]).inputs)
        if tokens >= config.sequence_length:
            return
    raise UserError(
        f"A corpus must fill at least one sequence, the training split of {name} has {tokens} tokens and "
        f"data.sequence_length is {config.sequence_length}: add text, or set a smaller data.sequence_length."
    )
