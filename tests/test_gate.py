"""The gate against slower code: what it calls worse, and its exit status for a slowed checkout."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

PATH = pathlib.Path(__file__).parent.parent / "benchmarks" / "gate.py"


@pytest.fixture(scope="module")
def gate():
    spec = importlib.util.spec_from_file_location("gate", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_worse_in_the_minimum_and_in_the_median(gate):
    slower = [(1.0, 1.2), (1.1, 1.3), (1.0, 1.25)]
    assert gate.is_worse(slower, 1.1)
    assert not gate.is_worse(slower, 1.3)
    assert not gate.is_worse([(ours, base) for base, ours in slower], 1.1)
    one_quiet_round_of_the_base = [(0.8, 1.0), (1.0, 1.0), (1.0, 1.0)]
    assert gate.compare(one_quiet_round_of_the_base)["ratio"] == 1.25
    assert not gate.is_worse(one_quiet_round_of_the_base, 1.1)
    most_rounds_disturbed = [(1.0, 1.5), (1.0, 1.5), (1.0, 1.0)]
    assert gate.compare(most_rounds_disturbed)["median"] == 1.5
    assert not gate.is_worse(most_rounds_disturbed, 1.1)


def test_what_looks_worse_is_measured_again_and_orders_alternate(gate):
    calls = []

    def run(name):
        calls.append(name)
        return 2.0 if name == "ours" and len(calls) <= 8 else 1.0

    pairs = gate.measured(run, 4, 1.1)
    assert len(pairs) == 8
    assert not gate.is_worse(pairs, 1.1)
    assert calls[:4] == ["base", "ours", "ours", "base"]
    assert len(gate.measured(lambda name: 2.0 if name == "ours" else 1.0, 4, 1.1)) == 12
    assert len(gate.measured(lambda name: 1.0, 4, 1.1)) == 4


@pytest.fixture
def trees(tmp_path):
    """Two packages whose import takes no time, and half a second."""
    for name, line in {"quick": "", "slow": "import time; time.sleep(0.5)"}.items():
        package = tmp_path / name / "transformer"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(line)
    return tmp_path / "quick", tmp_path / "slow"


def run_gate(*arguments):
    found = subprocess.run([sys.executable, PATH, *map(str, arguments)], capture_output=True, text=True, check=False)
    return found.returncode, found.stdout, found.stderr


def test_a_slowed_checkout_fails(trees):
    quick, slow = trees
    status, line, _ = run_gate("--base", quick, "--ours", slow, "--only", "import", "--rounds", "2")
    assert status == 1
    assert json.loads(line)["worse"] == ["import"]
    status, line, _ = run_gate("--base", slow, "--ours", quick, "--only", "import", "--rounds", "2")
    assert status == 0
    assert json.loads(line)["import"]["ratio"] < 1


def test_the_base_must_be_a_commit():
    status, _, error = run_gate("--base", "no-such-commit", "--only", "import")
    assert status == 1
    assert "must be a commit of this repository or a directory, got 'no-such-commit'" in error
