"""A bar for what takes long, on a terminal only."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import Progress

from transformer.terminal import make_console, printable


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of so many bytes, and what it is told when more are done."""
    console = make_console()
    hidden = not console.is_terminal
    with Progress(console=console, disable=hidden, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(printable(description), total=total)

        def advance(done: int) -> None:
            bar.update(task, advance=done)

        yield advance
