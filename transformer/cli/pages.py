"""Writes HTML pages for commands."""

from collections.abc import Callable

from etils import epath

from transformer.cli.rows import require_new
from transformer.runs.attention import attention_page
from transformer.runs.directory import METRICS_FILE
from transformer.runs.report import report_page
from transformer.runs.saved import load
from transformer.storage import expand, explained, write_whole
from transformer.terminal import make_console, say


def new_page(output: str) -> epath.Path:
    """The path of a new page; checked before anything is read or computed.

    Raises:
        UserError: the folder does not exist, or the file exists.
    """
    require_new(output)
    return epath.Path(expand(output))


def write_page(path: epath.Path, page: str) -> None:
    """Write a page, completely or not at all, and report it."""
    with explained(f"{path}"):
        write_whole(path, page)
    megabytes = len(page.encode()) / 1e6
    size = f"{megabytes:.1f} MB" if megabytes >= 0.1 else f"{1000 * megabytes:.0f} kB"
    say(make_console(), f"{path} written, {size}; open it in a browser")


def write_run_pages(workdir: str, text: str) -> None:
    """Write both pages of a run into its directory, and report their paths; a failure is a note, not an error.

    A page newer than the metrics is not written again.
    """
    say(make_console(), "pages to look at:")
    folder = epath.Path(workdir)
    pages: dict[str, Callable[[], str]] = {
        "attention.html": lambda: attention_page(load(workdir), text, name=folder.name),
        "report.html": lambda: report_page([workdir]),
    }
    for name, make in pages.items():
        path = folder / name
        try:
            if not path.exists() or path.stat().mtime < (folder / METRICS_FILE).stat().mtime:
                with explained(f"{path}"):
                    write_whole(path, make())
            say(make_console(), f"  {path}")
        except Exception as error:
            say(
                make_console(),
                f"  {path} is not written, the run is complete without it: {error or type(error).__name__}",
            )
