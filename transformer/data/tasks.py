"""Tasks for any machine, each possibly run more than once: their execution, their errors, and their results in files."""

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath

from transformer.data.shards import UNFINISHED
from transformer.types import UserError

Run = Callable[[str, Callable[[Any], None], Sequence[Any]], None]
"""Runs tasks. Its arguments are a description for messages, a function, and the items to call it with, in any order. A call may
be repeated or run twice at the same time. Function and items can be pickled. Raises `Unfinished` if a call fails for good."""

_PART_BYTES = 32 << 20  # of files per task, unless a single file is larger


class Unfinished(UserError):
    """Some tasks are not done; the finished tasks need not be repeated."""


def by_size(files: Iterable[epath.Path]) -> list[list[str]]:
    """Files, in order, grouped into one list per task."""
    groups, size = list[list[str]](), _PART_BYTES
    for path in files:
        length = path.stat().length
        if size + length > _PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(os.fspath(path))
        size += length
    return groups


def run_tasks(run: Run, what: str, task: Callable[[Any], None], items: Sequence[Any], folder: epath.Path) -> None:
    """Call `task` with each of the items.

    Args:
        run: runs the calls.
        what: a description of the tasks, for messages.
        task: the function to call.
        items: its arguments.
        folder: a folder that all machines can access.

    Raises:
        UserError: a call raised it; calls that had not begun by then are skipped.
        Unfinished: some tasks were not done for another reason.
    """
    _failures(folder)  # removes the errors of an earlier run
    if len(items) > 0:
        try:
            run(what, _Guarded(task, os.fspath(folder)), items)
        finally:
            failures = _failures(folder)
            if failures:
                raise UserError(failures[0])


def publish(path: epath.Path, content: bytes) -> None:
    """Write a complete file; several machines may do so at the same time with equal content."""
    aside = path.parent / f"{path.name}-{uuid.uuid4().hex[:8]}{UNFINISHED}"
    aside.write_bytes(content)
    aside.replace(path)


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """A task whose `UserError` reaches the user: runners would retry it, and report a traceback."""

    task: Callable[[Any], None]
    folder: str

    def __call__(self, item: Any) -> None:
        folder = epath.Path(self.folder)
        if any(folder.glob("failed-*")):
            return
        try:
            self.task(item)
        except UserError as error:
            (folder / f"failed-{uuid.uuid4().hex[:8]}").write_text(str(error))


def remove(folder: epath.Path) -> None:
    """Remove the intermediate results of tasks."""
    with contextlib.suppress(OSError):
        folder.rmtree()


def _failures(folder: epath.Path) -> list[str]:
    """Read and remove the errors of tasks."""
    failures = []
    for path in sorted(folder.glob("failed-*")):
        failures.append(path.read_text())
        with contextlib.suppress(OSError):
            path.unlink()
    return sorted(failures)
