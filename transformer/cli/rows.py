"""Rows of a file or of standard input, and the file or standard output that they are written to with more columns."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.progress import Progress

from transformer.cli.row_options import RowOptions
from transformer.data.files import STANDARD_INPUT
from transformer.data.registry import find_source
from transformer.parallel.mesh import make_mesh
from transformer.runs.saved import Loaded, load
from transformer.storage import expand, explained, writing_whole
from transformer.terminal import make_console, printable
from transformer.validation import require

Write = Callable[[str, dict[str, Any]], None]
"""Writes a row, whose place is for messages."""
Row = tuple[str, dict[str, Any]]
"""A row, behind its place for messages."""


def check_files(options: RowOptions, what: str) -> None:
    """Raise UserError where there is nothing to read, or the output is there already; before a model is loaded."""
    require_new(options.output)
    require(
        not _is_piped(options) or (sys.stdin is not None and not sys.stdin.isatty()),
        f"There must be something to {what}, got no INPUT and nothing piped in; give a file.",
    )


def load_on_all_devices(options: RowOptions) -> tuple[Loaded, int]:
    """The model, a whole copy on each device of this process; and the rows of a batch, which the devices share."""
    devices = jax.local_devices()
    mesh = make_mesh(len(devices), devices)
    run = load(options.workdir, step=options.step, base=options.base, weights=options.weights, mesh=mesh)
    size = options.batch_size or run.config.data.batch_size
    return run, size if options.batch_size else -(-size // len(devices)) * len(devices)


def read_rows(options: RowOptions, keys: tuple[str, ...], what: str) -> tuple[str, list[Row]]:
    """The name of what is read, for messages, and all of its rows, so that a bad one is an error before anything is computed."""
    name = f"{STANDARD_INPUT}.{options.format}" if _is_piped(options) else str(options.input)
    rows = list(find_source(name).rows(name, keys, "texts"))
    require(len(rows) > 0, f"There must be something to {what}, {name} has no texts.")
    return name, rows


def write_rows(rows: Sequence[Row], found: Iterable[dict[str, Any]], output: str, doing: str) -> None:
    """Write each row with the columns that were found, as they come."""
    console = make_console()
    # A bar and rows do not share a terminal.
    hidden = not console.is_terminal or (output == "" and sys.stdout.isatty())
    progress = Progress(console=console, disable=hidden, transient=True, redirect_stdout=False, redirect_stderr=False)
    with progress as bar, _writer(output, len(rows)) as write:
        for (place, row), columns in zip(rows, bar.track(found, len(rows), description=doing), strict=True):
            taken = [column for column in columns if column in row]
            require(
                not taken,
                f"Results must have columns of their own, {place} has {', '.join(map(repr, taken))} already; rename that.",
            )
            write(place, row | columns)


def _is_piped(options: RowOptions) -> bool:
    return options.input in (None, "-")


def require_new(output: str, flag: str = "--output") -> None:
    """Raise UserError where a file that is to be written, and that a flag names, is there already."""
    require(
        output == "" or not epath.Path(expand(output)).exists(),
        f"{flag} must be a new file, {output} exists; choose another name, or remove it.",
    )


@contextmanager
def _writer(output: str, count: int) -> Iterator[Write]:
    """What writes so many rows to a file, which is there once all of them are, or to standard output."""
    if output == "":
        yield lambda place, row: _print(json.dumps(row))
        return
    with explained(output), writing_whole(expand(output)) as file:
        if output.endswith(".npy"):
            yield _array_writer(file, count)
        else:
            yield _csv_writer(file, output) if output.endswith(".csv") else lambda place, row: _put(file, row)
        require_new(output)


def _print(line: str) -> None:
    sys.stdout.write((printable(line) if sys.stdout.isatty() else line) + "\n")
    sys.stdout.flush()


def _put(file: Any, row: dict[str, Any]) -> None:
    file.write(f"{json.dumps(row)}\n".encode())


def _csv_writer(file: Any, output: str) -> Write:
    """Writes the columns of the first row; what is neither text nor empty as JSON has it."""
    columns: list[str] = []

    def write(place: str, row: dict[str, Any]) -> None:
        line = io.StringIO()
        table = csv.writer(line, lineterminator="\n")
        if not columns:
            columns.extend(row)
            table.writerow(columns)
        require(
            set(row) == set(columns),
            f"The rows of {output} must have the same columns, {', '.join(columns)}, {place} gives {', '.join(row)}; write "
            ".jsonl instead.",
        )
        values = [row[column] for column in columns]
        table.writerow(["" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values])
        file.write(line.getvalue().encode("utf-8", "replace"))

    return write


def _array_writer(file: Any, count: int) -> Write:
    """Writes the `embedding` of so many rows as one array in NumPy's format."""
    begun: list[bool] = []

    def write(place: str, row: dict[str, Any]) -> None:
        del place
        vector_D = row["embedding"]
        if not begun:
            begun.append(True)
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, len(vector_D))}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(vector_D.astype("<f4").tobytes())

    return write
