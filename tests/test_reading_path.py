"""The reading path of docs/architecture.md is short, and holds most of what a small model executes."""

import ast
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tokenize

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "transformer"
MOST_LINES = 3000
LEAST_SHARE = 0.8
NOT_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def reading_path():
    """The files of the page's table, in order."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    (section,) = re.findall(r"^## Reading path\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return [name for row in re.findall(r"^\|[^|]*\|([^|]*)\|", section, re.M) for name in re.findall(r"`(.*?)`", row)]


def lines_of_code(path):
    """The numbers of lines that are neither empty, nor a comment, nor a part of a docstring."""
    source, found = path.read_text(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.difference_update(range(node.lineno, node.end_lineno + 1))
    return found


def test_lines_of_code(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""A\ndocstring."""\n\n# A comment.\ndef f():\n    """Another."""\n    return """a\nb"""  # one\n')
    assert lines_of_code(path) == {5, 7, 8}


def test_the_path_is_short_and_holds_most_of_what_a_small_model_executes(tmp_path):
    names = reading_path()
    assert len(names) == len(set(names)) and "layers/attention.py" in names and "training/loop.py" in names
    size = sum(len(lines_of_code(PACKAGE / name)) for name in names)
    assert size <= MOST_LINES, f"the reading path has {size} lines of code"
    program = ROOT / "tests" / "shared" / "executed_lines.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    ran = subprocess.run([sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, check=True)
    executed = {name: len(lines) for name, lines in json.loads(ran.stdout).items()}
    share = sum(executed.get(name, 0) for name in names) / sum(executed.values())
    assert share >= LEAST_SHARE, f"{share:.1%} of the lines executed lie on the reading path of {size} lines of code"
