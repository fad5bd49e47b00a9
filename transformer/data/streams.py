"""Training batches from virtual streams: endless sequences of rows, each from its own part of the corpus."""

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
_ROW_ORDER = 1  # seeds the order of rows in a chunk, so that it differs from the order of records in an epoch


class StreamBatches(grain.IterDataset):
    """One process's rows of every batch, as a Grain dataset. Their content does not depend on the number of processes.

    A permutation, seeded by the config, assigns the records of each source to streams. With at most `batch_size` streams, a
    stream fills the same rows of every batch. With more, each batch has one row from each of the next `batch_size` streams, in a
    cycle.

    Args:
        config: batch size, row length, packing, weights of sources, and the seed.
        sources: the sources of the corpus.
        records: the token ids of each source's training split, by record.
        num_streams: a divisor or a multiple of the batch size.
        own_rows: the rows of this process.
        noise: the change that an objective makes to each row.
        continued: whether the positions of a document continue in its next row; otherwise they start at 0 in each row.
        max_segments: the largest number of documents per row; 0 means any number.
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
        # Stored in the state, whose offsets count packed rows: with other settings, they would point to other text.
        self.best_fit = [config.sequence_length, max_segments] if config.best_fit else None
        self.noise, self.continued = noise, continued
        self.own_rows = own_rows
        self.num_streams = num_streams
        self.rows_per_stream = max(1, config.batch_size // num_streams)
        self.cycle = max(1, num_streams // config.batch_size)
        content = ContentHash()
        content.add(config.record_bytes, *(source.fingerprint for source in sources))
        self.corpus = content.hexdigest()[:16]
        self._records = records
        # Stream s reads entries s, s + num_streams, s + 2 * num_streams, ... of each source's permutation.
        self._permutations = [permutation(len(part), config.shuffle_seed, index) for index, part in enumerate(records)]
        weights = np.array(config.weights or [1.0] * len(sources))
        self._cumulative_weights = np.cumsum(weights / weights.sum())

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(self)

    def locate(self, row: int, step: int) -> tuple[int, int]:
        """The stream of row `row` of batch `step`, and the row's index in the stream. Streams repeat every `cycle` steps."""
        stream = row // self.rows_per_stream + self.config.batch_size * (step % self.cycle)
        return stream, step // self.cycle * self.rows_per_stream + row % self.rows_per_stream

    def source(self, stream: int, row_of_stream: int) -> int:
        """The index of the source from which a stream fills this row."""
        if len(self._cumulative_weights) == 1:
            return 0
        # Multiples of the golden ratio modulo 1 are evenly distributed, and each stream starts at another point. The sources
        # thus keep their weights over the rows of each stream, and over all streams in each step.
        point = (row_of_stream * _GOLDEN_RATIO + stream / self.num_streams) % 1.0
        return min(
            int(np.searchsorted(self._cumulative_weights, point, side="right")), len(self._cumulative_weights) - 1
        )

    def cursors(self, stream: int) -> "list[_Cursor]":
        """One cursor per source, at the start of the stream."""
        cursor_class = _BestFitCursor if self.config.best_fit else _Cursor
        return [
            cursor_class(records, order[stream :: self.num_streams], (self.config.shuffle_seed, i, stream))
            for i, (records, order) in enumerate(zip(self._records, self._permutations, strict=True))
        ]


class _BatchIterator(grain.DatasetIterator):
    """Returns the batches. Its state, a record and an offset for each stream and source, is restored without reading data."""

    def __init__(self, batches: StreamBatches) -> None:
        super().__init__()
        self._batches = batches
        self._step = 0
        per_stream, own = batches.rows_per_stream, batches.own_rows
        # A stream may fill rows of two processes. Each process then reads the whole stream and drops the other's rows.
        self._rows = range(own.start // per_stream * per_stream, -(-own.stop // per_stream) * per_stream)
        streams = sorted({batches.locate(row, step)[0] for row in self._rows for step in range(batches.cycle)})
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
    """Reads one stream's records of one source, in a new random order each epoch. The state is a record and an offset in it."""

    def __init__(
        self,
        records: Sequence[Encoded],
        indices: Int[np.ndarray, " n"],
        seed: tuple[int, ...],
    ) -> None:
        self._records = records
        self._indices = indices
        self._seed = seed
        self._epoch = -1
        self._order = indices
        self._pairs: Pairs | None = None
        self.record = 0
        self.offset = 0

    def move(self, record: int, offset: int) -> None:
        """Continue at a record, numbered over all epochs, and at an offset in it: the number of its targets to skip."""
        self.record, self.offset, self._pairs = record, offset, None

    def skip_to_window(self, length: int) -> None:
        """Continue at a window of `length` tokens in the next record. Its offset differs from epoch to epoch.

        Consecutive windows of one document would make the rows of a batch, or consecutive steps, too similar.
        """
        if self.offset > 0:
            self.move(self.record + 1, 0)
        record = self._read_record()
        self._pairs = pairs_of(record)
        size = len(self._pairs.inputs)
        # A window that starts in the last piece of a document may continue into the next record. In other pieces it must fit.
        room = size if record.last else max(1, size - length + 1)
        self.offset = int((self.record * _GOLDEN_RATIO) % 1.0 * room)

    def fill(self, batch: Batch, row: int, continues: bool, max_segments: int = 0) -> None:
        """Write the next row, of at most `max_segments` documents (0: any number).

        With `continues`, the positions of a document continue in its next row; otherwise they start at 0 in each row.
        """
        column, segment, last_with_text = 0, 0, self.record
        while column < batch.inputs.shape[1] and (max_segments == 0 or segment < max_segments):
            pairs = self._pairs = self._pairs or pairs_of(self._read_record())
            if len(pairs.inputs) > 0:
                segment, last_with_text = segment + 1, self.record
                first = self.offset if continues else 0
                count = write_pairs(batch, row, column, pairs, self.offset, segment, first)
                column, self.offset = column + count, self.offset + count
            if self.offset == len(pairs.inputs):
                self.move(self.record + 1, 0)
                self._check_has_text(self.record - last_with_text)

    def _check_has_text(self, num_without_text: int) -> None:
        """Raise UserError if no record of the stream has text; the search for text would never end."""
        if num_without_text > len(self._indices):
            raise UserError(
                f"A stream must hold text, the {len(self._indices)} records of one hold none: set a smaller data.num_streams."
            )

    def _read_record(self) -> Encoded:
        epoch, index = divmod(self.record, len(self._indices))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._indices[permutation(len(self._indices), *self._seed, epoch)]
        return self._records[int(self._order[index])]


class _BestFitCursor(_Cursor):
    """Packs records by best fit (Ding et al. 2024), in chunks of about `ROWS_OF_CHUNK` rows. A chunk does not cross epochs.

    Documents that fit in a row stay whole. A longer document is cut into full rows and a remainder; the remainder is packed like
    a short document. `record` is the first record of the chunk, and `offset` the index of the chunk's next row.
    """

    _packed: Sequence[list[tuple[Pairs, int]]] = ()
    _next_chunk = 0

    def move(self, record: int, offset: int) -> None:
        """Continue at row `offset` of the chunk that begins at a record, numbered over all epochs."""
        super().move(record, offset)
        self._packed = ()

    def fill(self, batch: Batch, row: int, continues: bool, max_segments: int = 0) -> None:
        """Write the next row, of at most `max_segments` documents (0: any number)."""
        del continues
        self._packed = self._packed or self._pack(batch.inputs.shape[1], max_segments)
        column = 0
        for segment, (pairs, start) in enumerate(self._packed[self.offset], 1):
            column += write_pairs(batch, row, column, pairs, start, segment)
        self.offset += 1
        if self.offset == len(self._packed):
            self.move(self._next_chunk, 0)

    def _pack(self, length: int, max_segments: int) -> list[list[tuple[Pairs, int]]]:
        """The rows of the chunk that begins at `record`, in random order: lists of records with start offsets."""
        first, tokens = self.record, 0
        parts, sizes = list[tuple[Pairs, int]](), list[int]()
        while tokens < ROWS_OF_CHUNK * length and (tokens == 0 or self.record % len(self._indices) > 0):
            self._check_has_text(self.record - first)
            pairs = pairs_of(self._read_record())
            parts += [(pairs, start) for start in range(0, len(pairs.inputs), length)]
            sizes += row_parts(len(pairs.inputs), length)
            tokens += len(pairs.inputs)
            self.record += 1
        self._next_chunk, self.record = self.record, first
        rows = best_fit(sizes, length, max_segments)
        order = permutation(len(rows), *self._seed, first, _ROW_ORDER)
        return [[parts[part] for part in rows[row]] for row in order]
