"""Local running text, prepared once as a dataset of records with random access."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from transformer.config import DataConfig
from transformer.data.builder import TEXT_FEATURES, describe, shard_path
from transformer.data.documents import Corpus, Document
from transformer.data.encoded import pack_text
from transformer.data.identity import ContentHash
from transformer.data.long_text import chunks, num_bytes
from transformer.data.progress import progress
from transformer.data.seen import Stamp
from transformer.data.shards import Shards, count_shards, holds, shard_of, write_shard
from transformer.data.source import Record, Source, pieces
from transformer.data.splits import SPLIT_RULE, SPLITS, divide, split_documents
from transformer.data.stored import open_stored
from transformer.data.token_shards import TextRecords
from transformer.storage import expand, write_whole
from transformer.types import UserError
from transformer.validation import counted, require

_FORMAT = 1  # version of the prepared records; a change prepares every corpus again
_SHARD_BYTES = 32 << 20  # size of a shard, which is in memory while it is written


def open_corpus(read: Callable[[], Corpus], title: tuple[str, str], config: DataConfig, stamp: Stamp) -> Source:
    """A local corpus, prepared now unless it already is.

    Args:
        read: reads and hashes the corpus.
        title: its name and version.
        config: sets the splits.
        stamp: the state of its files; if a corpus of this state is already prepared, the files are not read again.
    """
    known = find_prepared(title, config, stamp.known())
    if known is not None:
        return known
    corpus = read()
    stamp.note(corpus.fingerprint)
    pointer = pointer_of(corpus, config)
    if not pointer.exists():
        _prepare(corpus, pointer, config)
    return open_prepared(corpus, pointer, config)


def find_prepared(title: tuple[str, str], config: DataConfig, fingerprint: str | None) -> Source | None:
    """The corpus with a fingerprint, if the fingerprint is known and the corpus prepared."""
    if fingerprint is None:
        return None
    corpus = Corpus(*title, fingerprint, np.zeros(0, np.int64), lambda: iter(()))
    pointer = pointer_of(corpus, config)
    return open_prepared(corpus, pointer, config) if pointer.exists() else None


def fingerprint_of(read: Callable[[], Corpus], title: tuple[str, str], config: DataConfig, stamp: Stamp) -> str:
    """The fingerprint of the corpus that `open_corpus` opens; nothing is prepared."""
    known = stamp.known()
    if known is None:
        known = read().fingerprint
        stamp.note(known)
    return corpus_fingerprint(Corpus(*title, known, np.zeros(0, np.int64), lambda: iter(())), config)


def pointer_of(corpus: Corpus, config: DataConfig) -> epath.Path:
    """The file that names the prepared dataset."""
    label = re.sub(r"\W+", "_", corpus.name, flags=re.ASCII).strip("_").lower()[:80] or "text"
    identity = corpus_fingerprint(corpus, config)
    root = data_directory(config) / "text_records" / f"{label}-{corpus.version}-{identity[:16]}-{config.record_bytes}"
    # The pointer is written last and atomically: a dataset that it does not name does not exist, whatever files lie beside it.
    return root / "prepared.json"


def open_prepared(corpus: Corpus, pointer: epath.Path, config: DataConfig) -> Source:
    """Open the dataset that a pointer names."""
    prepared = json.loads(pointer.read_text())
    with quiet():
        builder: Any = open_stored(pointer.parent / prepared["directory"])

    def open_split(split: str) -> Sequence[Record]:
        info = builder.info.splits[split]
        return TextRecords(Shards(info.filepaths, info.shard_lengths))

    name = f"{corpus.name} {corpus.version}" if corpus.version != "1.0.0" else corpus.name
    sizes: dict[str, dict[str, int]] = prepared["splits"]
    description = f"{name}: " + ", ".join(
        f"{split} {counted(size['documents'], 'document')}, {counted(size['bytes'], 'byte')}"
        for split, size in sizes.items()
    )
    documents = {split: size["documents"] for split, size in sizes.items()}
    if config.separator and set(documents.values()) == {1}:
        description += f"; check that the text has the separator {config.separator!r}, nothing is divided by it"
    return Source(
        name, corpus_fingerprint(corpus, config), documents, description, open_split, pointer.parent / "tokens"
    )


def corpus_fingerprint(corpus: Corpus, config: DataConfig) -> str:
    """A hash of the text and its splits, but not of paths or names."""
    content = ContentHash()
    content.add(_FORMAT, SPLIT_RULE, corpus.fingerprint, config.validation_fraction, config.test_fraction)
    return content.hexdigest()


def _prepare(corpus: Corpus, pointer: epath.Path, config: DataConfig) -> None:
    parts = divide(corpus.sizes, config.validation_fraction, config.test_fraction)
    with preparing(pointer) as directory, progress(f"records of {corpus.name}", int(corpus.sizes.sum())) as advance:
        writers = {split: _Writer(directory, split, int(parts[:, column].sum())) for column, split in enumerate(SPLITS)}
        _write(corpus, parts, writers, config, advance)
        finish(pointer, {split: (writer.sizes, writer.paths) for split, writer in writers.items()})


@contextlib.contextmanager
def preparing(pointer: epath.Path) -> Iterator[epath.Path]:
    """The directory for the shards of a future pointer; after a failure, complete shards are kept."""
    directory = pointer.parent / "text"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
    except (OSError, UserError) as error:
        # Complete shards stay for the next attempt, unless the text has changed meanwhile.
        if isinstance(error, _Changed) or not any(directory.glob("*.array_record-*-of-?????")):
            shutil.rmtree(directory, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.rmdir(pointer.parent)
        if isinstance(error, OSError):
            raise UserError(
                f"Prepared text must be written below data.data_dir, {pointer.parent} failed: {error}. Give a folder "
                "on a disk with room and permission to write, then start again."
            ) from error
        raise


def finish(pointer: epath.Path, written: Mapping[str, tuple[dict[str, int], list[epath.Path]]]) -> None:
    """Describe the shards and write the pointer, which makes the dataset visible.

    Args:
        pointer: the file that names the dataset.
        written: the numbers of documents and bytes of each split, and its shards; splits without documents are left out.
    """
    there = {split: part for split, part in written.items() if part[0]["documents"] > 0}
    with quiet():
        paths = {split: paths for split, (_, paths) in there.items()}
        describe(pointer.parent / "text", "text_records", TEXT_FEATURES, paths)
    sizes = {split: size for split, (size, _) in there.items()}
    write_whole(pointer, json.dumps({"directory": "text", "splits": sizes}, indent=2))


class _Changed(UserError):
    """A text has changed since it was hashed."""


def _write(
    corpus: Corpus, parts: Any, writers: Mapping[str, "_Writer"], config: DataConfig, advance: Callable[[int], None]
) -> None:
    """Write the records of all splits in one pass, which hashes the text again."""
    content = ContentHash()

    def documents() -> Iterator[Document]:
        for document in corpus.documents():
            content.add_text(num_bytes(document.text), chunks(document.text), document.prompt)
            yield document

    for split, document in split_documents(dataclasses.replace(corpus, documents=documents), parts):
        writers[split].add(document, config.record_bytes, advance)
    if content.hexdigest() != corpus.fingerprint:
        raise _Changed(f"A source must stay as it is while it is prepared, {corpus.name} changed; start again.")
    require_splits(corpus, {split: writer.sizes["documents"] for split, writer in writers.items()}, config)
    for writer in writers.values():
        writer.close()


def require_splits(corpus: Corpus, documents: Mapping[str, int], config: DataConfig) -> None:
    """Refuse a corpus without documents for a requested split."""
    wanted = [1.0, config.validation_fraction, config.test_fraction]
    missing = [split for split, share in zip(SPLITS, wanted, strict=True) if share > 0 and not documents[split]]
    require(
        not missing,
        f"A source must leave text for each split, {corpus.name} has {counted(int(corpus.sizes.sum()), 'byte')} in "
        f"{counted(corpus.count, 'document')} and none for {' and '.join(missing)} with "
        f"data.validation_fraction={config.validation_fraction} and data.test_fraction={config.test_fraction}: add text, or "
        "set them to 0.",
    )


def shard_paths(directory: epath.Path, split: str, num_bytes: int) -> list[epath.Path]:
    """The paths of the shards of a split with `num_bytes` bytes."""
    count = count_shards(num_bytes, _SHARD_BYTES)
    return [shard_path(directory, "text_records", split, shard, count) for shard in range(count)]


class _Writer:
    """The shards of a split, one after the other. A complete shard is compared and kept."""

    def __init__(self, directory: epath.Path, split: str, num_bytes: int) -> None:
        self.paths = shard_paths(directory, split, num_bytes)
        self.sizes = {"documents": 0, "bytes": 0}
        self._num_bytes, self._shard = num_bytes, 0
        self._records: list[bytes] = []

    def add(self, document: Document, record_bytes: int, advance: Callable[[int], None]) -> None:
        """Add the records of a document; `advance` is called with the bytes of each."""
        for record in pieces(document.text, document.prompt, record_bytes):
            while self._shard < shard_of(self.sizes["bytes"], self._num_bytes, len(self.paths)):
                self._flush()
            self._records.append(pack_text(record, document.name))
            length = len(record.text.encode())
            self.sizes["bytes"] += length + len(record.prompt.encode())
            advance(length)
        self.sizes["documents"] += 1

    def close(self) -> None:
        """Write the remaining records, if there is a document at all."""
        while self.sizes["documents"] and self._shard < len(self.paths):
            self._flush()

    def _flush(self) -> None:
        path = self.paths[self._shard]
        if not holds(path, self._records):
            write_shard(path, self._records)
        self._shard, self._records = self._shard + 1, []


def data_directory(config: DataConfig) -> epath.Path:
    """The directory of prepared datasets."""
    chosen = config.data_dir or os.environ.get("TFDS_DATA_DIR", "") or "~/tensorflow_datasets"
    return epath.Path(expand(chosen))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the progress bars, output and log lines of TFDS."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
