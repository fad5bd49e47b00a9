"""Virtual streams: a corpus distributed over a fixed number of endless sequences of rows, and batches of these rows."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.draws import permutation
from transformer.data.encoded import Encoded
from transformer.data.identity import ContentHash
from transformer.data.packing import ROWS_OF_CHUNK, best_fit, row_parts
from transformer.data.rows import Pairs, arange, empty_batch, pairs_of, write_pairs
from transformer.data.source import Source
from transformer.types import Batch, Noise, UserError
from transformer.validation import require

_GOLDEN_RATIO = 0.6180339887498949
_ORDER = 1  # separates the random orders of a chunk's rows and of an epoch's records


class StreamBatches(grain.IterDataset):
    """Some rows of every batch, as a Grain dataset.

    The rows of other processes do not influence these rows. Stream s reads the records that the seed assigns to it. With no
    more streams than rows, a stream fills the same rows of each batch; with more, streams take turns.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[Source],
        records: Sequence[Sequence[Encoded]],
        num_streams: int,
        own_rows: range,
        noise: Noise | None = None,
        continued: bool = False,
        max_segments: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.max_segments = max_segments
        # The kind of packing must not change either, because the state counts rows.
        self.best_fit = [config.sequence_length, max_segments] if config.best_fit else None
        self.noise, self.continued = noise, continued
        self.own_rows = own_rows
        self.num_streams = num_streams
        self.rows_per_stream = max(1, config.batch_size // num_streams)
        self.turns = max(1, num_streams // config.batch_size)
        content = ContentHash()
        content.add(config.record_bytes, *(source.fingerprint for source in sources))
        self.corpus = content.hexdigest()[:16]
        self._records = records
        self._deals = [permutation(len(part), config.shuffle_seed, index) for index, part in enumerate(records)]
        weights = np.array(config.weights or [1.0] * len(sources))
        self._shares = np.cumsum(weights / weights.sum())

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)

    def locate(self, row: int, step: int) -> tuple[int, int]:
        """The stream of row `row` of batch `step`, and the index of the row within the stream."""
        stream = row // self.rows_per_stream + self.config.batch_size * (step % self.turns)
        return stream, step // self.turns * self.rows_per_stream + row % self.rows_per_stream

    def source(self, stream: int, row_of_stream: int) -> int:
        """The source of a row of a stream."""
        if len(self._shares) == 1:
            return 0
        # A staggered golden-ratio sequence: even over the streams at any step, and over time in any stream.
        point = (row_of_stream * _GOLDEN_RATIO + stream / self.num_streams) % 1.0
        return min(int(np.searchsorted(self._shares, point, side="right")), len(self._shares) - 1)

    def cursors(self, stream: int) -> "list[_Cursor]":
        """The stream's cursors, one per source."""
        kind = _BestFitCursor if self.config.best_fit else _Cursor
        return [
            kind(records, deal[stream :: self.num_streams], (self.config.shuffle_seed, i, stream))
            for i, (records, deal) in enumerate(zip(self._records, self._deals, strict=True))
        ]


class _BatchIterator(grain.DatasetIterator):
    """The state is a record and an offset for each stream and source: small, exact, and restored without reading data."""

    def __init__(self, batches: StreamBatches) -> None:
        super().__init__()
        self._batches = batches
        self._step = 0
        per_stream, own = batches.rows_per_stream, batches.own_rows
        # If another process fills some rows of a stream, the whole stream is read here, and the other process's rows dropped.
        self._rows = range(own.start // per_stream * per_stream, -(-own.stop // per_stream) * per_stream)
        streams = sorted({batches.locate(row, step)[0] for row in self._rows for step in range(batches.turns)})
        self._cursors = {stream: batches.cursors(stream) for stream in streams}

    def __next__(self) -> Batch:
        batches = self._batches
        batch = empty_batch(len(self._rows), batches.config.sequence_length)
        for index, row in enumerate(self._rows):
            stream, row_of_stream = batches.locate(row, self._step)
            cursor = self._cursors[stream][batches.source(stream, row_of_stream)]
            if not batches.config.pack:
                cursor.skip_to_window(batches.config.sequence_length)
            cursor.fill(batch, index, batches.continued, batches.max_segments)
            if not batches.config.pack:
                batch.segment_ids[index] = 1
                batch.positions[index] = arange(batches.config.sequence_length)
            if batches.noise is not None:
                batches.noise(batch, index, (stream, row_of_stream))
        self._step += 1
        own = slice(batches.own_rows.start - self._rows.start, batches.own_rows.stop - self._rows.start)
        return Batch(*(field[own] for field in batch))

    def get_state(self) -> dict[str, Any]:
        streams = {
            str(stream): [[cursor.record, cursor.offset] for cursor in cursors]
            for stream, cursors in self._cursors.items()
        }
        num_streams, corpus = self._batches.num_streams, self._batches.corpus
        state = {"step": self._step, "corpus": corpus, "num_streams": num_streams, "streams": streams}
        return state if self._batches.best_fit is None else state | {"best_fit": self._batches.best_fit}

    def set_state(self, state: dict[str, Any]) -> None:
        num_streams, corpus = self._batches.num_streams, self._batches.corpus
        require(
            state["corpus"] == corpus and state["num_streams"] == num_streams,
            f"A run must continue with the text it began with (corpus {state['corpus']}, {state['num_streams']} streams), "
            f"the sources now give corpus {corpus}, {num_streams} streams: restore the text, or start a new run.",
        )
        require(
            state.get("best_fit") == self._batches.best_fit,
            "A run must continue with the rows it began with, whose length and most documents in best-fit packing are "
            f"{state.get('best_fit', 'none')}, got {self._batches.best_fit or 'none'}: set data.best_fit, data.sequence_length "
            "and data.max_segments as they were, or start a new run.",
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
                cursor.move(record, offset)


class _Cursor:
    """Reads one stream's share of one source, in another order each epoch; its state is a record and an offset in it."""

    def __init__(
        self,
        records: Sequence[Encoded],
        share: Int[np.ndarray, " n"],
        seed: tuple[int, ...],
    ) -> None:
        self._records = records
        self._share = share
        self._seed = seed
        self._epoch = -1
        self._order = share
        self._pairs: Pairs | None = None
        self.record = 0
        self.offset = 0

    def move(self, record: int, offset: int) -> None:
        """Set the next pair to number `offset` of record number `record`, counted over all epochs."""
        self.record, self.offset, self._pairs = record, offset, None

    def skip_to_window(self, length: int) -> None:
        """Move to a window of the next record, at another offset each time the record is read.

        Consecutive windows of one text would make the rows of a batch, or the steps of a stream, too similar.
        """
        if self.offset > 0:
            self.move(self.record + 1, 0)
        record = self._read_record()
        self._pairs = pairs_of(record)
        size = len(self._pairs.inputs)
        # A window may continue with another text only after the end of a document.
        room = size if record.last else max(1, size - length + 1)
        self.offset = int((self.record * _GOLDEN_RATIO) % 1.0 * room)

    def fill(self, batch: Batch, row: int, continues: bool, most: int = 0) -> None:
        """Write the next row, of at most `most` documents (0: any number); with `continues`, positions continue the last row."""
        column, segment, last_used = 0, 0, self.record
        while column < batch.inputs.shape[1] and (most == 0 or segment < most):
            pairs = self._pairs = self._pairs or pairs_of(self._read_record())
            if len(pairs.inputs) > 0:
                segment, last_used = segment + 1, self.record
                first = self.offset if continues else 0
                count = write_pairs(batch, row, column, pairs, self.offset, segment, first)
                column, self.offset = column + count, self.offset + count
            if self.offset == len(pairs.inputs):
                self.move(self.record + 1, 0)
                self._check_found(self.record - last_used)

    def _check_found(self, without_text: int) -> None:
        """Refuse to search for text without end."""
        if without_text > len(self._share):
            raise UserError(
                f"A stream must hold text, the {len(self._share)} records of one hold none: set a smaller data.num_streams."
            )

    def _read_record(self) -> Encoded:
        epoch, index = divmod(self.record, len(self._share))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._share[permutation(len(self._share), *self._seed, epoch)]
        return self._records[int(self._order[index])]


class _BestFitCursor(_Cursor):
    """Reads a stream in chunks of records; documents that fit in a row are packed whole (Ding et al. 2024).

    `record` is the first record of the chunk, and `offset` the index of its next row. A chunk ends at the end of an epoch. If a
    document is longer than a row, the tokens beyond its full rows are packed like a document.
    """

    _rows: Sequence[list[tuple[Pairs, int]]] = ()
    _end = 0

    def move(self, record: int, offset: int) -> None:
        """Set the next row to number `offset` of the chunk that begins with record number `record`, counted over all epochs."""
        super().move(record, offset)
        self._rows = ()

    def fill(self, batch: Batch, row: int, continues: bool, most: int = 0) -> None:
        """Write the next row, of at most `most` documents (0: any number)."""
        del continues
        self._rows = self._rows or self._pack(batch.inputs.shape[1], most)
        column = 0
        for segment, (pairs, start) in enumerate(self._rows[self.offset], 1):
            column += write_pairs(batch, row, column, pairs, start, segment)
        self.offset += 1
        if self.offset == len(self._rows):
            self.move(self._end, 0)

    def _pack(self, length: int, most: int) -> list[list[tuple[Pairs, int]]]:
        """The rows of the chunk that begins with `record`, in a random order: parts of documents with their offsets."""
        first, tokens = self.record, 0
        parts, sizes = list[tuple[Pairs, int]](), list[int]()
        while tokens < ROWS_OF_CHUNK * length and (tokens == 0 or self.record % len(self._share) > 0):
            self._check_found(self.record - first)
            pairs = pairs_of(self._read_record())
            parts += [(pairs, start) for start in range(0, len(pairs.inputs), length)]
            sizes += row_parts(len(pairs.inputs), length)
            tokens += len(pairs.inputs)
            self.record += 1
        self._end, self.record = self.record, first
        rows = best_fit(sizes, length, most)
        order = permutation(len(rows), *self._seed, first, _ORDER)
        return [[parts[part] for part in rows[row]] for row in order]
