"""A run killed with SIGKILL, damaged, stopped or moved to other devices ends with the bits of one that was left alone."""

import re
import signal
import time

import numpy as np
import pytest

from transformer.cli import prove
from transformer.cli.main import main
from transformer.runs.compare import compare, read_outcome

STEPS = 70


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    """The runs of `transformer prove`, shorter: packing, dropout, accumulation and an average are on."""
    directory = tmp_path_factory.mktemp("proof") / "runs"
    return directory, prove.make_runs(directory, STEPS)


def test_killed_damaged_and_moved_runs_end_with_the_same_bits(proof):
    text, equal = prove.judge(*proof)
    assert equal, text
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(rf"killed at step \d+, resumed +{STEPS} +0 +0 +ok\n", text)
    assert re.search(rf"checkpoint \d+ damaged +{STEPS} +0 +0 +ok\n", text)
    assert re.search(rf"resumed on two devices +{STEPS} +at most \de-\d\d \* +ok\n", text)
    directory, trial = proof
    assert 0 < trial.saved_at <= trial.killed_at < STEPS
    undisturbed = read_outcome(directory / "undisturbed")
    assert len(undisturbed.arrays) > 40
    assert {row["split"] for row in undisturbed.rows} == {"train", "validation"}


def altered_bits(outcome):
    name = next(name for name in outcome.arrays if "/mu/" in name)
    words = outcome.arrays[name].view(np.uint32).copy()
    words.flat[0] ^= 1
    return outcome._replace(arrays=outcome.arrays | {name: words.view(np.float32)})


def altered_parameters(outcome):
    moved = {name: x + 1e-4 for name, x in outcome.arrays.items() if name.startswith("params/")}
    return outcome._replace(arrays=outcome.arrays | moved)


@pytest.mark.parametrize(
    ("name", "alter"),
    [
        ("killed", altered_bits),
        ("damaged", altered_bits),
        ("devices", altered_parameters),
        ("killed", lambda outcome: outcome._replace(rows=outcome.rows[:-1])),
        ("damaged", lambda outcome: outcome._replace(rows=[outcome.rows[0] | {"loss": 0.0}, *outcome.rows[1:]])),
        ("killed", lambda outcome: outcome._replace(step=STEPS - 1)),
    ],
)
def test_what_differs_is_not_called_equal(proof, name, alter, monkeypatch, capsys):
    def read(workdir):
        outcome = read_outcome(workdir)
        return alter(outcome) if workdir.name == name else outcome

    monkeypatch.setattr(prove, "read_outcome", read)
    directory, trial = proof
    text, equal = prove.judge(directory, trial)
    assert not equal
    assert text.count("FAIL") == 1
    monkeypatch.setattr(prove, "make_runs", lambda _: trial)
    monkeypatch.setattr(prove, "judge", lambda _, trial: (text, equal))
    with pytest.raises(SystemExit) as exit_info:
        main(["prove"])
    assert exit_info.value.code == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_damage_that_was_not_found_is_a_failure(proof):
    directory, trial = proof
    text, equal = prove.judge(directory, trial._replace(damaged="another/file"))
    assert not equal
    assert "was NOT FOUND" in text


def test_terminated_run_saves_and_goes_on(proof):
    directory, _ = proof
    process = prove.start(directory, "terminated", STEPS)
    while process.poll() is None and not (directory / "terminated" / "metrics.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    log = (directory / "terminated.log").read_text()
    assert "SIGTERM: stopped at step" in log
    assert "Traceback" not in log
    prove.finish(directory, "terminated", STEPS)
    assert compare(read_outcome(directory / "terminated"), read_outcome(directory / "undisturbed"))[::3] == (0, 0)


def train_again(directory, name, *options):
    """The same command line, in this process."""
    main(["train", prove.__file__, "--workdir", str(directory / name), "--training.steps", str(STEPS), *options])


def test_other_config_is_refused_without_a_traceback(proof, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train_again(proof[0], "undisturbed", "--model.attention.num-heads", "4")
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert re.search(r"num.heads: 2 -> 4", error), error
    assert "Traceback" not in error


def test_finished_run_says_so(proof, capsys):
    train_again(proof[0], "killed")
    assert "is finished" in capsys.readouterr().err


def test_kept_runs_need_a_new_directory(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["prove", "--keep", str(tmp_path)])
    assert exit_info.value.code == 2
    assert "must be a new directory" in capsys.readouterr().err
