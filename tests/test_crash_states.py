"""States in which a kill could leave a run's directory, from a record of system calls: every one is recovered."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("kind", "every"),
    [
        ("decoder", 60),
        *(pytest.param(kind, 1, marks=pytest.mark.exhaustive) for kind in ("decoder", "classifier", "vocabulary")),
    ],
)
@pytest.mark.skipif(shutil.which("strace") is None, reason="the record of system calls needs strace, which is not here")
def test_every_state_of_a_killed_run_is_recovered(tmp_path, kind, every):
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "crash_states.py"), kind),
            *("--every", str(every), "--directory", str(tmp_path)),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome["states"] > 200
    assert outcome["tried"] >= outcome["states"] // every
    assert outcome["problems"] == []
    assert outcome["not_recovered"] == 0
