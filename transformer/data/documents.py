"""Local corpora as documents: Python's standard library, a text file, a folder of text files, a .jsonl file."""

import dataclasses
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from etils import epath

from transformer.config import DataConfig
from transformer.data.files import decode_text, json_objects, kind_of, read_file, without_surrogates
from transformer.data.identity import ContentHash
from transformer.storage import expand, is_local
from transformer.validation import require

PYTHON_STDLIB = "python_stdlib"
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class Document(NamedTuple):
    """A text, what stands before it without being learnt, and the file it came from."""

    text: str
    prompt: str
    name: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A local corpus of non-empty documents, read anew by each call of `documents`."""

    name: str
    version: str
    fingerprint: str
    """Of texts and prompts in their order; neither names of files nor their places count."""
    sizes: tuple[int, ...]
    """Bytes of each document's text."""
    documents: Callable[[], Iterator[Document]]

    @property
    def count(self) -> int:
        """How many documents there are."""
        return len(self.sizes)


def read_local(source: str, config: DataConfig) -> Corpus:
    """The corpus at a local (or gs://) path, or of the running interpreter."""
    if source == PYTHON_STDLIB:
        return _files(PYTHON_STDLIB, ".".join(map(str, sys.version_info[:3])), *_stdlib_files(), separator="")
    path = epath.Path(expand(source)).resolve()
    if path.is_dir():
        return _files(path.name, "1.0.0", path, _visible_files(path), separator=config.separator)
    if kind_of(path) == ".jsonl":
        return _jsonl(path, config)
    require(
        kind_of(path) not in (".json", ".csv", ".tsv"),
        f"Running text is read from text files and .jsonl, {path} would be learnt with its commas, quotes and braces. Save it as "
        ".jsonl, one object a line with the text as 'text'; for texts with classes, or pairs, use `transformer prepare --kind`; "
        "to learn the file as it is, give it a name that ends in .txt.",
    )
    return _files(path.name, "1.0.0", path.parent, [path], separator=config.separator)


def _stdlib_files() -> tuple[epath.Path, list[epath.Path]]:
    root = epath.Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in _visible_files(root, _LEFT_OUT):
        if path.suffix == ".py":
            try:
                path.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, FileNotFoundError):  # a codec's fixture, say; a link of the distribution's
                continue
            files.append(path)
    return root, files


def _visible_files(root: epath.Path, skipped: frozenset[str] = frozenset()) -> list[epath.Path]:
    """Files under `root`, sorted, without hidden ones and without what lies in hidden or `skipped` folders.

    Links are followed. Each real folder is read once, and none that holds `root`: links may lead back.
    """
    seen = set[str]()
    above = os.path.realpath(root) if is_local(root) else ""

    def is_new(folder: epath.Path) -> bool:
        if not is_local(folder):  # no links there
            return True
        real = os.path.realpath(folder)
        if real in seen or os.path.commonpath([real, above]) == real:
            return False
        seen.add(real)
        return True

    def below(folder: epath.Path) -> Iterator[epath.Path]:
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                yield path
            elif path.name not in skipped and is_new(path):
                yield from below(path)

    return list(below(root))


def _files(name: str, version: str, root: epath.Path, files: list[epath.Path], *, separator: str) -> Corpus:
    def documents() -> Iterator[Document]:
        for path in files:
            text = decode_text(read_file(path), str(path))
            place = path.relative_to(root).as_posix()
            first, *others = text.split(separator) if separator else [text]
            parts = [(first, place), *((part.removeprefix("\n"), f"{place}:{n}") for n, part in enumerate(others, 2))]
            yield from (Document(part, "", name) for part, name in parts if part.strip())

    place = root if len(files) != 1 else files[0]
    return _corpus(name, version, documents, f"{place} has {len(files)} files and no text in them")


def _jsonl(path: epath.Path, config: DataConfig) -> Corpus:
    def documents() -> Iterator[Document]:
        for place, record in json_objects(path):
            document = _json_document(record, place, config)
            if document.text.strip():
                yield document._replace(name=f"{path.name}:{place.rpartition(' ')[2]}")

    return _corpus(path.name, "1.0.0", documents, f"{path} has no line with a non-empty {config.text_key!r}")


def _corpus(name: str, version: str, documents: Callable[[], Iterator[Document]], if_empty: str) -> Corpus:
    content, sizes = ContentHash(), []
    for document in documents():
        content.add(document.text, document.prompt)
        sizes.append(len(document.text.encode()))
    require(len(sizes) > 0, f"A source must hold text, {if_empty}.")
    return Corpus(name, version, content.hexdigest(), tuple(sizes), documents)


def _json_document(record: dict[str, Any], place: str, config: DataConfig) -> Document:
    text: Any = record.get(config.text_key)
    prompt: Any = record.get(config.prompt_key, "")
    require(
        isinstance(text, str) and isinstance(prompt, str),
        f"data.text_key={config.text_key!r} must name a string in each line (and data.prompt_key={config.prompt_key!r} "
        f"too, where present); {place} has {', '.join(f'{k} ({type(v).__name__})' for k, v in record.items())}.",
    )
    return Document(without_surrogates(text), without_surrogates(prompt), "")
