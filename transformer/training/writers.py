"""Destinations of metric rows: a file of JSON lines, TensorBoard, the terminal."""

import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

from etils import epath
from rich.console import Console
from rich.text import Text
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import directory_check

from transformer.storage import explained, is_local, write_whole
from transformer.terminal import make_console, say
from transformer.training.progress import FootLine
from transformer.types import UserError

Metrics = Mapping[str, float]
_BAR = 20  # columns


@runtime_checkable
class Writer(Protocol):
    """Receives metric rows; a resumed run first drops the rows after the step from which it resumes."""

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Write one row: metrics measured on `split` at `step`."""
        ...

    def resume(self, step: int) -> None:
        """Drop rows of steps after `step`."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class JsonlWriter:
    """One JSON object per line, `{"step": ..., "split": ..., metric: value, ...}`.

    Values are written with enough digits to read back the same float64.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self._path = epath.Path(path)
        with explained(f"{self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Append a row."""
        row = json.dumps({"step": step, "split": split, **metrics})
        with explained(f"{self._path}"), self._path.open("a") as file:
            file.write(row + "\n")

    def resume(self, step: int) -> None:
        """Drop rows after `step`, and an incomplete last line left by a kill."""
        if not self._path.exists():
            return
        kept = [row for row in read_jsonl(self._path) if row["step"] <= step]
        with explained(f"{self._path}"):
            write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def close(self) -> None:
        """Nothing to close."""


def read_jsonl(path: epath.PathLike) -> list[dict]:
    """The rows of a metrics file, without an incomplete last line.

    Raises:
        UserError: a line other than the last is no row.
    """
    rows = []
    for number, row in jsonl_rows(path):
        if isinstance(row, bytes):
            raise UserError(
                f"{path} must hold one JSON object with a step a line, line {number} is {row[:80].decode(errors='replace')!r}; "
                "put a copy back, or move the file away."
            )
        rows.append(row)
    return rows


def jsonl_rows(path: epath.PathLike) -> Iterator[tuple[int, dict | bytes]]:
    """The lines of a metrics file, numbered from 1: each as its row, or as bytes if it is not a row.

    An incomplete last line is left out.
    """
    with epath.Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            row = json_object(line)
            yield number, row if row is not None and type(row.get("step")) is int else line.removesuffix(b"\n")


def json_object(content: bytes) -> dict | None:
    """The JSON object that a file or a line holds; None if it holds something else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class SamplesWriter:
    """Samples of text: a header `---- step STEP, N bytes`, then the text on its own lines.

    The header has the length, because a text may contain such a line too.
    """

    _HEADER = re.compile(rb"---- step (\d+), (\d+) bytes\n")

    def __init__(self, path: epath.PathLike) -> None:
        self._path = epath.Path(path)

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Metric rows are not written here."""
        del step, split, metrics

    def add(self, step: int, text: str) -> None:
        """Append a sample."""
        content = text.encode("utf-8", "replace")
        with explained(f"{self._path}"), self._path.open("ab") as file:
            file.write(b"---- step %d, %d bytes\n%b\n" % (step, len(content), content))

    @classmethod
    def read(cls, content: bytes) -> Iterator[tuple[int, bytes, int]]:
        """The step, text and end of each sample; an incomplete one left by a kill, and all after it, are left out."""
        end = 0
        while header := cls._HEADER.match(content, end):
            start, end = header.end(), header.end() + int(header[2]) + 1
            if content[end - 1 : end] != b"\n":
                return
            yield int(header[1]), content[start : end - 1], end

    def resume(self, step: int) -> None:
        """Drop samples after `step`, and an incomplete last one left by a kill."""
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        kept = itertools.takewhile(lambda sample: sample[0] <= step, self.read(content))
        end = max((end for _, _, end in kept), default=0)
        if end < len(content):
            with explained(f"{self._path}"):
                write_whole(self._path, content[:end])

    def close(self) -> None:
        """Nothing to close."""


class TensorBoardWriter:
    """Scalars named `split/metric`, in one event file per start.

    Written in the caller's thread: with its own thread, tensorboardX loses events that cannot be written, and then hangs.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        self._directory = str(directory)
        self._writer: EventsWriter | None = None
        self._flushed = -math.inf

    def _add(self, *events: Event) -> None:
        with explained(self._directory):
            if self._writer is None:
                directory_check(self._directory)
                # Two starts within a second have separate files too.
                self._writer = EventsWriter(f"{self._directory}/events", f".{os.getpid()}.{time.time_ns()}")
            for event in events:
                event.wall_time = time.time()
                self._writer.write_event(event)
            # In a bucket, the whole file is uploaded again.
            if is_local(self._directory) or time.monotonic() - self._flushed > 120:
                self._flushed = time.monotonic()
                self._writer.flush()

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """One scalar for each metric."""
        values = [Summary.Value(tag=f"{split}/{name}", simple_value=value) for name, value in metrics.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

    def resume(self, step: int) -> None:
        """Have TensorBoard hide events of earlier starts after `step`."""
        restart = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        begun = step > 0 or epath.Path(self._directory).exists()
        self._add(*[restart] if begun else [])

    def close(self) -> None:
        """Flush."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with explained(self._directory):
                writer.close()


class ConsoleWriter:
    """On a terminal or in a notebook, a line (step, metrics, time left) that training updates; elsewhere one line per row.

    If the line is too narrow, metrics are dropped from the right, and the step and the time left stay.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._console = console or make_console()
        self._steps, self._step, self._parts = steps, 0, list[str]()
        self._left: float | None = None
        self._first: tuple[int, float] | None = None
        in_place = self._console.is_jupyter or (self._console.is_terminal and not self._console.is_dumb_terminal)
        self._foot = FootLine(self._console, self._fitted) if in_place else None

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Show a row: training updates the line, other splits print a permanent one."""
        if split == "train":
            self._step, self._left, self._parts = step, self._seconds_left(step), metric_parts(metrics)
        if self._foot and split == "train":
            self._foot.draw()
            return
        head = f"{self._head(step)}  {split:<10}"
        if self._foot:
            line = _with_parts(head, metric_parts(metrics), self._console.width - 1)
            self._console.print(line, no_wrap=True, overflow="crop")
            return
        left = f"  eta {self._left:.0f} s" if split == "train" and self._left is not None else ""
        say(self._console, f"{head}  {format_metrics(metrics)}{left}")

    def _head(self, step: int) -> str:
        return f"step {step:>{len(str(self._steps))}}/{self._steps}"

    def _fitted(self, columns: int) -> Text:
        """The line for a width: step, metrics as far as they fit, a bar in the free columns, time left."""
        left = "" if self._left is None else f"  {clock(self._left)} left"
        line = _with_parts(self._head(self._step), self._parts, columns - len(left))
        if columns - len(line) - len(left) >= _BAR + 2:
            done, (full, empty) = (
                round(_BAR * self._step / self._steps),
                "━─" if self._console.encoding == "utf-8" else "#-",
            )
            line.append("  ").append(full * done, "green").append(empty * (_BAR - done), "bright_black")
        return line.append(left)

    def _seconds_left(self, step: int) -> float | None:
        """Time left, from the time since the first row (which excludes compilation); None if unknown."""
        now = time.monotonic()
        first_step, first_time = self._first = self._first or (step, now)
        if step == first_step or step == self._steps:
            return None
        return (self._steps - step) * (now - first_time) / (step - first_step)

    def resume(self, step: int) -> None:
        """Start at the resumed step."""
        self._step = step

    def close(self) -> None:
        """Leave the last line in place."""
        if self._foot:
            self._foot.close()


def _with_parts(head: str, parts: list[str], columns: int) -> Text:
    """A line that begins with `head`, and as many of the parts, from the first, as the columns allow."""
    for part in parts:
        if len(head) + 2 + len(part) > columns:
            break
        head += f"  {part}"
    return Text(head)


def clock(seconds: float) -> str:
    """A duration in clock notation.

    Example:
        >>> clock(65), clock(7265)
        ('1:05', '2:01:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_metrics(metrics: Metrics) -> str:
    """The most followed metrics, in a fixed order and a fixed width.

    Example:
        >>> format_metrics({"loss": 1.25, "mfu": 0.5, "unknown": 3.0})
        'loss 1.2500  mfu 50.0%'
    """
    return "  ".join(metric_parts(metrics))


def metric_parts(metrics: Metrics) -> list[str]:
    """The parts of `format_metrics`, the most followed first."""
    parts = []
    for name, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("bits_per_byte", "bpb", "{:.4f}"),
        ("accuracy", "acc", "{:.3f}"),
        ("tokens_per_second", "tok/s", "{:,.0f}"),
        ("mfu", "mfu", "{:.1%}"),
        ("epoch", "epoch", "{:.2f}"),
        ("learning_rate", "lr", "{:.2e}"),
        ("grad_norm", "grad", "{:.2f}"),
        ("loss_scale", "scale", "{:g}"),
    ):
        if name in metrics:
            parts.append(f"{label} {form.format(metrics[name])}")
    return parts
