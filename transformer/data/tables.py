"""Rows of tables (.csv, .tsv) and lines of text files, each with its location."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from etils import epath

from transformer.data.files import decode_text, file_lines
from transformer.types import UserError
from transformer.validation import require

_LONGEST_FIELD = 1 << 30


def text_lines(path: epath.Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a text file as rows with one field, each with its location."""
    for number, line in file_lines(path):
        location = f"{path}, line {number}"
        yield location, {key: decode_text(line, location).rstrip("\r\n")}


def table_rows(path: epath.Path, delimiter: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, each with its location; its first line names its columns, which must include `keys`.

    Raises:
        UserError: the table is not well formed, or lacks a column.
    """
    before = csv.field_size_limit(_LONGEST_FIELD)
    rows: csv.DictReader[str] | None = None
    first = 1  # the first line of a row
    try:
        rows = csv.DictReader(_lines(path), delimiter=delimiter, strict=True)
        header = list(rows.fieldnames or ())
        _check_header(header, path, delimiter, keys)
        first = rows.line_num + 1
        for row in rows:
            location = f"{path}, line {rows.line_num}"
            require(
                None not in row and None not in row.values(),
                f"Each row must have the {len(header)} columns of the header, {location} has more or fewer; "
                "a field with commas, quotes or newlines is put in double quotes.",
            )
            yield location, row
            first = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"A table must be well formed, {path} is not, in the row that begins in line {first}: {error}; a field that has a "
            'double quote in it is put in double quotes, and that quote is doubled: "".'
        ) from None
    finally:
        csv.field_size_limit(before)


def _lines(path: epath.Path) -> Iterator[str]:
    """The lines of a table, with any line ending; only one is in memory."""
    for number, line in file_lines(path):
        yield from io.StringIO(decode_text(line, f"{path}, line {number}"), newline="")


def _check_header(header: list[str], path: epath.Path, delimiter: str, keys: tuple[str, ...]) -> None:
    """Require that the first line of a table has each column of `keys` exactly once."""
    twice = next((key for index, key in enumerate(header) if key in header[:index]), None)
    require(
        twice is None,
        f"The columns of a table must have different names, {path} has {twice!r} as columns "
        f"{' and '.join(str(1 + index) for index, key in enumerate(header) if key == twice)}: rename or remove one.",
    )
    if all(key in header for key in keys):
        return
    shown = ", ".join(f"{key:.40}" for key in header)
    named = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
    other = next((sign for sign in named if sign != delimiter and len(header) == 1 and sign in header[0]), None)
    if other:
        remedy = f"its columns are separated by {named[other]}: save it with {named[delimiter]}"
    else:
        remedy = "if it has no header, add one as its first line; if its columns have other names, rename them, or give those "
        remedy += "(the options that end in -key, where the command has them)"
    columns = f"column{'s' * (len(keys) > 1)} {' and '.join(keys)}"
    if not header:
        raise UserError(f"The first line of a table must name the {columns}, {path} is empty.")
    raise UserError(f"The first line of a table must name the {columns}, {path}, line 1 has {shown}; {remedy}.")
