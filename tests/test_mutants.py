"""The table of wrong changes fits the package, and its harness tells what tests notice from what they do not."""

import ast
import collections
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests/mutants.py")
mutants = importlib.util.module_from_spec(_spec)
sys.modules["mutants"] = mutants
_spec.loader.exec_module(mutants)
TABLE = mutants.read_table()


def test_the_table_is_large_and_has_a_share_of_every_area():
    areas = collections.Counter(mutant.area for mutant in TABLE)
    assert len(TABLE) >= 100 and all(areas[area] >= 6 for area in mutants.AREAS), areas
    assert len({(mutant.file, mutant.what) for mutant in TABLE}) == len(TABLE)
    assert sum(bool(mutant.reason) for mutant in TABLE) <= mutants.MOST_SURVIVORS * len(TABLE)


@pytest.mark.parametrize("mutant", TABLE, ids=lambda mutant: f"{mutant.file}-{mutant.what}".replace(" ", "_"))
def test_a_change_fits_once_compiles_to_another_program_and_has_tests(mutant):
    """Where code moved on, say in `mutants.toml` which line is to be changed now, and which tests should notice."""
    before, after = (ROOT / mutant.file).read_text(), mutant.changed(ROOT)
    assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))
    assert mutant.tests and mutants.missing_tests(mutant) == []


def test_tests_that_are_not_there_are_named():
    given = ("tests/test_mutants.py", "tests/test_mutants.py::TABLE", "tests/absent.py", "tests/absent.py::test_x")
    mutant = mutants.Mutant(
        "", "", "", "", (*given, "tests/test_mutants.py::test_tests_that_are_not_there_are_named[x]")
    )
    assert mutants.missing_tests(mutant) == list(given[1:])


PACKAGE = {
    "toy/__init__.py": "",
    "toy/sums/__init__.py": "",
    "toy/sums/sums.py": "def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return 2 * a\n\n\nHALF = 0.5\n",
    "tests/test_sums.py": (
        "import pytest\nfrom toy.sums import sums\n\n"
        "@pytest.mark.parametrize('a', [1, 2])\ndef test_add(a):\n    assert sums.add(a, 2) == a + 2\n\n"
        "def test_twice_of_nothing():\n    assert sums.twice(0) == 0\n\n"
        "def test_what_fails_anyway():\n    assert sums.HALF == 1\n"
    ),
}


def toy(what, old, new, test, reason=""):
    return mutants.Mutant(what, "toy/sums/sums.py", old, new, (f"tests/test_sums.py::{test}",), reason)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    for name, text in PACKAGE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_killed_hung_survived_and_errors_are_distinguished(checkout, capsys):
    given = {
        "killed": [toy("minus", "a + b", "a - b", "test_add"), toy("no syntax", "a + b", "a +", "test_add")],
        "survived": [toy("thrice", "2 * a", "3 * a", "test_twice_of_nothing")],
        "error": [
            toy("more", "0.5", "0.6", "test_what_fails_anyway"),
            toy("ended", "return a + b", "import os\n    os.kill(os.getpid(), 15)", "test_add"),
        ],
    }
    ended = mutants.try_all([mutant for part in given.values() for mutant in part], [checkout], 60)
    assert ended == {**given, "hung": []}
    assert (checkout / "toy/sums/sums.py").read_text() == PACKAGE["toy/sums/sums.py"]
    endless = toy(
        "endless", "return 2 * a", "return twice(a) if a else exec('while True: pass')", "test_twice_of_nothing"
    )
    assert mutants.try_mutant(endless, checkout, 5) == "hung"
    assert "test_what_fails_anyway" in capsys.readouterr().out


def test_an_anchor_must_occur_once(checkout):
    for old, count in (("a", 5), ("z", 0)):
        with pytest.raises(ValueError, match=f"must occur once in toy/sums/sums.py, it occurs {count} times"):
            toy("", old, "b", "test_add").changed(checkout)


@pytest.mark.parametrize(
    ("counts", "reason", "well"),
    [
        ({"killed": 50}, "", True),
        ({"killed": 49, "survived": 1}, "why", True),
        ({"killed": 49, "survived": 1}, "", False),
        ({"killed": 48, "survived": 1}, "why", False),
        ({"killed": 40, "hung": 10}, "", True),
        ({"killed": 49, "error": 1}, "why", False),
    ],
)
def test_two_in_a_hundred_may_survive_with_a_reason(counts, reason, well):
    mutant = toy("x", "old", "new", "test_add", reason)
    ended = {how: [mutant] * counts.get(how, 0) for how in ("killed", "hung", "survived", "error")}
    found, said = mutants.summary(ended, 1.4)
    assert said == well and found["mutants"] == sum(counts.values()) and found["killed"] == counts["killed"]
    assert list(json.loads(json.dumps(found))["survived"].values()) == [reason] * min(1, counts.get("survived", 0))


def test_a_copy_is_the_checkout_with_new_files_and_without_ignored_ones(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "transformer").mkdir(parents=True)
    subprocess.run(["git", "init", "-q"], cwd=source, check=True)
    for name, text in {".gitignore": "ignored\n", "ignored": "", "new.py": "x", "transformer/kept.py": "y = 1"}.items():
        (source / name).write_text(text)
    subprocess.run(["git", "add", "transformer"], cwd=source, check=True)
    (source / "transformer/kept.py").write_text("y = 2")
    target.mkdir()
    mutants.copy_checkout(source, target)
    files = {
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert files == {".gitignore", "new.py", "transformer/kept.py"}
    assert (target / "transformer/kept.py").read_text() == "y = 2"
