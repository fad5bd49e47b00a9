"""A page of its own: one HTML file with its style, its script and its data, which loads nothing from anywhere."""

import html
import json
import pathlib
from typing import Any

_PARTS = pathlib.Path(__file__).parent / "page"


def assemble(page: str, data: Any, *, kicker: str, heading: str, about: str, foot: str) -> str:
    """The text of a page.

    Args:
        page: which one: the name of its body, style and script in `page/`; `page.*` there is what all share.
        data: plain values for the script. NaN and infinity have no place in JSON and are refused.
        kicker: says what kind of page it is.
        heading: names what is shown.
        about: says more of it.
        foot: the sentences at the end.
    """
    # In a script element, only "<" could end it.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": f"{html.escape(kicker)}: {html.escape(heading)}",
        "kicker": html.escape(kicker),
        "heading": html.escape(heading),
        "about": html.escape(about),
        "foot": html.escape(foot),
        "style": _read("page.css") + _read(f"{page}.css"),
        "body": _read(f"{page}.html"),
        "script": _read("page.js") + _read(f"{page}.js"),
        "data": text,
    }
    before, *rest = _read("page.html").split("{{")
    return before + "".join(parts[name] + after for name, _, after in (piece.partition("}}") for piece in rest))


def _read(name: str) -> str:
    return (_PARTS / name).read_text("utf-8")
