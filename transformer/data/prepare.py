"""A source named in a config becomes records that are read at random: TFDS datasets, or local text prepared as one."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from transformer.config import DataConfig
from transformer.data.builder import TEXT_FEATURES, Example, builder_class
from transformer.data.documents import PYTHON_STDLIB, Corpus, read_local
from transformer.data.files import refuse_dangling
from transformer.data.identity import ContentHash, sampled
from transformer.data.splits import SPLIT_RULE, SPLITS, cut, divide, split_documents
from transformer.data.stored import NAME, check_stored, find_stored, in_order, open_stored, readable
from transformer.storage import expand
from transformer.types import UserError
from transformer.validation import require

_FORMAT = 1  # of the prepared records; a change prepares every corpus anew
_FEW_RECORDS = 64  # a TFDS split with fewer records is cut into pieces, so that there is something to shuffle


class Record(NamedTuple):
    """A document, or a piece of one that is too long; `last` is the piece that ends it."""

    text: str
    prompt: str
    continues: bool
    last: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus ready to be read; `records` gives the random-access records of a split, in the order of the text.

    The fingerprint is of content and split rule, not of a path.
    """

    name: str
    fingerprint: str
    split_names: tuple[str, ...]
    description: str
    open_split: Callable[[str], Sequence[Record]]
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Split -> its documents."""

    def records(self, split: str) -> Sequence[Record]:
        """The records of a split, in the order of the text, read at random.

        Raises:
            UserError: there is no such split, or no text in it.
        """
        require(
            split in self.split_names,
            f"A split must be one of {', '.join(self.split_names) or 'none'} for {self.name}, got {split!r}; "
            "for local text, data.validation_fraction and data.test_fraction make the other ones.",
        )
        return self.open_split(split)


def open_sources(config: DataConfig) -> tuple[Source, ...]:
    """Each of `config.source`, prepared now if it was not before."""
    return tuple(open_source(source, config) for source in config.source)


def open_source(source: str, config: DataConfig) -> Source:
    """A TFDS name, `python_stdlib`, a text file, a folder of text files or a .jsonl file, ready to be read."""
    refuse_dangling(epath.Path(expand(source)))
    if source == PYTHON_STDLIB or epath.Path(expand(source)).exists():
        try:
            corpus = read_local(source, config)
        except OSError as error:
            raise UserError(f"A source must be readable, {source} is not: {error}.") from error
        return _open_local(corpus, config)
    require(
        NAME.fullmatch(source) is not None,
        f"A source must be a file or folder that exists, python_stdlib, or a TFDS name; there is no file or folder "
        f"{source!r} (looked in {os.getcwd()}), and a TFDS name is written name, name/config or name:1.0.0.",
    )
    return _open_tfds(source, config)


def split_text(source: Source, split: str) -> Iterator[str]:
    """The documents of a split, whole and in order, with their prompts in front."""
    for prompt, text in whole_documents(source, split):
        yield prompt + text


def whole_documents(source: Source, split: str) -> Iterator[tuple[str, str]]:
    """(prompt, text) of each document of a split, in order, its pieces joined again."""
    prompt, pieces = "", list[str]()
    for record in source.records(split):
        if not record.continues:
            prompt = record.prompt
        pieces.append(record.text)
        if record.last:
            yield prompt, "".join(pieces)
            pieces = []


class Converted(Sequence[Any]):
    """A TFDS data source, or those of its examples that are chosen, each converted when it is read."""

    def __init__(
        self,
        stored: Sequence[Example],
        convert: Callable[[Example], Any],
        chosen: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        self._stored, self._convert = stored, convert
        self._chosen = range(len(stored)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"A record's index must be at least 0 and below {len(self)}, got {index}.")
        with readable():
            example = self._stored[int(self._chosen[index])]
        return self._convert(example)


# ---- TFDS datasets by name -------------------------------------------------------------------------------------------


def tfds_builder(name: str, config: DataConfig) -> Any:
    """The builder of a dataset that is on disk.

    Raises:
        UserError: TFDS does not know it, or it has not been prepared.
    """
    data_dir = data_directory(config)
    directory = find_stored(name, data_dir)
    if directory is None:
        base = re.split("[/:]", name)[0]
        require(
            base in tfds.list_builders(with_community_datasets=False),
            f"A source must be a file or folder that exists, python_stdlib, or a TFDS name; {name!r} is neither a file "
            f"or folder in {os.getcwd()} nor a dataset that TFDS knows or finds in {data_dir}.",
        )
        raise UserError(
            f"A TFDS dataset must be prepared before training, {name!r} is not in {data_dir} (nor is a file or folder of "
            f"this name in {os.getcwd()}): prepare it once with {_how_to_prepare(name, config)}, or point data.data_dir at "
            "where it is."
        )
    with quiet():
        builder = open_stored(directory)
    require(len(builder.info.splits) > 0, f"A stored dataset must have splits, {directory} has none.")
    return builder


def tfds_split(builder: Any, split: str, config: DataConfig, **options: Any) -> Sequence[Any]:
    """The examples of a split, read at random; `options` are those of TFDS's `as_data_source`.

    Raises:
        UserError: they are not stored as ArrayRecord.
    """
    try:
        with quiet(), readable():
            return builder.as_data_source(split, **options)
    except NotImplementedError:
        name = builder.info.full_name
        raise UserError(
            f"A TFDS dataset must be stored as ArrayRecord, {name!r} in {data_directory(config)} is not: "
            f"prepare it in another data_dir with {_how_to_prepare(name, config)}."
        ) from None


def tfds_sizes(builder: Any) -> dict[str, int]:
    """Split -> its examples, without empty ones."""
    return {split: info.num_examples for split, info in builder.info.splits.items() if info.num_examples}


def hash_tfds(
    content: ContentHash, builder: Any, config: DataConfig, convert: Callable[[Example], Sequence[str | int]]
) -> None:
    """Add what a stored dataset holds: sizes and evenly spaced examples of each split (all of a small one).

    Not the name: another dataset of the same name, in another folder, must differ.
    """
    for split, count in sorted(tfds_sizes(builder).items()):
        content.add(split, count, builder.info.splits[split].num_bytes)
        for example in in_order(tfds_split(builder, split, config), sampled(count)):
            content.add(*convert(example))


def _how_to_prepare(name: str, config: DataConfig) -> str:
    return (
        f"`tfds build {name.partition(':')[0]} --file_format=array_record --data_dir={data_directory(config)}` (only that "
        "command needs `pip install tensorflow importlib_resources`, in any environment)"
    )


def _open_tfds(name: str, config: DataConfig) -> Source:
    builder = tfds_builder(name, config)
    features = builder.info.features
    keys = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    require(
        config.text_key in keys,
        f"data.text_key must be a feature of {name!r}, got {config.text_key!r}; it has {', '.join(sorted(keys))}.",
    )

    def open_split(split: str) -> Sequence[Record]:
        records = Converted(tfds_split(builder, split, config), functools.partial(_whole, config))
        if len(records) >= _FEW_RECORDS:
            return records
        return [piece for record in records for piece in _pieces(record.text, record.prompt, config.record_bytes)]

    sizes, full_name = tfds_sizes(builder), builder.info.full_name
    description = f"{full_name}: " + ", ".join(f"{split} {count:,} records" for split, count in sizes.items())
    content = ContentHash()
    hash_tfds(content, builder, config, lambda example: _whole(config, example)[:2])
    return Source(full_name, content.hexdigest(), tuple(sizes), description, open_split, sizes)


def _whole(config: DataConfig, example: Example) -> Record:
    text, prompt = example[config.text_key], example.get(config.prompt_key, b"")
    require(
        isinstance(text, bytes) and isinstance(prompt, bytes),
        f"data.text_key={config.text_key!r} and data.prompt_key={config.prompt_key!r} must name text features, "
        f"got {type(text).__name__} and {type(prompt).__name__}.",
    )
    return Record(text.decode("utf-8", "replace"), prompt.decode("utf-8", "replace"), continues=False, last=True)


# ---- Local text, prepared once ---------------------------------------------------------------------------------------


def _open_local(corpus: Corpus, config: DataConfig) -> Source:
    identity = _identity(corpus, config)
    label = re.sub(r"\W+", "_", corpus.name, flags=re.ASCII).strip("_").lower() or "text"
    root = data_directory(config) / "text_records" / f"{label}-{corpus.version}-{identity[:16]}-{config.record_bytes}"
    # The pointer is written last and in one piece: a dataset it does not name does not exist, whatever lies in `root`.
    pointer = root / "prepared.json"
    if not pointer.exists():
        _prepare(corpus, label, root, pointer, config)
    prepared = json.loads(pointer.read_text())
    with quiet():
        builder: Any = open_stored(root / prepared["directory"])

    def open_split(split: str) -> Sequence[Record]:
        return Converted(builder.as_data_source(split), _piece)

    name = f"{corpus.name} {corpus.version}" if corpus.name == PYTHON_STDLIB else corpus.name
    sizes: dict[str, dict[str, int]] = prepared["splits"]
    description = f"{name}: " + ", ".join(
        f"{split} {size['documents']:,} documents, {size['bytes']:,} bytes" for split, size in sizes.items()
    )
    return Source(
        name, identity, tuple(sizes), description, open_split, {n: size["documents"] for n, size in sizes.items()}
    )


def _piece(example: Example) -> Record:
    text, prompt = example["text"].decode(), example["prompt"].decode()
    return Record(text, prompt, bool(example["continues"]), bool(example["last"]))


def _identity(corpus: Corpus, config: DataConfig) -> str:
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
        f"A source must leave text for each split, {corpus.name} has {sum(corpus.sizes):,} bytes in {corpus.count:,} documents "
        f"and none for {' and '.join(missing)} with data.validation_fraction={config.validation_fraction} and "
        f"data.test_fraction={config.test_fraction}: add text, or set them to 0.",
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
        for piece in _pieces(document.text, document.prompt, record_bytes):
            yield {**piece._asdict(), "name": document.name}


def _pieces(text: str, prompt: str, record_bytes: int) -> Iterator[Record]:
    pieces = list(cut(text, record_bytes))
    for index, piece in enumerate(pieces):
        yield Record(piece, prompt if index == 0 else "", index > 0, index == len(pieces) - 1)


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
