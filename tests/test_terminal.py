"""Foreign text is shown, never obeyed."""

import io
import sys
import unicodedata

import pytest
from rich.console import Console

from transformer.terminal import printable, say


def test_text_without_commands_is_kept():
    text = "Ünïcødé, 漢字, عربى, नमस्ते, 👩\u200d🔬, [bold]not markup[/bold], :heart: \\x1b"
    assert printable(text) == text
    assert printable("a\n\tb", lines=True) == "a\n\tb"


def test_nothing_that_a_terminal_obeys_is_left():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    for lines in (False, True):
        left = {unicodedata.category(char) for char in printable(every, lines=lines) if char not in "\n\t\u200c\u200d"}
        assert not left & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    printable(every).encode()  # lone surrogates would be an error


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\rb", r"a\rb"),
        ("\x9b2J\x85", r"\x9b2J\x85"),  # C1
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),  # the direction of writing
        ("a\nb\u2028c", r"a\nb\u2028c"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_is_obeyed_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("markup", [False, True])
def test_say_reads_no_markup_on_any_console(markup):
    console = Console(file=io.StringIO(), markup=markup, width=20)
    say(console, "class [/bold] :heart: \x1b[31m and a long line that a file does not wrap")
    assert console.file.getvalue() == "class [/bold] :heart: \\x1b[31m and a long line that a file does not wrap\n"
