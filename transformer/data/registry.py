"""All kinds of sources in the order of trial; the first kind that accepts a name in `data.source` reads it."""

import os
from typing import TypeVar

from etils import epath

from transformer.config import DataConfig
from transformer.data.files import refuse_dangling
from transformer.data.source import Source
from transformer.data.source_kind import Rows, SourceKind
from transformer.data.sources.columns import Columns, SavedDataset
from transformer.data.sources.files import JsonLines, Table, TextFile
from transformer.data.sources.folders import Folder, StandardLibrary
from transformer.data.sources.globs import Pattern
from transformer.data.sources.tfds import TfdsDataset
from transformer.data.sources.token_files import TokenFiles
from transformer.data.tasks import Run
from transformer.storage import expand
from transformer.types import UserError

AnySource = TypeVar("AnySource", bound=SourceKind)

_FILES: tuple[SourceKind, ...] = (JsonLines(), Table(), Columns(), TextFile())
_KINDS: list[SourceKind] = [StandardLibrary(), TokenFiles(), SavedDataset(), Folder()]
_KINDS += [*_FILES, Pattern(_FILES), TfdsDataset()]


def register_source(kind: type[AnySource]) -> type[AnySource]:
    """Register a kind of source, to be tried before the existing kinds; a decorator.

    Example:
        A source can be read once its module has been imported:

        >>> @register_source
        ... class Numbers(SourceKind):
        ...     is_path = False
        ...     def accepts(self, name):
        ...         return name.startswith("numbers-")
        ...     def rows(self, name, keys, what):
        ...         yield from ((f"number {i}", {"text": str(i)}) for i in range(int(name.removeprefix("numbers-"))))
        >>> [row["text"] for _, row in find_source("numbers-3").rows("numbers-3", ("text",), "text")]
        ['0', '1', '2']
    """
    others = [known for known in _KINDS if type(known).__qualname__ != kind.__qualname__]
    own: list[SourceKind] = [kind()]
    _KINDS[:] = own + others
    return kind


def find_source(name: str) -> SourceKind:
    """The kind that reads a name.

    Raises:
        UserError: no kind accepts the name.
    """
    found = _first_that_accepts(name)
    if found is None:
        raise UserError(
            f"A source must be a file or folder that exists, python_stdlib, or a TFDS name; there is no file or folder "
            f"{name!r:.200} (looked in {os.getcwd()}), and a TFDS name is written name, name/config or name:1.0.0."
        )
    return found


def find_rows(name: str, keys: tuple[str, ...], what: str) -> Rows:
    """The rows of a file, for commands that read a file and no dataset.

    Raises:
        UserError: the file does not exist, or cannot be read as rows; or a row is bad.
    """
    found = _first_that_accepts(name)
    if found is None:
        raise UserError(f"A file of {what} must exist, there is no {name!r:.200} in {os.getcwd()}; check the name.")
    return found.rows(name, keys, what)


def _first_that_accepts(name: str) -> SourceKind | None:
    refuse_dangling(epath.Path(expand(name)))
    return next((kind for kind in _KINDS if kind.accepts(name)), None)


def open_sources(config: DataConfig, run: Run | None = None) -> tuple[Source, ...]:
    """Open each of `config.source` as running text. It is prepared unless it already is; by tasks of `run`, if given."""
    if run is not None:
        return tuple(find_source(name).open_text(name, config, run) for name in config.source)
    return tuple(open_source(source, config) for source in config.source)


def open_source(source: str, config: DataConfig) -> Source:
    """Open a source of running text."""
    return find_source(source).open_text(source, config)
