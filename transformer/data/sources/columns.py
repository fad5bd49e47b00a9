"""Parquet and Arrow files, and folders of `datasets.Dataset.save_to_disk`, read by pyarrow a few rows at a time."""

import base64
import itertools
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from transformer.data.files import decode_utf8, is_there, kind_of, refuse_dangling
from transformer.data.source_kind import Rows, SourceKind
from transformer.data.sources.files import File
from transformer.storage import expand, resolved, understood
from transformer.types import UserError
from transformer.validation import require, require_installed, shown

COLUMN_FILES = (".parquet", ".arrow", ".feather")
_ROWS = 1024  # rows in memory at a time
_ARROW = b"ARROW1"  # starts Arrow files; `datasets` writes the stream format instead


class Columns(File):
    """A .parquet, .arrow or .feather file: its columns have names."""

    def accepts(self, name: str) -> bool:
        """Recognize the file by its suffix."""
        return kind_of(epath.Path(expand(name))) in COLUMN_FILES and is_there(name)

    def rows(self, name: str, keys: tuple[str, ...], what: str) -> Rows:
        """Each row of the table."""
        del what
        return column_rows(epath.Path(expand(name)), keys)


class SavedDataset(SourceKind):
    """A folder that `datasets.Dataset.save_to_disk` wrote."""

    def accepts(self, name: str) -> bool:
        """Recognize the folder by its metadata files."""
        path = epath.Path(expand(name))
        return path.is_dir() and any((path / described).exists() for described in ("state.json", "dataset_dict.json"))

    def title(self, name: str) -> tuple[str, str]:
        """Name the corpus after the folder."""
        return resolved(name).name, "1.0.0"

    def rows(self, name: str, keys: tuple[str, ...], what: str) -> Rows:
        """The rows of its files, one file after the other."""
        del what
        return itertools.chain.from_iterable(column_rows(path, keys) for path in self.files(name))

    def files(self, name: str) -> list[epath.Path]:
        """The data files, in their order."""
        path = epath.Path(expand(name))
        if (path / "dataset_dict.json").exists():
            splits = sorted(child.name for child in path.iterdir() if child.is_dir())
            one = "train" if "train" in splits else splits[0]
            raise UserError(
                f"A source must be one dataset, {path} has {', '.join(splits)}; give one, such as {path / one}."
            )
        with understood(f"{path / 'state.json'}"):
            names = [entry["filename"] for entry in json.loads((path / "state.json").read_text())["_data_files"]]
        require(
            all(isinstance(part, str) and part == epath.Path(part).name for part in names),
            f"{path / 'state.json'} must name files of its folder, got {shown(names)}.",
        )
        return [path / part for part in names]


def column_rows(path: epath.Path, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet or Arrow file, each with its location.

    Raises:
        UserError: the file is damaged, or lacks one of the columns `keys`; or pyarrow is not installed.
    """
    arrow = _pyarrow()
    refuse_dangling(path)
    try:
        with path.open("rb") as file:
            names, batches = _batches(file, path)
            missing = [key for key in keys if key not in names and "messages" not in names]
            require(
                not missing,
                f"A table must have the columns that are read, {path} has no {', '.join(missing)} but {', '.join(names)}; rename "
                "them, or give their names (the options that end in -key, where the command has them).",
            )
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                location = f"{path}, line {number}"
                yield location, _as_in_json({**row, **_decoded(row, keys, location)})
    except (arrow.ArrowException, EOFError) as error:
        raise UserError(
            f"A Parquet or Arrow file must be whole, {path} is not: {str(error).splitlines()[0].rstrip('.'):.200}. "
            "Make or fetch it again."
        ) from None


def _decoded(row: dict[str, Any], keys: tuple[str, ...], location: str) -> dict[str, str]:
    """The texts of columns without a declared type, which older writers of Parquet leave as bytes."""
    found = {key: row[key] for key in keys if isinstance(row.get(key), bytes)}
    return {
        key: decode_utf8(data, f"A column of text must be UTF-8, {key} of {location}") for key, data in found.items()
    }


def _as_in_json(value: Any) -> Any:
    """A value as in a .jsonl file: times and decimals as text, bytes in base64."""
    if isinstance(value, dict):
        return {name: _as_in_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_as_in_json(part) for part in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _pyarrow() -> Any:
    try:
        import pyarrow.ipc  # noqa: PLC0415 (the import takes half a second, and such files are rare)
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        require_installed(None, "pyarrow", "formats")
        raise
    return pyarrow


def _batches(file: Any, path: epath.Path) -> tuple[list[str], Iterator[Any]]:
    if kind_of(path) == ".parquet":
        table = _pyarrow().parquet.ParquetFile(file)
        return table.schema_arrow.names, table.iter_batches(_ROWS)
    start = file.read(len(_ARROW))
    file.seek(0)
    ipc = _pyarrow().ipc
    if start != _ARROW:
        stream = ipc.open_stream(file)
        return stream.schema.names, iter(stream)
    reader = ipc.open_file(file)
    return reader.schema.names, map(reader.get_batch, range(reader.num_record_batches))
