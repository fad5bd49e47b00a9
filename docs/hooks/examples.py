"""Griffe: examples in docstrings are sections that it knows, and doctests are code, not quotations."""

import re

import griffe

_DOCTEST = re.compile(r"^>>> .*?(?=^\s*$|\Z)", re.MULTILINE | re.DOTALL)
_EXAMPLE = re.compile(r"^Example(?:, (.+))?:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Changes the docstring of each object once it is loaded."""

    def on_object(self, *, obj, **_):
        """Name the sections of examples as griffe does, and fence other doctests."""
        if obj.docstring:
            text = _EXAMPLE.sub(
                lambda found: "Examples:" + (f"\n    {found[1]}:\n" if found[1] else ""), obj.docstring.value
            )
            obj.docstring.value = _DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
