"""Every relative link of the pages leads to a file of the repository, and every anchor to a heading."""

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def without_code(text):
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)
    return re.sub(r"``.*?``|`[^`\n]*`", "", text)


def links(text):
    """The targets of links and images that are no addresses."""
    found = re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s+(\S+)", without_code(text), re.M)
    return [target for both in found for target in both if target and not re.match(r"\w+:", target)]


@functools.cache
def anchors(path):
    """The names of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(), flags=re.M | re.S)
    found = {}
    for title in re.findall(r"^#+ +(.+?)\s*#*$", text, re.M):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if not n else f"{name}-{n}" for name, count in found.items() for n in range(count + 1)}


def broken(path, text):
    for target in links(text):
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if not there.is_relative_to(ROOT) or not there.exists():
            yield f"{path.name}: {target} leads to nothing"
        elif anchor and (there.suffix != ".md" or anchor not in anchors(there)):
            yield f"{path.name}: {target} names no heading of {there.name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_and_anchors_lead_somewhere(path):
    assert not list(broken(path, path.read_text()))


def test_broken_links_are_seen():
    page = ROOT / "docs" / "linen.md"
    fine = (
        "[a](glossary.md#terms) [b](../README.md) ![c](heads.svg) [d](#why-linen) [e](https://x.y/z) `[f](nowhere.md)`"
    )
    assert links(fine) == ["glossary.md#terms", "../README.md", "heads.svg", "#why-linen"]
    assert not list(broken(page, fine.replace("#terms", "")))
    for wrong in ("[a](glosary.md)", "[a](#why-linnen)", "[a](glossary.md#term)", "[a](../../x)", "[a]: nowhere.md"):
        assert len(list(broken(page, wrong))) == 1, wrong
