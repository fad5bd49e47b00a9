"""Reads rows of a file or of standard input, and writes them with more columns."""

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
from transformer.data.registry import find_rows
from transformer.parallel.mesh import make_mesh
from transformer.runs.saved import Loaded, load
from transformer.storage import expand, explained, is_local, writing_whole
from transformer.terminal import make_console, printable
from transformer.validation import require

Write = Callable[[str, dict[str, Any]], None]
"""Writes a row; its location is for messages."""
Row = tuple[str, dict[str, Any]]
"""The location of a row, for messages, and the row."""


def check_files(options: RowOptions, what: str) -> None:
    """Raise UserError if there is no input, or if the output cannot be a new file; called before a model is loaded."""
    require_new(options.output)
    require(
        not _is_piped(options) or (sys.stdin is not None and not sys.stdin.isatty()),
        f"There must be something to {what}, got no INPUT and nothing piped in; give a file.",
    )


def load_on_all_devices(options: RowOptions) -> tuple[Loaded, int]:
    """The model, replicated on all devices of this process, and the batch size of all devices together."""
    devices = jax.local_devices()
    mesh = make_mesh(len(devices), devices)
    run = load(options.workdir, step=options.step, base=options.base, weights=options.weights, mesh=mesh)
    size = options.batch_size or run.config.data.batch_size
    return run, size if options.batch_size else -(-size // len(devices)) * len(devices)


def read_rows(options: RowOptions, keys: tuple[str, ...], what: str) -> tuple[str, list[Row]]:
    """The name of the input, for messages, and all of its rows; a bad row is an error before anything is computed."""
    name = f"{STANDARD_INPUT}.{options.format}" if _is_piped(options) else str(options.input)
    rows = list(find_rows(name, keys, "texts"))
    named = "standard input" if _is_piped(options) else name
    require(len(rows) > 0, f"There must be something to {what}, {named} has no texts.")
    return named, rows


def write_rows(rows: Sequence[Row], found: Iterable[dict[str, Any]], output: str, doing: str) -> None:
    """Write each row with its new columns as soon as they are ready."""
    console = make_console()
    # No progress bar on a terminal that shows the rows.
    hidden = not console.is_terminal or (output == "" and sys.stdout.isatty())
    progress = Progress(console=console, disable=hidden, transient=True, redirect_stdout=False, redirect_stderr=False)
    with progress as bar, _writer(output, len(rows)) as write:
        for (location, row), columns in zip(rows, bar.track(found, len(rows), description=doing), strict=True):
            taken = [column for column in columns if column in row]
            require(
                not taken,
                f"Results must have columns of their own, {location} has {', '.join(map(repr, taken))} already; rename them.",
            )
            write(location, row | columns)


def _is_piped(options: RowOptions) -> bool:
    return options.input in (None, "-")


def require_new(output: str, flag: str = "--output") -> None:
    """Raise UserError if the output file of a flag exists, or the folder that it is in does not."""
    if output == "":
        return
    path = epath.Path(expand(output))
    require(
        not is_local(path) or path.parent.is_dir(),
        f"{flag} must be in an existing folder, {path.parent} is none; make it first.",
    )
    require(not path.exists(), f"{flag} must be a new file, {output} exists; choose another name, or remove it.")


@contextmanager
def _writer(output: str, count: int) -> Iterator[Write]:
    """A writer of so many rows to standard output, or to a file that appears once all rows are written."""
    if output == "":
        yield lambda location, row: _print(json.dumps(row))
        return
    with explained(output), writing_whole(expand(output)) as file:
        if output.endswith(".npy"):
            yield _array_writer(file, count)
        else:
            yield _csv_writer(file, output) if output.endswith(".csv") else lambda location, row: _put(file, row)
        require_new(output)


def _print(line: str) -> None:
    sys.stdout.write((printable(line) if sys.stdout.isatty() else line) + "\n")
    sys.stdout.flush()


def _put(file: Any, row: dict[str, Any]) -> None:
    file.write(f"{json.dumps(row)}\n".encode())


def _csv_writer(file: Any, output: str) -> Write:
    """A writer of CSV with the columns of the first row; values other than text are JSON, None is empty."""
    columns: list[str] = []

    def write(location: str, row: dict[str, Any]) -> None:
        line = io.StringIO()
        table = csv.writer(line, lineterminator="\n")
        if not columns:
            columns.extend(row)
            table.writerow(columns)
        require(
            set(row) == set(columns),
            f"The rows of {output} must have the same columns, {', '.join(columns)}, {location} gives {', '.join(row)}; write "
            ".jsonl instead.",
        )
        values = [row[column] for column in columns]
        table.writerow(["" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values])
        file.write(line.getvalue().encode("utf-8", "replace"))

    return write


def _array_writer(file: Any, count: int) -> Write:
    """A writer of so many rows' `embedding` as one array in NumPy's format."""
    begun: list[bool] = []

    def write(location: str, row: dict[str, Any]) -> None:
        del location
        vector_D = row["embedding"]
        if not begun:
            begun.append(True)
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, len(vector_D))}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(vector_D.astype("<f4").tobytes())

    return write
