"""Tasks that any machine may do, each perhaps more than once: where they run, how they fail, what they leave in files."""

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
"""Runs tasks: it is given what they do, for messages, a function, and what this is to be called with, in any order, perhaps more
than once or at the same time. Both can be pickled. It raises `Unfinished` where a call has failed for good."""

_PART_BYTES = 32 << 20  # of files that one task reads, unless a single file is larger


class Unfinished(UserError):
    """Not all tasks have been done; those that have need not be done again."""


def by_size(files: Iterable[epath.Path]) -> list[list[str]]:
    """Files, in their order, in groups for one task each."""
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
        run: where.
        what: the tasks do, for messages.
        task: is called.
        items: that it is called with.
        folder: that all machines reach.

    Raises:
        UserError: one of the calls has raised it; calls that have not begun by then do nothing.
        Unfinished: otherwise, if not all tasks have been done.
    """
    _failures(folder)  # of a run before
    if len(items) > 0:
        try:
            run(what, _Guarded(task, os.fspath(folder)), items)
        finally:
            failures = _failures(folder)
            if failures:
                raise UserError(failures[0])


def publish(path: epath.Path, content: bytes) -> None:
    """Write a file whole, which several machines may do at the same time; the content is the same then."""
    aside = path.parent / f"{path.name}-{uuid.uuid4().hex[:8]}{UNFINISHED}"
    aside.write_bytes(content)
    aside.replace(path)


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """A task whose `UserError` reaches the user: runners would try again, and hand back a traceback."""

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
    """Remove what tasks have left for each other."""
    with contextlib.suppress(OSError):
        folder.rmtree()


def _failures(folder: epath.Path) -> list[str]:
    """The errors of tasks, which are forgotten thereby."""
    failures = []
    for path in sorted(folder.glob("failed-*")):
        failures.append(path.read_text())
        with contextlib.suppress(OSError):
            path.unlink()
    return sorted(failures)
