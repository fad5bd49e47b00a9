"""Assembles a page: one HTML file with its style, script and data, without links to other files."""

import html
import json
import pathlib

_PARTS = pathlib.Path(__file__).parent / "page"


def assemble(page: str, data: object, *, kicker: str, heading: str, about: str, foot: str) -> str:
    """The HTML text of a page.

    Args:
        page: name of the body, style and script in the folder `page/`; all pages share `page.*` there.
        data: plain values for the script. NaN and infinity are refused, since JSON has no such numbers.
        kicker: the kind of page, a line above the heading.
        heading: the heading.
        about: a line below the heading.
        foot: sentences at the end of the page.
    """
    # Only "<" can end a script element.
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
