"""What SECURITY.md promises is held by tests that exist."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def test_each_promise_names_tests_that_exist():
    table = (ROOT / "SECURITY.md").read_text().partition("## Tests of each promise")[2].partition("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 8
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test holds: {row}"
        for path, test in named:
            tree = ast.parse((ROOT / path).read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{test}"


def test_paths_named_in_the_text_exist():
    text = (ROOT / "SECURITY.md").read_text()
    for path in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (ROOT / path).exists(), path
