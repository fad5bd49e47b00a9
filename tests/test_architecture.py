"""The stairs of docs/architecture.md: imports point down, files stay small and say what they are."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "transformer").rglob("*.py"))
STAIRS = [
    {
        "types",
        "validation",
        "kinds",
        "model_kinds",
        "objective",
        "optimizer",
        "model_config",
        "parallel_config",
        "config",
        "config_io",
        "overrides",
        "storage",
        "tokenizer",
        "terminal",
        "memory",
    },
    {"ops", "parallel", "evaluation"},
    {"layers"},
    {"models"},
    {"generation", "data", "interop", "analysis"},
    {"objectives", "optimizers", "schedules"},
    {"training"},
    {"tasks"},
    {"steps"},
    {"runs"},
    {"planning"},
    {"cli"},
    {"__main__"},
]
LEVEL = {package: level for level, packages in enumerate(STAIRS) for package in packages}
# One import inside a function: the heavy `load` of the top-level package.
LAZY = {"transformer/training/progress.py": {"IPython.display"}}


def imports(path):
    """Every module a file imports, with whether the import stands inside a function."""
    tree = ast.parse(path.read_text())
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"transformer.{alias.name}" for alias in node.names] if module == "transformer" else [module]
            yield from ((name, id(node) in inner) for name in names)


def package(module):
    return module.split(".")[1] if module.count(".") else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_keeps_to_its_stair(path):
    name = str(path.relative_to(ROOT))
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{name} does not say what it is"
    assert len(path.read_text().splitlines()) <= 400, f"{name} is too long"
    here = package(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module, inside in imports(path):
        assert not module.startswith("."), f"{name} imports {module} relatively"
        assert not inside or module in LAZY.get(name, set()), f"{name} imports {module} inside a function"
        if module.split(".")[0] == "transformer" and here != "__init__":
            there = package(module)
            assert there == here or (LEVEL[there] < LEVEL[here] or LEVEL[there] == LEVEL[here] == 0), (
                f"{name} (stair {LEVEL[here]}) imports {module} (stair {LEVEL[there]})"
            )


def test_package_is_small():
    assert sum(len(p.read_text().splitlines()) for p in FILES) < 21_700


RUNS_CODE = {"importlib", "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy", "code"}
# A config file is a program of the user's own; a command and a kind are imported by names of our own tables; a plugin is only
# looked for.
MAY_RUN_CODE = {
    "transformer/__init__.py",
    "transformer/cli/arguments.py",
    "transformer/cli/main.py",
    "transformer/kinds.py",
    "transformer/ops/cudnn.py",
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path):
    """Run directories, datasets and weights are data: no unpickling, no evaluation, no import by a name that was read."""
    tree = ast.parse(path.read_text())
    modules = {module.split(".")[0] for module, _ in imports(path)}
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    loads = {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) in ("np.load", "numpy.load")
    }
    found = (modules & RUNS_CODE) | (called & {"eval", "exec", "__import__", "compile"}) | loads
    assert not found or str(path.relative_to(ROOT)) in MAY_RUN_CODE, f"{path} uses {', '.join(found)}"


def test_loop_is_short():
    tree = ast.parse((ROOT / "transformer/training/loop.py").read_text())
    (loop,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"]
    assert loop.end_lineno - loop.lineno < 150


@pytest.mark.parametrize(
    ("text", "module"),
    [("import a.b", "a.b"), ("from a import b", "a"), ("def f():\n from . import x", ".")],
)
def test_imports_are_seen(tmp_path, text, module):
    (tmp_path / "m.py").write_text(text)
    assert [m for m, _ in imports(tmp_path / "m.py")] == [module]
