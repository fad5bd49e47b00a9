"""A line at the bottom of a terminal, or in a notebook cell, that is redrawn in place."""

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.segment import ControlType, Segment
from rich.text import Text

_ERASE_DOWN = "\r\x1b[J"


class _Code(Control):
    """A terminal control code; rich has none that erases everything below the cursor."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.segment = Segment(code, None, [(ControlType.CARRIAGE_RETURN,)])


class _Fitted:
    """A line that is fitted to the console's width when it is drawn."""

    def __init__(self, draw: Callable[[int], Text]) -> None:
        self.draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        # One column stays free: a line in the last column would move the cursor on some terminals.
        line = self.draw(max(1, console.width - 1))
        line.no_wrap, line.overflow, line.end = True, "crop", ""
        yield line


class FootLine(RenderHook):
    """A line that stays below all other output of its console.

    The cursor rests in the line's first column. When a terminal is made narrower, it breaks the line, and the cursor stays at
    the start. Erasing from there downwards removes every part; moving up by a number of lines would not.

    Args:
        console: a console on a terminal or in a notebook.
        draw: returns the line for a number of columns.
    """

    def __init__(self, console: Console, draw: Callable[[int], Text]) -> None:
        self._console, self._line, self._drawn = console, _Fitted(draw), False
        self._cell: Any = None

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """The output of the console, after erasing the line and before drawing it again."""
        return [_Code(_ERASE_DOWN), *renderables, self._line, _Code("\r")]  # pyright: ignore[reportReturnType]

    def draw(self) -> None:
        """Draw or redraw the line."""
        if self._console.is_jupyter:
            self._draw_in_notebook()
            return
        if not self._drawn:
            self._console.push_render_hook(self)
        self._drawn = True
        self._console.print(Control())

    def close(self) -> None:
        """Leave the line as it is, and move to the next line."""
        if self._drawn:
            self._console.pop_render_hook()
            self._console.print(_Code(_ERASE_DOWN), self._line, Text())
            self._drawn = False

    def _draw_in_notebook(self) -> None:
        """One output that is updated; needs no widgets."""
        import IPython.display  # noqa: PLC0415 (exists only in a notebook) # pyright: ignore[reportMissingImports]

        (line,) = self._line.__rich_console__(self._console, self._console.options)
        content = {"text/plain": str(line)}
        if self._cell is None:
            self._cell = IPython.display.display(content, raw=True, display_id=True)
        else:
            self._cell.update(content, raw=True)
