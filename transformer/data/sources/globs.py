"""Several files under one name with `*`, `?` or `[...]`, such as `data/*.jsonl.zst`: their rows or texts in sequence."""

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from transformer.config import DataConfig
from transformer.data.documents import Document
from transformer.data.source_kind import Rows, SourceKind
from transformer.data.tasks import by_size
from transformer.storage import expand, is_local
from transformer.validation import require

_MAGIC = re.compile(r"[*?[]")


class Pattern(SourceKind):
    """The files that match a pattern, in the order of their names; all must be of one kind."""

    def __init__(self, kinds: Sequence[SourceKind]) -> None:
        self._kinds = kinds

    def accepts(self, name: str) -> bool:
        """Accept a name with a wildcard; files and folders with exactly this name were tried before."""
        return is_pattern(name)

    def title(self, name: str) -> tuple[str, str]:
        """Name the corpus after the pattern's last component."""
        return epath.Path(name).name, "1.0.0"

    def rows(self, name: str, keys: tuple[str, ...], what: str) -> Rows:
        """The rows of the files, one file after the other."""
        kind, files = self._found(name)
        return itertools.chain.from_iterable(kind.rows(file, keys, what) for file in files)

    def documents(self, name: str, config: DataConfig) -> Iterator[Document]:
        """The documents of the files, one file after the other."""
        kind, files = self._found(name)
        return itertools.chain.from_iterable(kind.documents(file, config) for file in files)

    def parts(self, name: str) -> Sequence[Any]:
        """Groups of files, in order."""
        return by_size(map(epath.Path, self._found(name)[1]))

    def part_documents(self, name: str, part: Sequence[str], config: DataConfig) -> Iterator[Document]:
        """The documents of a group of files."""
        kind = next(kind for kind in self._kinds if kind.accepts(part[0]))
        return itertools.chain.from_iterable(kind.documents(file, config) for file in part)

    def files(self, name: str) -> list[epath.Path]:
        """The files that match."""
        return matching(name)

    def _found(self, name: str) -> tuple[SourceKind, list[str]]:
        files = [str(path) for path in self.files(name)]
        require(len(files) > 0, f"A pattern must match a file, {name} matches none.")
        kinds = [next((kind for kind in self._kinds if kind.accepts(file)), None) for file in files]
        other = next((file for file, kind in zip(files, kinds, strict=True) if kind is not kinds[0]), None)
        require(
            kinds[0] is not None and other is None,
            f"The files of a pattern must be of one kind, {name} matches {files[0]} and {other or files[0]}; give two sources.",
        )
        assert kinds[0] is not None
        return kinds[0], files


def is_pattern(name: str) -> bool:
    """Whether a name has a wildcard."""
    return bool(_MAGIC.search(name))


def matching(name: str) -> list[epath.Path]:
    """The files of a pattern, in the order of their names."""
    path = epath.Path(expand(name))
    if is_local(name):
        return sorted(map(epath.Path, glob.glob(os.fspath(path), recursive=True)))
    require("**" not in name, f"A pattern in storage must name each folder, {name} has **; use * for a folder.")
    plain = next(index for index, part in enumerate(path.parts) if _MAGIC.search(part))
    root = epath.Path(*path.parts[:plain])
    return sorted(found for found in root.glob("/".join(path.parts[plain:])) if not found.name.startswith("."))
