"""The tokens of running text: stored once, by the first reader with a tokenizer, and read at random."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import queue
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from transformer.data.builder import describe
from transformer.data.encoded import Encoded, encode_long, encode_records, learnt_runs, token_type, unpack
from transformer.data.identity import ContentHash
from transformer.data.prepare import quiet
from transformer.data.progress import progress
from transformer.data.records import RandomAccess
from transformer.data.shards import Shards, count_shards
from transformer.data.source import WHOLE, Record, Source
from transformer.data.stored import INFO, open_stored
from transformer.data.tasks import Run, remove, run_tasks
from transformer.data.token_shards import (
    LONGEST,
    SIZES,
    Job,
    TextRecords,
    WriteTokens,
    read_sizes,
    record_sizes,
    save_job,
    write_sizes,
    write_tokens,
)
from transformer.data.tokenizers import Tokenizer, source_tokenizer
from transformer.storage import is_local
from transformer.tokenizer import around_text, document_start
from transformer.types import UserError

_FORMAT = 1  # version of the stored tokens; a change stores all of them again
_SHARD_BYTES = 32 << 20  # of text: about ten seconds of processor time, which a kill may lose
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Tokens(RandomAccess[Encoded]):
    """Records as tokens."""

    def sizes(self) -> np.ndarray:
        """The number of targets of each record."""
        return np.fromiter((encoded.num_targets for encoded in self), np.uint32)


def open_tokens(source: Source, split: str, tokenizer: Tokenizer) -> Tokens:
    """The records of a split as tokens, stored now unless they already are."""
    if source.encoded is not None:
        return source.encoded(split, tokenizer)
    records = source.records(split)
    stored = _stored(source, split, records, tokenizer, whole=False)
    return _Now(records, tokenizer) if stored is None else stored


def document_tokens(source: Source, split: str, tokenizer: Tokenizer, limit: int = 0) -> Iterator[Encoded]:
    """The documents of a split (or of all: `WHOLE`) as tokens, whole and in order.

    With a limit, stored tokens are used, but none are written. In each split, the document that reaches `limit` targets is the
    last one; its later parts are neither read nor encoded.
    """
    most = limit or sys.maxsize
    for name in source.split_names if split == WHOLE and WHOLE not in source.sizes else (split,):
        if source.encoded is not None:
            parts = source.encoded(name, tokenizer)
        else:
            records = source.records(name)
            parts = _stored(source, name, records, tokenizer, whole=True, store=limit == 0)
            if parts is None:
                parts = _encode_now(tokenizer, records)
        yield from _joined(parts, most)


def store_tokens(source: Source, tokenizer: Tokenizer, run: Run | None = None) -> bool:
    """Store the tokens of a source for training and evaluation, by tasks of `run` if given; returns whether they are stored."""
    kept = True
    for split in source.split_names if source.encoded is None else ():
        stored = _stored(source, split, source.records(split), tokenizer, whole=split != "train", run=run)
        kept = kept and stored is not None
    return kept


def _encode_now(tokenizer: Tokenizer, records: Iterable[Record]) -> Iterator[Encoded]:
    """The parts of documents, encoded now."""
    records = iter(records)
    for first in records:
        if first.last:
            yield from encode_records(tokenizer, [first])
        else:
            yield from encode_long(tokenizer, first.prompt, _texts(first, records), LONGEST)


def _texts(first: Record, records: Iterator[Record]) -> Iterator[str]:
    yield first.text
    for record in records:
        yield record.text
        if record.last:
            return


def _joined(parts: Iterable[Encoded], limit: int) -> Iterator[Encoded]:
    """Documents, with long ones reassembled, up to the one that reaches `limit` targets."""
    pieces, targets = list[Encoded](), 0
    for part in parts:
        pieces.append(part)
        targets += part.num_targets
        if part.last or targets >= limit:
            yield part if len(pieces) == 1 else _one(pieces)
            pieces = []
        if targets >= limit:
            return


def _one(pieces: Sequence[Encoded]) -> Encoded:
    tokens = np.concatenate([pieces[0].tokens[:1], *(piece.tokens[1:] for piece in pieces)])
    if not any(len(piece.learnt) for piece in pieces):
        return Encoded(tokens, pieces[0].learnt, True)
    return Encoded(tokens, learnt_runs(np.concatenate([piece.weights for piece in pieces]) > 0), True)


class _Now(Tokens):
    """Records that are encoded whenever they are read."""

    def __init__(self, records: Sequence[Record], tokenizer: Tokenizer) -> None:
        self._records, self._tokenizer = records, tokenizer

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, index: int) -> Encoded:
        return next(encode_records(self._tokenizer, [self._records[index]]))


class _Stored(Tokens):
    """Records whose tokens are stored."""

    def __init__(self, directory: epath.Path, shards: Shards, dtype: np.dtype) -> None:
        self._directory, self._shards, self._dtype = directory, shards, dtype

    def sizes(self) -> np.ndarray:
        """The stored sizes; tokens stored by an earlier version have none, and are read."""
        if not (self._directory / SIZES).exists():
            return record_sizes(self._shards, self._dtype)
        return read_sizes(self._directory, len(self._shards.paths))

    def __len__(self) -> int:
        return len(self._shards)

    def _read(self, index: int) -> Encoded:
        return unpack(self._shards[index], self._dtype)


def tokenizer_identity(tokenizer: Tokenizer) -> str | None:
    """A hash of a tokenizer's files and the ids around a text; None for a user-defined tokenizer, whose code is unknown."""
    both = (tokenizer, source_tokenizer(tokenizer), getattr(tokenizer, "target", tokenizer))
    if not all(type(one).__module__.startswith("transformer.") for one in both):
        return None
    content = ContentHash()
    content.add(_FORMAT, tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_text, document_start(tokenizer))
    content.add(*itertools.chain(*around_text(tokenizer)))
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        tokenizer.save(root)
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            content.add(path.relative_to(root).as_posix(), path.read_bytes())
    return content.hexdigest()


# ---- Storing ---------------------------------------------------------------------------------------------------------


def _stored(
    source: Source,
    split: str,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    whole: bool,
    store: bool = True,
    run: Run | None = None,
) -> _Stored | None:
    """The tokens of a split; None if they cannot be stored: the text is not stored, or nothing can be written."""
    if source.tokens_in is None or not isinstance(records, TextRecords):
        return None
    name = f"{split}{'-documents' if whole else ''}"
    job = Job(records.shards.paths, records.shards.lengths, "", split, 0, whole, fields=records.fields, cut=records.cut)
    found = stored_tokens(source.tokens_in, name, job, tokenizer, source.name, store=store, run=run)
    return found and _Stored(epath.Path(found.directory), found.shards, token_type(tokenizer.vocab_size))


class Found(NamedTuple):
    """Stored tokens."""

    directory: epath.Path
    shards: Shards


def stored_tokens(
    folder: epath.Path,
    name: str,
    job: Job,
    tokenizer: Tokenizer,
    source: str,
    *,
    store: bool = True,
    run: Run | None = None,
) -> Found | None:
    """Tokens in a folder, stored now unless they already are; None if they cannot be stored, or are missing and not required.

    Args:
        folder: the folder of all tokens of a dataset.
        name: the name of these tokens.
        job: how to make them; its directory and number of shards are ignored.
        tokenizer: the tokenizer; the tokens of a user-defined one are not stored.
        source: the name of the dataset, for messages.
        store: whether to store missing tokens.
        run: runs the tasks that store them; None uses processes of this machine.
    """
    identity = tokenizer_identity(tokenizer)
    if identity is None:
        return None
    directory = folder / f"{identity[:16]}-{name}"
    if not (directory / INFO).exists():
        if not store:
            return None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            records = Shards(job.texts, job.lengths)
            shards = max(1, min(count_shards(records.num_bytes, _SHARD_BYTES), len(records)))
            _store(dataclasses.replace(job, directory=os.fspath(directory), num_shards=shards), tokenizer, source, run)
        except OSError as error:
            if error.errno in READ_ONLY:
                return None
            raise UserError(f"Tokens must be written below data.data_dir, {directory} failed: {error}.") from error
    with quiet():
        found = open_stored(directory).info.splits[job.split]
    return Found(directory, Shards(found.filepaths, found.shard_lengths))


def _store(job: Job, tokenizer: Tokenizer, name: str, run: Run | None) -> None:
    """Write the missing shards, and then the description, which makes the dataset visible."""
    # Processes of one run that share the folder begin with different shards.
    first = random.randrange(job.num_shards)
    missing = [shard for shard in (*range(first, job.num_shards), *range(first)) if not job.path(shard).exists()]
    processes = min(len(missing), _processors()) if is_local(job.directory) and sys.executable else 1
    total = Shards(job.texts, job.lengths).num_bytes * len(missing) // job.num_shards
    with progress(f"tokens of {name}, {job.split}", total) as advance:
        if run is not None:
            _in_tasks(run, f"tokens of {name}, {job.split}", job, tokenizer, missing)
        elif processes > 1:
            _in_processes(job, tokenizer, missing, processes, advance)
        else:
            for shard in missing:
                if not job.path(shard).exists():
                    write_tokens(job, tokenizer, shard, advance)
    paths = [job.path(shard) for shard in range(job.num_shards)]
    if not job.roles:
        write_sizes(job, token_type(tokenizer.vocab_size))
    with quiet():
        describe(epath.Path(job.directory), "tokens", job.features(tokenizer), {job.split: paths})


def _in_tasks(run: Run, what: str, job: Job, tokenizer: Tokenizer, shards: Sequence[int]) -> None:
    """Write shards in tasks, which read the tokenizer from a folder beside the shards."""
    folder = epath.Path(job.directory) / "tasks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_job(folder, job, tokenizer)
        run_tasks(run, what, WriteTokens(os.fspath(folder)), shards, folder)
    finally:
        remove(folder)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    job: Job, tokenizer: Tokenizer, shards: Sequence[int], count: int, advance: Callable[[int], object]
) -> None:
    """Write shards in processes, one shard at a time each."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for shard in shards:
        waiting.put(shard)
    with tempfile.TemporaryDirectory() as folder:
        save_job(epath.Path(folder), job, tokenizer)
        workers = [_Worker(folder, job, waiting, advance) for _ in range(count)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            for worker in workers:
                worker.end()
    errors = [worker.error for worker in workers if worker.error is not None]
    if errors:
        raise errors[0]


class _Worker(threading.Thread):
    """A process that writes shards, with the thread that controls it."""

    def __init__(
        self, folder: str, job: Job, waiting: "queue.SimpleQueue[int]", advance: Callable[[int], object]
    ) -> None:
        super().__init__(daemon=True)
        self._job, self._waiting, self._advance = job, waiting, advance
        self.error: Exception | None = None
        # The packages of this process, without its current folder; one thread each, without an accelerator.
        own = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu", "RAYON_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "transformer.data.token_shards", folder],
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> None:
        """End the process, immediately if it is active."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()

    def run(self) -> None:
        """Assign shards to the process until none is left."""
        stdin, stdout, stderr = self.process.stdin, self.process.stdout, self.process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        try:
            while True:
                shard = self._waiting.get_nowait()
                if self._job.path(shard).exists():
                    continue
                stdin.write(f"{shard}\n")
                stdin.flush()
                while (line := stdout.readline()) != "written\n":
                    if line.startswith("failed "):
                        raise UserError(json.loads(line.removeprefix("failed ")))
                    if not line:
                        raise RuntimeError(f"A process that writes tokens has ended:\n{stderr.read()[-2000:]}")
                    self._advance(int(line))
        except queue.Empty:
            pass
        except Exception as error:
            self.error = error
