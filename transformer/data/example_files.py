"""Labelled texts and sentence pairs in files: JSON lines, CSV, folders of classes, line-aligned pairs of files."""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from transformer.data.files import (
    decode_text,
    file_lines,
    json_objects,
    kind_of,
    read_file,
    refuse_dangling,
    without_surrogates,
)
from transformer.storage import expand
from transformer.types import UserError
from transformer.validation import require

_LONGEST_FIELD = 1 << 30
_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")


class LabelledText(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


class TextPair(NamedTuple):
    """A text and what it is turned into."""

    source: str
    target: str


def read_labelled(paths: Sequence[str], *, text_key: str = "text", label_key: str = "label") -> Iterator[LabelledText]:
    """Examples of .jsonl and .csv (.tsv) files, and of folders that hold one folder of text files for each class.

    Args:
        paths: read one after the other; compressed or not.
        text_key: field or column of the text.
        label_key: field or column of the class: text, or a number or truth value of JSON, which is the text that JSON has for it
            (`0.0`, `1`, `true`), as in a table.

    Yields:
        Texts with labels as they are written; `clean_label` makes a class's name of one.
    """
    for path in map(_existing, paths):
        if path.is_dir():
            yield from _folder(path)
            continue
        for place, record in _records(path, "labelled texts", (text_key, label_key)):
            text, label = (_field(record, key, place) for key in (text_key, label_key))
            require(isinstance(text, str), f"{text_key!r} must be text, {place} has {type(text).__name__}.")
            yield LabelledText(without_surrogates(text), _label(label, label_key, place))


def _label(value: Any, key: str, place: str) -> str:
    """A label as text, whatever kind of file it comes from."""
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    label = json.dumps(value) if number else value
    require(
        isinstance(label, str) and clean_label(label) != "",
        f"{key!r} must be the name or number of a class, {place} has {value!r}.",
    )
    return without_surrogates(str(label))


def clean_label(label: str) -> str:
    """A class's name: newlines and tabs within are a space, and there is no white space at its ends.

    TFDS stores names one a line, and without white space at their ends.

    >>> clean_label(" two\\nlines ")
    'two lines'
    """
    return _BREAKS.sub(" ", label).strip()


def read_pairs(paths: Sequence[str], *, source_key: str = "source", target_key: str = "target") -> Iterator[TextPair]:
    """Pairs of one .jsonl or .csv (.tsv) file, or of two files of which line n of one belongs to line n of the other.

    Args:
        paths: one file, or two; compressed or not.
        source_key: field or column of the source, for one file.
        target_key: field or column of the target, for one file.
    """
    files = [_existing(path) for path in paths]
    require(len(files) in (1, 2), f"Pairs are read from one file, or two with a line for each, got {len(files)} files.")
    if len(files) == 2:
        yield from _aligned(*files)
        return
    for place, record in _records(files[0], "pairs", (source_key, target_key)):
        source, target = (_field(record, key, place) for key in (source_key, target_key))
        require(
            isinstance(source, str) and isinstance(target, str),
            f"{source_key!r} and {target_key!r} must be text, {place} has {type(source).__name__} and {type(target).__name__}.",
        )
        yield TextPair(without_surrogates(source), without_surrogates(target))


def _existing(name: str) -> epath.Path:
    path = epath.Path(expand(name))
    refuse_dangling(path)
    require(path.exists(), f"A file or folder of examples must exist, {name!r} does not.")
    return path


def _records(path: epath.Path, what: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record with its place."""
    readers: dict[str, Callable[[epath.Path], Iterator[tuple[str, dict[str, Any]]]]] = {
        ".jsonl": json_objects,
        ".csv": lambda path: _table(path, ",", keys),
        ".tsv": lambda path: _table(path, "\t", keys),
    }
    kind = kind_of(path)
    require(
        kind in readers, f"A file of {what} must be {', '.join(readers)} (or these with .gz, .bz2, .xz), got {path}."
    )
    return readers[kind](path)


def _table(path: epath.Path, delimiter: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    rows: csv.DictReader[str] | None = None
    first = 1  # the line in which a row begins
    try:
        text = decode_text(read_file(path), str(path))
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = list(rows.fieldnames or ())
        _check_header(header, path, delimiter, keys)
        first = rows.line_num + 1
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            require(
                None not in row and None not in row.values(),
                f"Each row must have the {len(header)} columns of the header, {place} has more or fewer; "
                "a field with commas, quotes or newlines is put in double quotes.",
            )
            yield place, row
            first = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"A table must be well formed, {path} is not, in the row that begins in line {first}: {error}; a field that has a "
            'double quote in it is put in double quotes, and that quote is doubled: "".'
        ) from None
    finally:
        csv.field_size_limit(before)


def _check_header(header: list[str], path: epath.Path, delimiter: str, keys: tuple[str, ...]) -> None:
    """Raise UserError unless the first line of a table has the columns that are read, each once."""
    twice = next((key for index, key in enumerate(header) if key in header[:index]), None)
    require(
        twice is None,
        f"The columns of a table must have different names, {path} has {twice!r} as columns "
        f"{' and '.join(str(1 + index) for index, key in enumerate(header) if key == twice)}: rename or remove one.",
    )
    if all(key in header for key in keys):
        return
    shown = ", ".join(f"{key:.40}" for key in header) or "nothing"
    named = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
    other = next((sign for sign in named if sign != delimiter and len(header) == 1 and sign in header[0]), None)
    if other:
        remedy = f"its columns are separated by {named[other]}: save it with {named[delimiter]}"
    else:
        remedy = "if it has no header, add one as its first line; if its columns have other names, give those "
        remedy += "(the options that end in -key)"
    raise UserError(
        f"The first line of a table must name the columns {' and '.join(keys)}, {path}, line 1 has {shown}; {remedy}."
    )


def _field(record: dict[str, Any], key: str, place: str) -> Any:
    require(key in record, f"Each example must have {key!r}, {place} has {', '.join(map(repr, record)) or 'nothing'}.")
    return record[key]


def _visible(folder: epath.Path) -> list[epath.Path]:
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    for child in children:
        refuse_dangling(child)
    return children


def _folder(path: epath.Path) -> Iterator[LabelledText]:
    classes = [child for child in _visible(path) if child.is_dir()]
    require(len(classes) > 0, f"A folder of labelled texts must hold one folder for each class, {path} holds none.")
    for folder in classes:
        files = [child for child in _visible(folder) if child.is_file()]
        require(len(files) > 0, f"The folder of a class must hold its texts, {folder} has no files.")
        for file in files:
            yield LabelledText(
                decode_text(read_file(file), str(file)), _label(folder.name, "The folder's name", str(folder))
            )


def _aligned(first: epath.Path, second: epath.Path) -> Iterator[TextPair]:
    counts = [sum(1 for _ in file_lines(path)) for path in (first, second)]
    require(
        counts[0] == counts[1],
        f"Two files of pairs must have as many lines, {first} has {counts[0]:,} and {second} {counts[1]:,}.",
    )

    def lines(path: epath.Path) -> Iterator[str]:
        return (decode_text(line, f"{path}, line {number}").rstrip("\r\n") for number, line in file_lines(path))

    yield from itertools.starmap(TextPair, zip(lines(first), lines(second), strict=True))
