"""What a person reads on a terminal: consoles, and text from elsewhere made safe to show there."""

import unicodedata

from rich.console import Console
from rich.text import Text

# Invisible characters that ordinary text needs: the joiners of Persian, Indic scripts and emoji. They move nothing.
_JOINERS = "\u200c\u200d"
# Control, format (with the overrides of direction), surrogate, line separator, paragraph separator.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str, *, lines: bool = False) -> str:
    r"""`text` with every character that a terminal would obey, or hide, written as a Python escape.

    These are control characters (the escape that starts a terminal's commands, carriage return, C1), characters that reverse
    the direction of writing or have no width (except joiners), separators of lines and paragraphs, and lone surrogates.
    Every text that comes from a file, a model or the command line passes here before a person sees it.

    Rich's markup is another language, in which `[/bold]` is an error: give the result to `say`, to a console of `make_console`,
    or to `rich.text.Text`.

    Args:
        text: from anywhere.
        lines: keep newlines and tabs, for a text of several lines; a label or a name stays on one.

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
    """Leaves it to the command line to end quietly where a reader has gone (`2>&1 | head`)."""

    def on_broken_pipe(self) -> None:
        raise


def make_console(*, stderr: bool = True) -> Console:
    """A console that takes text as it is: no markup, no names of emoji, no colours by pattern."""
    return _Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Print foreign text on any console: made `printable`, markup not read, and not wrapped where it goes to a file."""
    console.print(Text(printable(text, lines=True), style=style), soft_wrap=not console.is_terminal)
