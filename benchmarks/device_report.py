"""Stores the results of `benchmarks/device.py`, one JSON line each, with lines for parts that fail or do not fit."""

import json
import pathlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

RESULTS = "results.jsonl"


class Skip(Exception):
    """A part has no result here; the message has the reason, such as a missing package or another platform."""


class Report:
    """Writes the lines of one section.

    Args:
        folder: the folder of the results.
        section: name of the section.
        deadline: value of `time.time()` after which no part starts.
        tiny: whether everything is small enough for a CPU; such results do not replace others.
        card: the device's name; results of another device are measured again.
        again: measure results again that exist.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        section: str,
        deadline: float,
        *,
        tiny: bool = False,
        card: str = "",
        again: bool = False,
    ) -> None:
        self.folder, self.tiny, self.deadline = folder, tiny, deadline
        self._section, self._card, self._start = section, card, time.time()
        self._done = {} if again else {line["part"]: line for line in self.lines(section)}

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def lines(self, section: str) -> Iterator[dict[str, Any]]:
        """Results of a section on this device and of this size, in order."""
        for line in read_lines(self.folder):
            fits = line.get("tiny", False) == self.tiny and line.get("card", "") == self._card
            if line["section"] == section and fits and not {"error", "skipped"} & line.keys():
                yield line

    def emit(self, part: str, **fields: Any) -> dict[str, Any]:
        """Write a line."""
        line: dict[str, Any] = {"section": self._section, "part": part}
        line |= {"card": self._card} if self._card else {}
        line |= {"tiny": True} if self.tiny else {}
        line |= {"at": round(time.time() - self._start, 1), **fields}
        text = json.dumps(line, default=str)
        print(text, flush=True)
        with open(self.folder / RESULTS, "a") as file:
            file.write(text + "\n")
        return line

    def is_due(self, part: str, *, needs: float = 0.0, **fields: Any) -> bool:
        """Whether a part has no result yet and fits in the remaining time; a line reports a part that does not fit.

        Args:
            part: its name.
            needs: seconds that it takes on a card; tiny parts always fit before the deadline.
            fields: of that line.
        """
        if part in self._done:
            return False
        needs = 0.0 if self.tiny else needs
        if self.left <= needs:
            self.emit(part, **fields, skipped=f"{max(0.0, self.left):.0f} s left, needs {needs:.0f} s")
            return False
        return True

    def run(
        self, part: str, work: Callable[[], dict[str, Any]], *, needs: float = 0.0, **fields: Any
    ) -> dict[str, Any] | None:
        """Run a part and write its result; returns its line, also from an earlier run, else None.

        Args:
            part: its name, which no other part of the section has.
            work: gives the fields of the line; what it raises is a line too.
            needs: seconds that it takes on a card.
            fields: of the line, whatever becomes of the part.
        """
        if not self.is_due(part, needs=needs, **fields):
            return self._done.get(part)
        try:
            found = work()
        except Skip as reason:
            self.emit(part, **fields, skipped=str(reason))
        except Exception as error:
            self.emit(part, **fields, error=describe(error))
        else:
            self._done[part] = self.emit(part, **fields, **found)
        return self._done.get(part)


def read_lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All lines of earlier runs, except an incomplete line after a kill."""
    path, lines = folder / RESULTS, []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"section", "part"} <= line.keys():
            lines.append(line)
    return lines


def describe(error: BaseException) -> dict[str, Any]:
    """Type, message and location of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{pathlib.Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-6:]]
    return {"type": type(error).__name__, "message": str(error)[:800], "where": where}


def seconds_of(call: Callable[[], Any], *, calls: int, rounds: int = 3) -> tuple[float, list[float]]:
    """Median over rounds of the seconds of a call, and each round's; `calls` are started before the last is waited for.

    Args:
        call: starts the work, and returns a function that waits for it.
        calls: of a round.
        rounds: after one that is not counted.
    """
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        waits = [call() for _ in range(calls)]
        waits[-1]()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[1:]), times[1:]


def note(text: str) -> None:
    """Print progress; not a result."""
    print(text, file=sys.stderr, flush=True)
