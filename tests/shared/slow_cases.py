"""What `make test` leaves out: the table `tests/slow.toml`."""

import collections
import pathlib
import tomllib

SLOW = tomllib.loads((pathlib.Path(__file__).parent.parent / "slow.toml").read_text())
"""Of each file, its tests of which `make test` leaves cases out; see that file."""
COLLECTED = collections.defaultdict(set)
"""The cases of each test that this session collected, by file and name."""


def left_out(file, name, case):
    """Whether the table leaves a case of a test out of `make test`. The case of a test without parameters is empty."""
    entry = SLOW.get(file, {}).get(name)
    if not isinstance(entry, list):
        return entry is not None
    return f"!{case}" in entry or (case not in entry and not entry[0].startswith("!"))
