"""Folders as sources: text files, Python's standard library, and one folder per class."""

import functools
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from transformer.config import DataConfig
from transformer.data.documents import Document, file_documents, visible_files
from transformer.data.files import decode_text, kind_of, read_file, refuse_dangling
from transformer.data.forms.examples import label_text
from transformer.data.forms.labelled import LabelledText
from transformer.data.source_kind import SourceKind
from transformer.data.sources.columns import COLUMN_FILES
from transformer.data.sources.files import DELIMITERS, JSON_LINES
from transformer.data.tasks import by_size
from transformer.storage import expand, resolved
from transformer.types import UserError
from transformer.validation import counted, require

_ROWS = frozenset({JSON_LINES, *COLUMN_FILES})
_TABLES = frozenset(DELIMITERS)
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class Folder(SourceKind):
    """A folder of text files, or of one folder of texts per class."""

    def accepts(self, name: str) -> bool:
        """Accept an existing folder."""
        return epath.Path(expand(name)).is_dir()

    def title(self, name: str) -> tuple[str, str]:
        """Name the corpus after the folder."""
        return resolved(name).name, "1.0.0"

    def documents(self, name: str, config: DataConfig) -> Iterator[Document]:
        """The files, or their parts between `data.separator`."""
        path = resolved(name)
        return file_documents(path, _text_files(path), config.separator)

    def parts(self, name: str) -> Sequence[Any]:
        """Groups of files, in order."""
        return by_size(_text_files(resolved(name)))

    def part_documents(self, name: str, part: Sequence[str], config: DataConfig) -> Iterator[Document]:
        """The documents of a group of files."""
        return file_documents(resolved(name), list(map(epath.Path, part)), config.separator)

    def describe_empty(self, name: str, config: DataConfig) -> str:
        """Describe files without text."""
        del config
        path = resolved(name)
        return f"{path} has {counted(len(visible_files(path)), 'file')} and no text"

    def class_folders(self, name: str) -> Iterator[tuple[str, LabelledText]]:
        """Each file, with its folder's name as the class."""
        path = epath.Path(expand(name))
        classes = [child for child in _visible(path) if child.is_dir()]
        require(len(classes) > 0, f"A folder of labelled texts must hold one folder for each class, {path} holds none.")
        for folder in classes:
            files = [child for child in _visible(folder) if child.is_file()]
            require(len(files) > 0, f"The folder of a class must hold its texts, {folder} has no files.")
            _refuse_rows(files)
            label = label_text(folder.name, "The folder's name", str(folder))
            yield from ((str(file), LabelledText(decode_text(read_file(file), str(file)), label)) for file in files)


class StandardLibrary(SourceKind):
    """The source code of the running interpreter's standard library: `python_stdlib`."""

    is_path = False

    def accepts(self, name: str) -> bool:
        """Recognize the name `python_stdlib`."""
        return name == "python_stdlib"

    def title(self, name: str) -> tuple[str, str]:
        """Name the corpus after Python's version."""
        return name, ".".join(map(str, sys.version_info[:3]))

    def documents(self, name: str, config: DataConfig) -> Iterator[Document]:
        """Each module, without tests."""
        del name, config
        root = epath.Path(sysconfig.get_paths()["stdlib"])
        return file_documents(root, _modules(root), "")


@functools.cache
def _modules(root: epath.Path) -> list[epath.Path]:
    found = []
    for path in visible_files(root, _LEFT_OUT):
        if path.suffix == ".py":
            try:
                path.read_bytes().decode("utf-8")
            except (
                UnicodeDecodeError,
                FileNotFoundError,
            ):  # for example a test file of a codec, or a distribution's dead link
                continue
            found.append(path)
    return found


def _text_files(folder: epath.Path) -> list[epath.Path]:
    files = visible_files(folder)
    _refuse_rows(files)
    return files


def _refuse_rows(files: Sequence[epath.Path]) -> None:
    """Refuse files of rows in a folder of texts: the syntax of JSON would be learnt. Tables may lie beside texts."""
    kinds = [kind_of(file) for file in files]
    refused = _ROWS if any(kind not in _ROWS | _TABLES for kind in kinds) else _ROWS | _TABLES
    found = next((file for file, kind in zip(files, kinds, strict=True) if kind in refused), None)
    if found is not None:
        suffix = found.name[found.name.lower().rindex(kind_of(found)) :]
        raise UserError(
            f"The files of a folder must be texts, {found} has rows of fields: give a pattern of such files, "
            f"{found.parent}/*{suffix}; to read it as it is, give it a name that ends in .txt."
        )


def _visible(folder: epath.Path) -> list[epath.Path]:
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    for child in children:
        refuse_dangling(child)
    return children
