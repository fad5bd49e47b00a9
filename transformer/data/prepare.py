"""Local running text, prepared once as a dataset of records that are read at random."""

import contextlib
import functools
import io
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from transformer.config import DataConfig
from transformer.data.builder import TEXT_FEATURES, Example, builder_class
from transformer.data.documents import CONVERSATION, Corpus
from transformer.data.identity import ContentHash
from transformer.data.shards import Shards
from transformer.data.source import Record, Source
from transformer.data.splits import SPLIT_RULE, SPLITS, cut, divide, split_documents
from transformer.data.stored import check_stored, open_stored
from transformer.data.token_shards import TextRecords
from transformer.storage import expand
from transformer.types import UserError
from transformer.validation import counted, require

_FORMAT = 1  # of the prepared records; a change prepares every corpus anew


def open_corpus(corpus: Corpus, config: DataConfig) -> Source:
    """A local corpus, prepared now if it was not before."""
    identity = corpus_fingerprint(corpus, config)
    label = re.sub(r"\W+", "_", corpus.name, flags=re.ASCII).strip("_").lower()[:80] or "text"
    root = data_directory(config) / "text_records" / f"{label}-{corpus.version}-{identity[:16]}-{config.record_bytes}"
    # The pointer is written last and in one piece: a dataset it does not name does not exist, whatever lies in `root`.
    pointer = root / "prepared.json"
    if not pointer.exists():
        _prepare(corpus, label, root, pointer, config)
    prepared = json.loads(pointer.read_text())
    with quiet():
        builder: Any = open_stored(root / prepared["directory"])

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
    return Source(name, identity, documents, description, open_split, root / "tokens")


def corpus_fingerprint(corpus: Corpus, config: DataConfig) -> str:
    """A hash of the text and of how it is split, not of where it lies nor of what it is called."""
    content = ContentHash()
    content.add(_FORMAT, SPLIT_RULE, corpus.fingerprint, config.validation_fraction, config.test_fraction)
    return content.hexdigest()


def _prepare(corpus: Corpus, label: str, root: epath.Path, pointer: epath.Path, config: DataConfig) -> None:
    splits: dict[str, Callable[[], Iterator[Example]]] = {}
    sizes: dict[str, dict[str, int]] = {}
    parts = divide(corpus.sizes, config.validation_fraction, config.test_fraction)
    for split in SPLITS:
        documents = functools.partial(split_documents, corpus, parts, split)
        count, size = 0, 0
        for document in documents():
            count, size = count + 1, size + len(document.prompt.encode()) + len(document.text.encode())
        if count > 0:
            sizes[split] = {"documents": count, "bytes": size}
            splits[split] = functools.partial(_examples, documents, config.record_bytes)
    wanted = [1.0, config.validation_fraction, config.test_fraction]
    missing = [split for split, share in zip(SPLITS, wanted, strict=True) if share > 0 and split not in splits]
    require(
        not missing,
        f"A source must leave text for each split, {corpus.name} has {counted(sum(corpus.sizes), 'byte')} in "
        f"{counted(corpus.count, 'document')} and none for {' and '.join(missing)} with "
        f"data.validation_fraction={config.validation_fraction} and data.test_fraction={config.test_fraction}: add text, or "
        "set them to 0.",
    )
    attempt = root / uuid.uuid4().hex
    try:
        attempt.mkdir(parents=True)
        with quiet():
            builder = builder_class("text_records")(
                features=TEXT_FEATURES,
                splits=splits,
                version=corpus.version,
                data_dir=os.fspath(attempt),
                config_name=label,
            )
            builder.download_and_prepare(download_dir=attempt / "downloads")
            check_stored(builder.data_path, TEXT_FEATURES, splits)
        directory = builder.data_path.relative_to(root).as_posix()
        draft = attempt / pointer.name
        draft.write_text(json.dumps({"directory": directory, "splits": sizes}, indent=2))
        draft.replace(pointer)
    except BaseException as error:
        if attempt.exists():
            attempt.rmtree()
        if isinstance(error, OSError):
            raise UserError(f"Prepared text must be written below data.data_dir, {root} failed: {error}.") from error
        raise


def _examples(documents: Callable[[], Iterator], record_bytes: int) -> Iterator[Example]:
    for document in documents():
        for piece in pieces(document.text, document.prompt, record_bytes):
            yield {**piece._asdict(), "name": document.name}


def pieces(text: str, prompt: str, record_bytes: int) -> Iterator[Record]:
    """A document as records of about so many bytes."""
    parts = [text] if prompt == CONVERSATION else list(cut(text, record_bytes))
    for index, part in enumerate(parts):
        yield Record(part, prompt if index == 0 else "", index > 0, index == len(parts) - 1)


def data_directory(config: DataConfig) -> epath.Path:
    """Where prepared datasets live."""
    chosen = config.data_dir or os.environ.get("TFDS_DATA_DIR", "") or "~/tensorflow_datasets"
    return epath.Path(expand(chosen))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars, prints and log lines of TFDS out of the user's terminal."""
    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
