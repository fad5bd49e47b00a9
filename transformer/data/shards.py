"""ArrayRecord files as one sequence of records with random access, and the writing of complete files."""

import bisect
import itertools
import math
import os
import tempfile
import threading
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from transformer.data.records import RandomAccess
from transformer.data.stored import readable
from transformer.storage import is_local
from transformer.types import UserError
from transformer.validation import require

# A reader that prefetches takes 1.5 ms for a record at another position, this one 5 microseconds.
_READING = "max_parallelism:0,readahead_buffer_size:0"
# Groups of more than one record are read whole. Tokens hardly compress, and decompression takes longer than reading.
_WRITING = "group_size:1,uncompressed"
_MOST = 400  # shards of a split: that many files are open
Position = TypeVar("Position", int, np.ndarray)
UNFINISHED = ".unfinished"
"""Suffix of a shard that is being written; remains of killed writers are removed once the dataset is complete."""


class Shards(RandomAccess[bytes]):
    """The records of files, one file after the other. Threads may share it."""

    def __init__(self, paths: Sequence[epath.PathLike], lengths: Sequence[int]) -> None:
        self.paths, self.lengths = [os.fspath(path) for path in paths], list(lengths)
        self._starts = [0, *itertools.accumulate(self.lengths)]
        self._readers: list[Any] = [None] * len(self.paths)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def _read(self, index: int) -> bytes:
        part = bisect.bisect_right(self._starts, index) - 1
        with readable(), self._lock:
            reader = self._readers[part] or self._open(part)
            reader.seek(index - self._starts[part])
            return reader.read()

    @property
    def num_bytes(self) -> int:
        """The total size of the files."""
        return sum(epath.Path(path).stat().length for path in self.paths)

    def _open(self, part: int) -> Any:
        path = self.paths[part]
        reader = ArrayRecordReader(path, _READING)
        require(
            reader.num_records() == self.lengths[part],
            f"A stored dataset must be whole, {path} has {reader.num_records():,} records and should have "
            f"{self.lengths[part]:,}. Prepare it again.",
        )
        self._readers[part] = reader
        return reader


def count_shards(num_bytes: int, shard_bytes: int) -> int:
    """The number of shards of a split, of about `shard_bytes` each."""
    return max(1, min(math.ceil(num_bytes / shard_bytes), _MOST))


def shard_of(position: Position, num_bytes: int, count: int) -> Position:
    """The shard (of `count`) of a record, where `position` of the split's `num_bytes` bytes precede it; also for arrays."""
    shard = position * count // max(1, num_bytes)
    return min(shard, count - 1) if isinstance(shard, int) else np.minimum(shard, count - 1)


def count_records(path: epath.PathLike) -> int:
    """The number of records of a file."""
    with readable():
        reader = ArrayRecordReader(os.fspath(path), _READING)
        try:
            return reader.num_records()
        finally:
            reader.close()


def holds(path: epath.PathLike, records: Iterable[bytes]) -> bool:
    """Whether a file exists with exactly these records."""
    if not epath.Path(path).exists():
        return False
    try:
        stored = Shards([path], [count_records(path)])
        found = map(stored.__getitem__, range(len(stored)))
        return all(one == other for one, other in itertools.zip_longest(found, records))
    except UserError:
        return False


def write_shard(path: epath.PathLike, records: Iterable[bytes]) -> None:
    """Write a file of records under a temporary name, read it back, and rename it: it appears complete, or not at all.

    Raises:
        OSError: it cannot be written.
        UserError: the records read back differ.
    """
    path = epath.Path(path)
    if not is_local(path):  # ArrayRecord reads files in a bucket, but cannot write them; an object appears complete
        with tempfile.TemporaryDirectory() as folder:
            write_shard(epath.Path(folder) / path.name, records)
            (epath.Path(folder) / path.name).copy(path, overwrite=True)
        return
    aside = path.parent / f"{path.name}-{uuid.uuid4().hex[:8]}{UNFINISHED}"
    try:
        # The writer itself reports neither a full disk nor a missing permission.
        aside.write_bytes(b"")
        written, digests = 0, []
        writer = ArrayRecordWriter(os.fspath(aside), _WRITING)
        for record in records:
            writer.write(record)
            digests.append(hash(record))
            written += len(record)
        writer.close()
        _check(aside, digests, written)
        aside.replace(path)
    except (OSError, UserError):
        if not path.exists():  # otherwise another process has written the same shard and cleaned up
            raise
    finally:
        aside.unlink(missing_ok=True)


def _check(path: epath.Path, digests: Sequence[int], written: int) -> None:
    require(
        path.stat().length >= written,
        f"A shard must be written whole, {path} has {path.stat().length:,} of at least {written:,} bytes: the disk is full.",
    )
    reader = Shards([path], [len(digests)])
    for number, digest in enumerate(digests):
        if hash(reader[number]) != digest:
            raise UserError(
                f"What was stored must come back as it was given, record {number:,} of {path} does not. Nothing is kept: check "
                "the disk, and prepare it again."
            )
