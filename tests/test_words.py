"""The prose of pages, docstrings, comments and messages: no home words, and no sentence of more than 35 words."""

import ast
import inspect
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MOST_WORDS = 35


# Words of this project's early prose, and the words of the field for them.
HOME_WORDS = {
    r"places": "positions, indices",
    r"deals?|dealt": "assign, distribute, reduce-scatter",
    r"spreads?|spreading": "shard, distribute",
    r"told": "given, passed",
    r"exchanges?|exchanged": "communication, all-to-all, collective",
    r"the rest": "the remaining ...",
    r"what asks": "the queries",
    r"those of|that of": "name the noun again",
    r"of which those": "name the noun again",
    r"one's own": "user-defined, your own",
    r"is asked for|are asked for|was asked for|were asked for": "requested",
    r"rooms|stairs": "packages, levels",
    r"the way round|by way of": "order, through",
    r"as many as there": "equally many",
}
HOME = re.compile(r"\b(?:" + "|".join(HOME_WORDS) + r")\b", re.IGNORECASE)

_ABBREVIATION = re.compile(r"\b(?:et al|e\.g|i\.e|eq|cf|vs|etc|sec|fig|[A-Z])\.$")
_END = re.compile(r"[.!?][\"')\]*]*(?=\s+[\"'(\[*]*[A-Z0-9`])")


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    path for folder in ("transformer", "benchmarks", "configs") for path in sorted((ROOT / folder).rglob("*.py"))
]


def without_code(text):
    """Text whose code, links and addresses are a word each."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"``.*?``|`[^`]*`", "CODE", text, flags=re.DOTALL)
    return re.sub(r"https?://\S+", "ADDRESS", text)


def sentences(paragraph):
    """The sentences of a paragraph without code."""
    text, start = " ".join(paragraph.split()), 0
    for end in _END.finditer(text):
        if not _ABBREVIATION.search(text[start : end.start() + 1]):
            yield text[start : end.end()]
            start = end.end()
    yield text[start:]


def count_words(sentence):
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def long_sentences(paragraphs):
    return [s.strip() for p in paragraphs for s in sentences(without_code(p)) if count_words(s) > MOST_WORDS]


def paragraphs_of_page(text):
    """Paragraphs and list items of Markdown, without fenced code, tables and headings."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    kept = [[]]
    for line in text.splitlines():
        if not line.strip() or re.match(r"\s*(\||#)", line):
            kept.append([])
            continue
        if re.match(r"\s*([*+-]|\d+\.) ", line):
            kept.append([])
        kept[-1].append(re.sub(r"^\s*([*+-]|\d+\.) ", "", line))
    return ["\n".join(lines) for lines in kept if lines]


def paragraphs_of_docstring(text):
    """Paragraphs, list items and arguments of a docstring, without examples, pictures and tables."""
    text = re.sub(r"^ *>>> .*?(?=^\s*$|\Z)", "", inspect.cleandoc(text), flags=re.MULTILINE | re.DOTALL)
    kept = [[]]
    for line in text.splitlines():
        if not line.strip() or not re.search(r"[A-Za-z]", line) or re.search(r"\S {2,}\S", line):
            kept.append([])
            continue
        if re.match(r"\s*[*-] |\s+[*\w]+: |\w+:$", line):
            kept.append([])
        kept[-1].append(line)
    return ["\n".join(lines) for lines in kept if lines]


def docstrings(tree):
    """Docstrings, and the texts below fields, which are the help of the command line."""
    for node in ast.walk(tree):
        for child in getattr(node, "body", ()) if isinstance(getattr(node, "body", None), list) else ():
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                yield child.lineno, child.value.value


def prose(source):
    """All prose of a module: comments, docstrings, and texts with a space in them, such as messages."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_has_no_home_words(path):
    text = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = [line for line in without_code(text).splitlines() if HOME.search(line)]  # tables and headings too
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_has_short_sentences(path):
    found = long_sentences(paragraphs_of_page(path.read_text()))
    assert not found, "\n".join(found)


def test_modules_have_no_home_words():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for path in MODULES
        for line, text in prose(path.read_text())
        for match in HOME.finditer(without_code(text))
    ]
    assert not found, "\n".join(found)


def test_docstrings_and_help_have_short_sentences():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {sentence}"
        for path in MODULES
        for line, text in docstrings(ast.parse(path.read_text()))
        for sentence in long_sentences(paragraphs_of_docstring(text))
    ]
    assert not found, "\n".join(found)


def test_sentences_are_counted():
    page = "# Heading\n\nOne `a b c` two. See Su et al. 2021, three [four](five six).\n\n| a | table |\n\n* five\n  six.\n* seven"
    found = [without_code(p) for p in paragraphs_of_page(page)]
    assert [[count_words(s) for s in sentences(p)] for p in found] == [[3, 7], [2], [1]]
    text = "First. Second one.\n\nArgs:\n    x: a b c\n        d.\n    y: e.\n\n>>> 1 + 1\n2\n\n    0 1\n    1 1\n"
    assert [p.split() for p in paragraphs_of_docstring(text)] == [
        ["First.", "Second", "one."],
        ["Args:"],
        ["x:", "a", "b", "c", "d."],
        ["y:", "e."],
    ]
    assert long_sentences(["word " * 36 + "."]) and not long_sentences(
        ["word " * 35 + ".", "word " * 30 + ". Word " * 20]
    )
    assert HOME.search("It is told so.") and not HOME.search(without_code("`told`"))
