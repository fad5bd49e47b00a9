"""The levels of docs/architecture.md: imports point down, files stay small and say what they are."""

import ast
import functools
import itertools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "transformer").rglob("*.py"))
LEVELS = [
    {
        "types",
        "validation",
        "kinds",
        "model_kinds",
        "objective",
        "form",
        "optimizer",
        "model_config",
        "parallel_config",
        "adapter_config",
        "config",
        "config_io",
        "overrides",
        "storage",
        "tokenizer",
        "tracker",
        "trained",
        "terminal",
        "memory",
    },
    {"ops", "parallel", "evaluation"},
    {"layers"},
    {"models"},
    {"generation", "data", "interop", "analysis"},
    {"objectives", "optimizers", "schedules"},
    {"training"},
    {"parts"},
    {"runs"},
    {"planning"},
    {"cli"},
    {"__main__"},
]
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
# Imports inside functions: of packages that few runs need.
LAZY = {
    "transformer/training/progress.py": {"IPython.display"},
    "transformer/data/sources/columns.py": {"pyarrow.ipc", "pyarrow.parquet"},
    "transformer/data/tokenizers/auto.py": {"transformer.data.tokenizers"},
    "transformer/training/trackers/wandb.py": {"wandb"},
    "transformer/training/trackers/mlflow.py": {"mlflow.entities", "mlflow.tracking"},
    "transformer/cli/evaluate.py": {"transformer.runs.harness"},
    "transformer/data/beam.py": {"apache_beam", "apache_beam.options.pipeline_options"},
}


def imports(path):
    """Every module a file imports when it runs, with whether the import stands inside a function."""
    tree = ast.parse(path.read_text())
    skipped = set(map(id, for_type_checkers(tree)))
    inner = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"transformer.{alias.name}" for alias in node.names] if module == "transformer" else [module]
            yield from ((name, id(node) in inner) for name in names)


def for_type_checkers(tree):
    """The imports under `if TYPE_CHECKING:`, which do not run; they may name a type of a higher level."""
    blocks = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return [node for block in blocks for node in ast.walk(block)]


def package(module):
    return module.split(".")[1] if module.count(".") else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_keeps_to_its_level(path):
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
                f"{name} (level {LEVEL[here]}) imports {module} (level {LEVEL[there]})"
            )


def test_package_is_small():
    assert sum(len(p.read_text().splitlines()) for p in FILES) < 41_200


RUNS_CODE = {"importlib", "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "runpy", "code"}
# A config file is a program of the user's own; a command and a kind are imported by names of our own tables; a plugin is only
# looked for.
MAY_RUN_CODE = {
    "transformer/__init__.py",
    "transformer/cli/arguments.py",
    "transformer/cli/main.py",
    "transformer/kinds.py",
    "transformer/ops/backends/cudnn.py",
    "transformer/training/trackers/remote.py",
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


# What is left to divide. A list that only falls: take out what no longer stands here.
LONG = {"training/loop.py train"}


def long_functions(node, within=""):
    """Names of the functions of more than 60 lines, with their docstrings and the functions inside."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        name = f"{within}.{child.name}".removeprefix(".") if named else within
        if named and not isinstance(child, ast.ClassDef) and child.end_lineno - child.lineno >= 60:
            yield name
        yield from long_functions(child, name)


def test_functions_are_short():
    found = {
        f"{path.relative_to(ROOT / 'transformer')} {name}"
        for path in FILES
        for name in long_functions(ast.parse(path.read_text()))
    }
    assert found <= LONG, f"longer than 60 lines: {', '.join(sorted(found - LONG))}; name the steps"
    assert found >= LONG, f"short by now: {', '.join(sorted(LONG - found))}; take them out of LONG"


@pytest.mark.parametrize(("lines", "found"), [(60, []), (61, ["A.f"])])
def test_long_functions_are_seen(lines, found):
    body = "class A:\n  def f(self):\n" + "    1\n" * (lines - 1)
    assert list(long_functions(ast.parse(body))) == found


def test_loop_is_short():
    tree = ast.parse((ROOT / "transformer/training/loop.py").read_text())
    (loop,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train"]
    assert loop.end_lineno - loop.lineno < 150


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("import a.b", "a.b"),
        ("from a import b", "a"),
        ("def f():\n from . import x", "."),
        ("if TYPE_CHECKING:\n import b\nimport a", "a"),
    ],
)
def test_imports_are_seen(tmp_path, text, module):
    (tmp_path / "m.py").write_text(text)
    assert [m for m, _ in imports(tmp_path / "m.py")] == [module]


def test_the_table_of_levels_equals_the_checked_one():
    """docs/architecture.md shows the packages in the order in which they import."""
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    shown = [
        {name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`(.+?)`", packages)}
        for _, packages in rows
    ]
    there = [
        {package for package in packages if any(file_of(package).exists() for file_of in PATHS)}
        for packages in LEVELS[:-1]
    ]
    assert shown == there


def picture():
    """The picture of docs/architecture.md: its packages from top to bottom, and the numbered modules of each path."""
    (block,) = re.findall(
        r"^```\n(packages .*?)^```", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE | re.DOTALL
    )
    header, *lines = block.splitlines()
    columns = [header.index(name) for name in ("packages", "a config", "a batch", "a parameter")]
    cells = [
        [line[start:end].strip() for start, end in zip(columns, (*columns[1:], None), strict=True)] for line in lines
    ]
    packages = [name.strip("/") for row in cells for name in row[0].split() if name.endswith("/") or name == "parts"]
    paths = [
        sorted((int(n), stop) for n, stop in (row[path].split() for row in cells if row[path])) for path in (1, 2, 3)
    ]
    return packages, [[stop for _, stop in path] for path in paths]


def test_the_picture_has_all_packages_from_top_to_bottom():
    packages, _ = picture()
    there = [{package for package in level if any(path(package).exists() for path in PATHS)} for level in LEVELS[1:-1]]
    assert sorted(packages) == sorted(package for level in there for package in level)
    levels = [LEVEL[package] for package in packages]
    assert levels == sorted(levels, reverse=True)


@functools.cache
def mentioned(module):
    """The modules of the package that a module imports, or names in a table of kinds."""
    tree = ast.parse(PATHS[1](module).read_text())
    names = {name for name, _ in imports(PATHS[1](module))}
    names |= {f"{n.module}.{alias.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
    names |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    paths = {name.removeprefix("transformer.").replace(".", "/") for name in names if name.startswith("transformer.")}
    return {path for path in paths if PATHS[1](path).exists()}


def reached_from(module):
    found, new = set(), {module}
    while new:
        found |= new
        new = {other for name in new for other in mentioned(name)} - found
    return found


@pytest.mark.parametrize("path", [0, 1, 2], ids=["config", "batch", "parameter"])
def test_neighbours_on_a_path_know_each_other(path):
    """Each stop knows the next one, or is known by it, or both are known by one above them."""
    stops = picture()[1][path]
    assert len(stops) >= 7
    known = {stop: reached_from(stop) for stop in (*stops, "runs/train")}
    for here, there in itertools.pairwise(stops):
        joined = there in known[here] or here in known[there] or {here, there} <= known["runs/train"]
        assert joined, f"{here} and {there} do not know each other"


PATHS = (lambda package: ROOT / "transformer" / package, lambda package: ROOT / "transformer" / f"{package}.py")
ASKED = {"kind", "reads", "strategy", "implementation"}
CLASSES = {"Decoder", "Encoder", "EncoderDecoder", "Classifier", "Batch", "LabelledBatch", "PairBatch", "PairTokenizer"}
# Some are no kinds of ours: words of a message, and of JAX.
MOST_QUESTIONS = 0


def kind_questions(tree):
    """Comparisons with the name of a kind, and questions for the class of a model, a batch or a tokenizer."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            named = any(getattr(x, "attr", getattr(x, "id", "")) in ASKED for x in operands)
            if named and any(isinstance(x, ast.Constant | ast.Tuple | ast.Set) for x in operands):
                yield node.lineno
        asks = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
        if asks and {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)} & CLASSES:
            yield node.lineno


def test_kinds_are_not_compared_by_name():
    """A bound that only falls: what a kind does is its method. New questions belong into the kind's file."""
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in kind_questions(ast.parse(path.read_text()))
    ]
    assert len(found) <= MOST_QUESTIONS, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("if a.kind == 'x': ...", 1),
        ("b = kind in ('x', 'y')", 1),
        ("isinstance(m, Decoder | Encoder)", 1),
        ("if a.kind == b.kind: ...", 0),
        ("isinstance(m, tuple)", 0),
    ],
)
def test_questions_are_seen(text, count):
    assert len(list(kind_questions(ast.parse(text)))) == count
