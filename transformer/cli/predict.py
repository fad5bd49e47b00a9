"""`transformer predict RUN INPUT`: the class, translation or continuation of each text of a file or of standard input."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath
from rich.progress import Progress

from transformer.cli.reading import Given
from transformer.cli.using import PredictOptions
from transformer.data.files import STANDARD_INPUT
from transformer.data.forms.examples import text_field
from transformer.data.registry import find_source
from transformer.runs.saved import load
from transformer.storage import expand, explained, writing_whole
from transformer.terminal import make_console, printable, say
from transformer.training.hardware import use_compilation_cache
from transformer.training.out_of_memory import explained as out_of_memory_explained
from transformer.validation import require

_ASKED = ("batch_size", "top_k", "max_new_tokens", "beams", "length_penalty", "num_best")
"""Options of `predict` that are arguments of an objective's."""
Write = Callable[[str, dict[str, Any]], None]
"""Writes a row, whose place is for messages."""


@out_of_memory_explained(what="Predicting")
def main(options: PredictOptions, given: Given) -> None:
    """Read all rows, so that a bad one is told first; then predict, and write each as it comes."""
    use_compilation_cache()
    _require_new(options.output)
    piped = options.input in (None, "-")
    require(
        not piped or (sys.stdin is not None and not sys.stdin.isatty()),
        "There must be something to predict from, got no INPUT and nothing piped in; give a file.",
    )
    run = load(options.workdir, step=options.step, base=options.base)
    key = options.text_key or getattr(run.config.data, run.config.objective.predicts_from)
    name = f"{STANDARD_INPUT}.{options.format}" if piped else str(options.input)
    rows = list(find_source(name).rows(name, (key,), "texts"))
    texts = [text_field(row, key, place) for place, row in rows]
    require(len(texts) > 0, f"There must be something to predict from, {name} has no texts.")
    asked = {option: given[option] for option in _ASKED if option in given}
    if not asked.get("max_new_tokens", 1):
        del asked["max_new_tokens"]  # the kind's own
    predictions = run.predictions(texts, names=[place for place, _ in rows], **asked)
    console = make_console()
    # A bar and rows do not share a terminal.
    hidden = not console.is_terminal or (options.output == "" and sys.stdout.isatty())
    progress = Progress(console=console, disable=hidden, transient=True, redirect_stdout=False, redirect_stderr=False)
    with progress as bar, _writer(options.output) as write:
        for (place, row), found in zip(rows, bar.track(predictions, len(rows), description="predicting"), strict=True):
            taken = [column for column in found if column in row]
            require(
                not taken,
                f"Predictions must have columns of their own, {place} has {', '.join(map(repr, taken))} already; rename that.",
            )
            write(place, row | found)
    say(console, f"{len(rows):,} texts of {name} predicted with {options.workdir}")


def _require_new(output: str) -> None:
    require(
        output == "" or not epath.Path(expand(output)).exists(),
        f"--output must be a new file, {output} exists; choose another name, or remove it.",
    )


@contextmanager
def _writer(output: str) -> Iterator[Write]:
    """What writes rows to a file, which is there once all of them are, or to standard output."""
    if output == "":
        yield lambda place, row: _print(json.dumps(row))
        return
    with explained(output), writing_whole(expand(output)) as file:
        yield _csv_writer(file, output) if output.endswith(".csv") else lambda place, row: _put(file, row)
        _require_new(output)


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
