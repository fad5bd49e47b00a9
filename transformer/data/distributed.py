"""Running text prepared by distributed tasks: documents are read file by file, and records written shard by shard.

The shards equal the shards of `prepare`, bit for bit. Tasks pass results to each other in a folder below `data.data_dir`.
"""

import array
import dataclasses
import functools
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jaxtyping import Int

from transformer.config import DataConfig
from transformer.data.documents import CONVERSATION, Corpus, Document, with_text
from transformer.data.encoded import pack_text
from transformer.data.identity import ContentHash
from transformer.data.prepare import (
    data_directory,
    find_prepared,
    finish,
    open_prepared,
    pieces,
    pointer_of,
    preparing,
    require_splits,
    shard_paths,
)
from transformer.data.progress import progress
from transformer.data.records import RandomAccess
from transformer.data.seen import Stamp
from transformer.data.shards import Shards, holds, shard_of, write_shard
from transformer.data.source import Source
from transformer.data.splits import SPLITS, Parts, divide, split_document
from transformer.data.tasks import Run, Unfinished, publish, remove, run_tasks
from transformer.types import UserError
from transformer.validation import require

if TYPE_CHECKING:
    from transformer.data.source_kind import SourceKind

_FOLDER = "text_tasks"
_NUMBERS = np.dtype("<i8")


def open_in_tasks(kind: "SourceKind", name: str, config: DataConfig, stamp: Stamp, run: Run) -> Source:
    """Like `open_corpus`: a local corpus, prepared now by tasks unless it already is.

    Args:
        kind: the `SourceKind` that reads it.
        name: the name of the source.
        config: sets the splits.
        stamp: the state of its files.
        run: runs the tasks.
    """
    title: tuple[str, str] = kind.title(name)
    fingerprint = stamp.known()
    prepared = find_prepared(title, config, fingerprint)
    if prepared is not None:
        return prepared
    # Continue from the remains of a killed preparation if the files are certainly unchanged.
    state = f"{stamp.path.stem[:16]}-{stamp.state[:16]}" if stamp.state else uuid.uuid4().hex
    folder = data_directory(config) / _FOLDER / state
    kept = False
    try:
        documents = _read(kind, name, config, folder, run)
        if fingerprint is None:
            fingerprint = documents.fingerprint()
            stamp.note(fingerprint)
        corpus = Corpus(*title, fingerprint, documents.sizes[:, 0], lambda: iter(documents))
        pointer = pointer_of(corpus, config)
        if not pointer.exists():
            _write(corpus, documents, pointer, config, run)
    except (Unfinished, KeyboardInterrupt):
        kept = stamp.state != ""
        raise
    except OSError as error:
        raise UserError(f"Tasks must leave their results below data.data_dir, {folder} failed: {error}.") from error
    finally:
        if not kept:
            remove(folder)
    return open_prepared(corpus, pointer, config)


# ---- Documents, read file by file --------------------------------------------------------------------------------------


class Documents(RandomAccess[Document]):
    """The documents that tasks have read, in order."""

    def __init__(self, folder: str, counts: Sequence[int]) -> None:
        self.folder, self.counts = folder, counts
        self._shards = Shards([_path(folder, "documents", number) for number in range(len(counts))], counts)

    def __len__(self) -> int:
        return len(self._shards)

    def _read(self, index: int) -> Document:
        text, prompt, name = _unpack(self._shards[index])
        return Document(text.decode(), prompt.decode(), name.decode())

    @functools.cached_property
    def sizes(self) -> Int[np.ndarray, "documents 3"]:
        """Bytes of each document's text and of its prompt, and 1 for a conversation."""
        read = (_path(self.folder, "sizes", number).read_bytes() for number in range(len(self.counts)))
        return np.frombuffer(b"".join(read), _NUMBERS).reshape(-1, 3)

    def fingerprint(self) -> str:
        """The fingerprint of the corpus: one SHA-256 of all documents in order, which tasks cannot divide."""
        content = ContentHash()
        with progress("hash of the documents", int(self.sizes[:, :2].sum())) as advance:
            for number, count in enumerate(self.counts):
                part = Shards([_path(self.folder, "documents", number)], [count])
                for index in range(count):
                    text, prompt, _ = _unpack(part[index])
                    content.add(text, prompt)
                    advance(len(text) + len(prompt))
        return content.hexdigest()


def _path(folder: str, what: str, number: int) -> epath.Path:
    return epath.Path(folder) / f"{what}-{number:06}"


def _pack(text: bytes, prompt: bytes, name: bytes) -> bytes:
    parts = (text, prompt, name)
    return b"".join([*(len(part).to_bytes(8, "little") for part in parts), *parts])


def _unpack(record: bytes) -> list[bytes]:
    """The text, prompt and name of a record."""
    parts, start = [], 24
    for offset in (0, 8, 16):
        stop = start + int.from_bytes(record[offset : offset + 8], "little")
        parts.append(record[start:stop])
        start = stop
    return parts


def _read(kind: Any, name: str, config: DataConfig, folder: epath.Path, run: Run) -> Documents:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        parts, shared = kind.parts(name), os.fspath(folder)
    except OSError as error:
        raise UserError(f"A source must be readable, {name} is not: {error}.") from error
    for number, part in enumerate(parts):
        publish(_path(shared, "part", number), json.dumps(part).encode())
    missing = [number for number in range(len(parts)) if not _path(shared, "sizes", number).exists()]
    run_tasks(run, f"reading of {kind.title(name)[0]}", _Reading(kind, name, config, shared), missing, folder)
    counts = [_path(shared, "sizes", number).stat().length // (3 * _NUMBERS.itemsize) for number in range(len(parts))]
    require(sum(counts) > 0, f"A source must hold text, {kind.describe_empty(name, config)}.")
    return Documents(shared, counts)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """The task that reads a part of a source."""

    kind: Any
    name: str
    config: DataConfig
    folder: str

    def __call__(self, number: int) -> None:
        """Write the documents of a part, and then their sizes."""
        part = json.loads(_path(self.folder, "part", number).read_text())
        sizes = array.array("q")

        def packed() -> Iterator[bytes]:
            for document in with_text(self.kind.part_documents(self.name, part, self.config)):
                text, prompt = document.text.encode(), document.prompt.encode()
                sizes.extend((len(text), len(prompt), document.prompt == CONVERSATION))
                yield _pack(text, prompt, document.name.encode())

        write_shard(_path(self.folder, "documents", number), packed())
        publish(_path(self.folder, "sizes", number), np.array(sizes, _NUMBERS).tobytes())


# ---- Records, written shard by shard -----------------------------------------------------------------------------------


def _write(corpus: Corpus, documents: Documents, pointer: epath.Path, config: DataConfig, run: Run) -> None:
    parts = divide(corpus.sizes, config.validation_fraction, config.test_fraction)
    # Documents with parts in several splits: at most one for each held-out split.
    cut = np.flatnonzero((np.count_nonzero(parts, axis=1) > 1) & (documents.sizes[:, 2] == 0)).tolist()
    lengths = _lengths(documents, parts, cut)
    with preparing(pointer) as directory:
        written, items = dict[str, tuple[dict[str, int], list[epath.Path]]](), []
        for column, split in enumerate(SPLITS):
            num_bytes = int(parts[:, column].sum())
            paths = shard_paths(directory, split, num_bytes)
            chosen = np.flatnonzero(lengths[:, column])
            sizes = {"documents": len(chosen), "bytes": int(lengths[chosen, column].sum())}
            written[split] = sizes, paths
            for shard, plan in enumerate(_plans(chosen, lengths[chosen, column], num_bytes, len(paths))):
                publish(_path(documents.folder, f"plan-{split}", shard), plan.astype(_NUMBERS).tobytes())
                items.append((split, shard, os.fspath(paths[shard]), num_bytes, len(paths)))
        require_splits(corpus, {split: sizes["documents"] for split, (sizes, _) in written.items()}, config)
        rows = {index: parts[index].tolist() for index in cut}
        task = _Writing(documents.folder, tuple(documents.counts), rows, config.record_bytes)
        run_tasks(run, f"records of {corpus.name}", task, items, epath.Path(documents.folder))
        finish(pointer, written)


def _lengths(documents: Documents, parts: Parts, cut: Sequence[int]) -> Parts:
    """Bytes of the records of each document in each split, prompts included."""
    lengths = np.zeros_like(parts)
    everything = np.arange(len(parts))
    lengths[everything, parts.argmax(axis=1)] = documents.sizes[:, :2].sum(axis=1)
    for index in cut:  # cuts lie between characters, which requires the text
        lengths[index] = 0
        for split, part in split_document(documents[index], parts[index]):
            lengths[index, SPLITS.index(split)] = len(part.text.encode()) + len(part.prompt.encode())
    return lengths


def _plans(chosen: np.ndarray, lengths: np.ndarray, num_bytes: int, count: int) -> Iterator[np.ndarray]:
    """For each shard of a split, the bytes before its first document, and its documents; the first and last may be incomplete.

    Args:
        chosen: the documents of the split.
        lengths: bytes of their records.
        num_bytes: bytes of the split, which determine the boundaries of its shards.
        count: the number of shards.
    """
    if len(chosen) == 0:
        return
    stops = np.cumsum(lengths)
    starts = stops - lengths
    first, last = (shard_of(position, num_bytes, count) for position in (starts, stops - 1))
    for shard in range(count):
        of_shard = slice(np.searchsorted(last, shard), np.searchsorted(first, shard, "right"))
        yield np.concatenate([starts[of_shard][:1], chosen[of_shard]])


@dataclasses.dataclass(frozen=True)
class _Writing:
    """The task that writes a shard."""

    folder: str
    counts: tuple[int, ...]
    rows: Mapping[int, list[int]]
    """The rows of `Parts` of documents that are cut."""
    record_bytes: int

    def __call__(self, item: tuple[str, int, str, int, int]) -> None:
        """Write the shard unless it exists."""
        path = epath.Path(item[2])
        if not holds(path, self._records(*item)):
            write_shard(path, self._records(*item))

    def _records(self, split: str, shard: int, path: str, num_bytes: int, count: int) -> Iterator[bytes]:
        del path
        plan = np.frombuffer(_path(self.folder, f"plan-{split}", shard).read_bytes(), _NUMBERS).tolist()
        documents = Documents(self.folder, self.counts)
        position = plan[0] if plan else 0
        for index in plan[1:]:
            document = documents[index]
            if index in self.rows:
                document = dict(split_document(document, np.array(self.rows[index])))[split]
            for record in pieces(document.text, document.prompt, self.record_bytes):
                if shard_of(position, num_bytes, count) == shard:
                    yield pack_text(record, document.name)
                position += len(record.text.encode()) + len(record.prompt.encode())
