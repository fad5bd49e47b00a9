"""The table of what `make test` leaves out names tests that exist, and others in their place."""

import pathlib
import re

import pytest
from slow_cases import COLLECTED, SLOW

ROOT = pathlib.Path(__file__).parent.parent


def exists(file, name):
    return (ROOT / file).exists() and f"\ndef {name}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("file", SLOW)
def test_what_is_left_out_is_represented(file):
    """Cases are compared with those that were collected: with none where only this file runs."""
    for name, entry in SLOW[file].items():
        assert exists(file, name), name
        if isinstance(entry, str):
            other, _, instead = entry.partition("::")
            assert exists(other, instead), f"{entry}, in the place of {name}, is not there"
            assert isinstance(SLOW.get(other, {}).get(instead, []), list), f"{entry} is left out too"
        else:
            assert entry, f"{name} keeps no case; name the test that covers it"
            assert len({case.startswith("!") for case in entry}) == 1, f"{name} has cases with and without !"
            there = COLLECTED.get((file, name))
            unknown = {case.removeprefix("!") for case in entry} - (there or set())
            assert not there or not unknown, f"{name} has no case {unknown}"


def test_a_guarantee_of_the_readme_is_tested_by_make_test():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "README.md").read_text())
    assert len(named) >= 3
    assert not [name for file, name in named if isinstance(SLOW.get(file, {}).get(name, []), str)]


def test_the_table_is_in_order():
    assert list(SLOW) == sorted(SLOW)
    assert all(list(entries) == sorted(entries) for entries in SLOW.values())
