"""Terminal output: consoles, and foreign text made safe to display."""

import unicodedata

from rich.console import Console
from rich.text import Text

# Invisible characters that ordinary text needs: the joiners of Persian, Indic scripts and emoji. They do not move the cursor.
_JOINERS = "\u200c\u200d"
# Control, format (with the overrides of direction), surrogate, line separator, paragraph separator.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str, *, lines: bool = False) -> str:
    r"""`text` with every character that a terminal would interpret or hide written as a Python escape.

    These are control characters (the escape that starts a terminal's commands, carriage return, C1), characters that reverse the
    direction of writing or have no width (except joiners), separators of lines and paragraphs, and lone surrogates. Every text
    from a file, a model or the command line passes through here before it is displayed.

    Rich's markup is separate, and raises an error for `[/bold]`: pass the result to `say`, to a console of `make_console`, or to
    `rich.text.Text`.

    Args:
        text: any text.
        lines: keep newlines and tabs, for a text of several lines; a label or a name must stay on one line.

    Example:
        >>> printable("neg\x1b]0;title\x07")
        'neg\\x1b]0;title\\x07'
    """
    kept = _JOINERS + ("\n\t" if lines else "")
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNSAFE and char not in kept else char
        for char in text
    )


class _Console(Console):
    """Leaves a closed output pipe (`2>&1 | head`) to the command line, which then exits quietly."""

    def on_broken_pipe(self) -> None:
        raise


def make_console(*, stderr: bool = True) -> Console:
    """A console that prints text unchanged: no markup, no emoji names, no automatic colours."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Print foreign text on any console: made `printable`, without markup, and not wrapped in files."""
    console.print(Text(printable(text, lines=True), style=style), soft_wrap=not console.is_terminal)
