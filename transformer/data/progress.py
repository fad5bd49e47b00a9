"""A progress bar for long operations, only on a terminal."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import Progress

from transformer.terminal import make_console, printable


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of `total` bytes; yields a function to call with the number of further bytes done."""
    console = make_console()
    hidden = not console.is_terminal
    with Progress(console=console, disable=hidden, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(printable(description), total=total)

        def advance(done: int) -> None:
            bar.update(task, advance=done)

        yield advance
