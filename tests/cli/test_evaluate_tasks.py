"""`transformer evaluate --tasks` without lm-eval, and with options that do not belong together."""

import subprocess
import sys

import pytest

from transformer.cli.main import main


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *words])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_extra_is_named_where_the_package_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "transformer.runs.harness", raising=False)
    said = refused(capsys, "nowhere", "--tasks", "x")
    assert 'needs the package lm-eval; in a copy of the repository: pip install -e ".[lm-eval]"' in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--limit", "3"), "--limit is for --tasks; name some, or leave it out."),
        (("--include-path", "x"), "--include-path is for --tasks"),
        (("--num-fewshot", "3"), "--num-fewshot is for --tasks"),
        (
            ("--tasks", "x", "--split", "test"),
            "--split is for a split of data, got --tasks too; leave one of them out.",
        ),
        (("--tasks", "x", "--data.source", "y"), "--data.source is for a split of data"),
        (("--tasks", "x", "--model.memory-length", "4"), "--model.memory-length is for a split of data"),
        (("--tasks", "x", "--limit", "-1"), "--limit must be at least 0, got -1."),
        (("--tasks", "x", "--num-fewshot", "-1"), "--num-fewshot must be at least 0, got -1."),
    ],
)
def test_options_that_do_not_belong_together(capsys, words, message):
    assert message in refused(capsys, "nowhere", *words)


def test_the_package_is_not_imported_by_ours():
    script = "import sys, transformer, transformer.cli.evaluate; print('lm_eval' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True, timeout=120)
    assert found.stdout.strip() == "False"
