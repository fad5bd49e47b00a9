"""A step that hangs ends the process; what is longer than a step does not."""

import contextlib
import faulthandler
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from transformer.config import TrainingConfig
from transformer.training import watchdog
from transformer.training.checkpoint import Checkpointer
from transformer.training.loop import train
from transformer.training.watchdog import PATIENCE, SEVERAL_PROCESSES, Watchdog

PROGRAM = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
from transformer.config import TrainingConfig
from transformer.training.checkpoint import Checkpointer
from transformer.training.loop import train

def hang_in_a_hook(step, state, statistics):
    while step == 4:
        time.sleep(1)

runner, make_state = toy.make_runner()
checkpointer = Checkpointer(sys.argv[2])
train(make_state(), config=TrainingConfig(steps=9, checkpoint_every=0, hang_timeout=1), runner=runner,
      batches=toy.Batches(), checkpointer=checkpointer, hooks=[hang_in_a_hook])
"""


@pytest.fixture
def alarms(monkeypatch):
    """The limits as they are set, 0 where none is."""
    found = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: found.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: found.append(0))
    return found


def run(toy, directory, **options):
    runner, make_state = toy.runner()
    config = {"steps": 8, "log_every": 1, "eval_every": 6, "checkpoint_every": 0, **options.pop("config")}
    with contextlib.closing(Checkpointer(directory)) as checkpointer:
        return train(
            make_state(),
            config=TrainingConfig(**config),
            runner=runner,
            checkpointer=checkpointer,
            batches=options.pop("batches", None) or toy.Batches(),
            **options,
        )


def test_a_process_that_hangs_ends_and_says_where(tmp_path):
    conftest = pathlib.Path(__file__).parent / "conftest.py"
    command = [sys.executable, "-c", PROGRAM, str(conftest), str(tmp_path / "checkpoints")]
    root = str(conftest.parents[2])
    started = time.monotonic()
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 1, result.stderr
    assert "Timeout (0:00:01)!" in result.stderr and "hang_in_a_hook" in result.stderr
    assert time.monotonic() - started < 90


def test_what_takes_longer_than_a_step_does_not_end_the_process(toy, tmp_path):
    """With a limit of a second: an evaluation and a sample of more than that, and the first step's compilation."""
    run(
        toy,
        tmp_path,
        config={"hang_timeout": 1},
        evaluators={"validation": lambda _: time.sleep(1.2) or {"loss": 1.0}},
        sampler=lambda *_: time.sleep(1.2),
    )


def test_each_step_has_the_short_limit_and_all_else_the_long_one(toy, tmp_path, alarms):
    """Also the two steps after something long, in which other processes may still be at it."""
    run(toy, tmp_path, config={"hang_timeout": 7}, evaluators={"validation": lambda _: {"loss": 1.0}})
    steps = [
        PATIENCE,
        PATIENCE,
        7,
        7,
        7,
        7,
        PATIENCE,
        PATIENCE,
        PATIENCE,
        PATIENCE,
    ]  # evaluated after the sixth and the last
    assert alarms == [PATIENCE, 0, PATIENCE, *steps, 0]


def test_a_batch_of_a_new_shape_is_compiled(toy, alarms):
    dog = Watchdog(7)
    for rows in (8, 8, 8, 16, 16, 16, 8):
        dog.step(toy.batch(rows=rows))
    assert alarms == [PATIENCE, PATIENCE, 7, PATIENCE, PATIENCE, 7, 7]


def test_the_limit_by_default(alarms, monkeypatch):
    """None in one process, half an hour in several; a limit above the long one lengthens that too."""
    with Watchdog().watching():
        Watchdog().step(())
    assert alarms == []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert Watchdog().seconds == SEVERAL_PROCESSES == 1800
    Watchdog(2 * PATIENCE).long()
    assert alarms == [2 * PATIENCE]


def test_an_error_leaves_nothing_armed(toy, tmp_path, alarms):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(toy, tmp_path, config={"hang_timeout": 7}, hooks=[fail])
    assert alarms[-1] == 0


def test_a_stderr_that_is_no_file(monkeypatch):
    """As in a notebook."""
    monkeypatch.setattr(watchdog.sys, "stderr", None)
    assert watchdog._stderr() == 2
