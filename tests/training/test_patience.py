"""Training that stops where the validation loss no longer falls, and the checkpoints that a reader may ask for."""

import contextlib
import json
import math

import pytest

from transformer.config import TrainingConfig
from transformer.training import folders, manifest
from transformer.training.checkpoint import Checkpointer, checked_step, find_checkpoint, read_description
from transformer.training.loop import train
from transformer.training.metrics import TIMINGS
from transformer.training.patience import Patience
from transformer.training.writers import JsonlWriter, read_jsonl
from transformer.types import UserError

LOSSES = {2: 3.0, 4: 2.0, 6: math.nan, 8: 2.0, 10: 1.5, 12: 1.6, 14: 1.7, 16: 1.8, 18: 0.1}


class Accident(Exception):
    pass


class Scripted:
    """A run in a directory, with validation losses from a table."""

    def __init__(self, toy, directory):
        self.toy, self.directory = toy, directory
        self.runner, self.make_state = toy.runner(steps=18, ema_decay=0.9)

    def start(self, *, killed=0, sampler=None, evaluated=True, **changes):
        now = []

        def hook(step, state, statistics):
            now.append(step)
            if step == killed:
                raise Accident

        options = {"eval_every": 2, "checkpoint_every": 3, "keep_checkpoints": 1, "patience": 3, "log_every": 4}
        checkpointer = Checkpointer(self.checkpoints, keep=1, report=lambda _: None)
        with contextlib.closing(checkpointer):
            return train(
                self.make_state(),
                config=TrainingConfig(**{**options, "steps": 18, **changes}),
                runner=self.runner,
                batches=self.toy.Batches(),
                checkpointer=checkpointer,
                writers=[JsonlWriter(self.directory / "metrics.jsonl")],
                evaluators={"validation": lambda params: {"loss": LOSSES[now[-1]]}} if evaluated else {},
                sampler=sampler,
                hooks=(hook,),
            )

    @property
    def checkpoints(self):
        return self.directory / "checkpoints"

    @property
    def rows(self):
        return read_jsonl(self.directory / "metrics.jsonl")

    @property
    def evaluated(self):
        return [row["step"] for row in self.rows if row["split"] == "validation"]


@pytest.fixture
def run(toy, tmp_path):
    return Scripted(toy, tmp_path)


def test_training_stops_after_so_many_evaluations_without_a_lower_loss(run):
    """A loss that is not a number, or equal, is none; a lower one begins the count again."""
    assert int(run.start().step) == 16
    assert run.evaluated == [2, 4, 6, 8, 10, 12, 14, 16]
    assert folders.committed_steps(run.checkpoints) == [10, 16]  # the best, though no multiple of 3, and the last
    assert read_description(folders.absolute(run.checkpoints / "16"))["loop"]["evaluations"] == {
        "since": 3,
        "loss": 1.5,
        "step": 10,
    }


@pytest.mark.parametrize(("patience", "last"), [(0, 18), (1, 6), (2, 8), (4, 18)])
def test_how_many(run, patience, last):
    assert int(run.start(patience=patience).step) == last


@pytest.mark.parametrize("killed", [5, 11, 13, 16])
def test_a_killed_run_stops_where_another_would_have(toy, tmp_path, killed):
    whole, other = (Scripted(toy, tmp_path / name) for name in ("whole", "other"))
    whole.start()
    with pytest.raises(Accident):
        other.start(killed=killed)
    assert int(other.start().step) == 16

    def compared(run):
        return [json.dumps({k: v for k, v in row.items() if k not in TIMINGS}) for row in run.rows]

    assert compared(other) == compared(whole)


def test_a_run_that_has_stopped_goes_on_with_more_patience_only(run):
    run.start()
    assert int(run.start().step) == 16
    assert run.evaluated[-1] == 16
    assert int(run.start(patience=4).step) == 18
    assert run.evaluated[-2:] == [16, 18]


def test_samples_are_drawn_at_the_end(run):
    sampled = []
    run.start(sampler=lambda params, step: sampled.append(step), sample_every=0)
    assert sampled == [16]


def test_patience_needs_evaluations():
    with pytest.raises(UserError, match="patience counts evaluations, got patience=2 and eval_every=0; set eval_every"):
        TrainingConfig(patience=2, eval_every=0)


def test_what_is_said():
    patience = Patience({})
    assert not patience.add(3, math.inf)
    assert patience.describe() == "no lower validation loss in 1 evaluations; none was finite"
    assert patience.add(6, 1.25) and not patience.add(9, 1.5)
    assert patience.describe() == "no lower validation loss in 1 evaluations; the lowest, 1.25, was at step 6"


# ---- Which checkpoint -----------------------------------------------------------------------------------------------


def test_the_best_the_latest_and_each_step_are_found(run):
    run.start()
    directory = run.checkpoints
    found = {step: find_checkpoint(directory, step).name for step in ("latest", "best", 10, "16")}
    assert found == {"latest": "16", "best": "10", 10: "10", "16": "16"}
    with pytest.raises(UserError, match=r"step 7 has none: .* has 10, 16\."):
        find_checkpoint(directory, 7)
    assert find_checkpoint(run.directory / "nothing", "best") is None


def test_a_damaged_one_is_refused_and_not_replaced(run):
    run.start()
    directory = run.checkpoints
    (path,) = (directory / "10").glob(manifest.NAME)
    content = json.loads((directory / "10" / "checkpoint.json").read_text())
    (directory / "10" / "checkpoint.json").write_text(json.dumps(content | {"more": 1}))
    for step in ("best", 10):
        with pytest.raises(UserError, match=r"must be undamaged\. .*10: .*Use another: .* has 10, 16"):
            find_checkpoint(directory, step)
    assert path.exists() and find_checkpoint(directory).name == "16"


def test_without_an_evaluation_there_is_no_best(toy, tmp_path):
    run = Scripted(toy, tmp_path)
    run.start(evaluated=False, steps=6)
    with pytest.raises(UserError, match=r"is one whose step was evaluated, but none of these was: .* has 6\."):
        find_checkpoint(run.checkpoints, "best")


@pytest.mark.parametrize("step", ["", "last", "-1", -1, "1.5"])
def test_a_step_is_a_number_or_one_of_two_words(step):
    with pytest.raises(UserError, match="A step to load must be latest, best or the number of one"):
        checked_step(step)
