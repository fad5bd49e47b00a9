"""The loop: rows, evaluation, samples, checkpoints, resuming and stopping, in the requested order and number."""

import contextlib
import copy
import json
import math
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import TrainingConfig
from transformer.schedules.cosine import CosineSchedule
from transformer.storage import WriteError
from transformer.training import folders, manifest
from transformer.training.checkpoint import Checkpointer
from transformer.training.loop import train
from transformer.training.metrics import TIMINGS, Work, derive
from transformer.training.signals import SIGNALS
from transformer.training.writers import JsonlWriter, read_jsonl
from transformer.types import Interrupted, UserError

STEPS = 23


def with_step(runner, step):
    """The runner with another step; the one that is given stays."""
    other = copy.copy(runner)
    other.step = step
    return other


class Accident(Exception):
    pass


class Run:
    """A run in a directory, started as often as needed."""

    def __init__(self, toy, directory, *, runner=None, **options):
        self.toy, self.directory, self.options = toy, directory, options
        self.runner, self.make_state = toy.runner(steps=STEPS, ema_decay=0.9)
        self.runner = runner(self.runner) if runner else self.runner
        self.batches = []

    def start(self, *, hooks=(), writers=(), evaluators=None, sampler=None, **changes):
        batches = self.toy.Batches()
        self.batches.append(batches)
        config = {"steps": STEPS, "log_every": 4, "eval_every": 10, "checkpoint_every": 5, **self.options, **changes}
        checkpointer = Checkpointer(
            self.directory / "checkpoints", keep=config.get("keep_checkpoints", 2), report=lambda _: None
        )
        with contextlib.closing(checkpointer):
            return train(
                self.make_state(),
                config=TrainingConfig(**config),
                runner=self.runner,
                batches=batches,
                checkpointer=checkpointer,
                measure_work=lambda batch: Work(batch.inputs.size, 1e3 * batch.inputs.size),
                peak_flops=1e9,
                writers=[JsonlWriter(self.directory / "metrics.jsonl"), *writers],
                evaluators={"validation": self.evaluate} if evaluators is None else evaluators,
                sampler=sampler,
                hooks=hooks,
            )

    def evaluate(self, params):
        _, statistics = self.runner.evaluate_step(params, (), self.runner.place_batch(self.toy.batch(10**6)))
        return derive({name: float(value) for name, value in statistics.items()})

    @property
    def rows(self):
        path = self.directory / "metrics.jsonl"
        return read_jsonl(path) if path.exists() else []

    @property
    def saved(self):
        return folders.committed_steps(self.directory / "checkpoints")


def at(step, action):
    """A hook that does something at one step."""

    def hook(now, state, statistics):
        if now == step:
            action()

    return hook


def fail():
    raise Accident


def untimed(rows):
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def assert_same_bits(a, b):
    a, b = (x._replace(key=jax.random.key_data(x.key)) for x in (a, b))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    """The run that everything is compared with: its last state, its rows, and itself."""
    run = Run(toy, tmp_path_factory.mktemp("uninterrupted"))
    return run.start(), run.rows, run


# ---- A run that is left alone ----------------------------------------------------------------------------------------


def test_rows_checkpoints_and_order(toy, uninterrupted):
    state, rows, run = uninterrupted
    assert [(row["step"], row["split"]) for row in rows] == [
        *[(4, "train"), (8, "train"), (10, "validation"), (12, "train"), (16, "train")],
        *[(20, "train"), (20, "validation"), (23, "train"), (23, "validation")],
    ]
    assert int(state.step) == STEPS
    # The latest two and the best by validation loss, which is among them: the toy learns.
    assert run.saved == [20, 23]
    assert rows[-1]["loss"] < rows[2]["loss"]


def test_a_row_is_the_average_of_its_window(toy, uninterrupted):
    """By hand, from the statistics of every step."""
    seen = []
    run = Run(toy, uninterrupted[2].directory / "other")
    run.start(hooks=[lambda step, state, statistics: seen.append(jax.device_get(statistics))])
    row = next(row for row in run.rows if row["step"] == 8)
    window = seen[4:8]
    weight = sum(float(s["weight"]) for s in window)
    assert row["loss"] == sum(float(s["loss"]) for s in window) / weight
    assert row["accuracy"] == sum(float(s["correct"]) for s in window) / weight
    np.testing.assert_allclose(row["bits_per_byte"], row["loss"] / math.log(2) / 2)
    # These two are the step's own.
    assert row["grad_norm"] == float(window[-1]["grad_norm"])
    assert row["learning_rate"] == float(window[-1]["learning_rate"])
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 1e3 / 1e9)


def test_repeats_to_the_bit(toy, uninterrupted, tmp_path):
    state, rows, _ = uninterrupted
    run = Run(toy, tmp_path)
    assert_same_bits(run.start(), state)
    assert untimed(run.rows) == untimed(rows)


def test_finished_run_does_nothing(toy, tmp_path):
    run = Run(toy, tmp_path)
    run.start(steps=5)
    rows, saved = run.rows, run.saved
    state = run.start(steps=5)
    assert int(state.step) == 5
    assert (run.rows, run.saved) == (rows, saved)


def test_evaluators_see_placed_averages_and_samplers_one_copy(toy, tmp_path):
    run = Run(toy, tmp_path)
    calls = []
    run.start(
        steps=6,
        sample_every=4,
        evaluators={
            "validation": lambda params: calls.append(("validation", params)) or {"loss": 1.0},
            "test": lambda params: calls.append(("test", params)) or {"loss": 2.0},
        },
        sampler=lambda params, step: calls.append((step, params)),
        eval_every=0,
    )
    assert [name for name, _ in calls] == [4, "validation", "test", 6]
    evaluated, sampled = calls[1][1], calls[3][1]
    average = run.start(steps=6).ema_params
    for params in (evaluated, sampled):
        jax.tree.map(np.testing.assert_array_equal, params, average)
    assert [row["split"] for row in run.rows] == ["train", "train", "validation", "test"]


def test_best_checkpoint_by_validation_loss_is_kept(toy, tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.0])
    run = Run(toy, tmp_path, keep_checkpoints=1)
    run.start(
        steps=20, eval_every=5, checkpoint_every=5, evaluators={"validation": lambda params: {"loss": next(losses)}}
    )
    assert run.saved == [10, 20]


def test_nothing_is_periodic_at_zero(toy, tmp_path):
    run = Run(toy, tmp_path)
    run.start(steps=6, eval_every=0, checkpoint_every=0, sample_every=0)
    assert [(row["step"], row["split"]) for row in run.rows] == [(4, "train"), (6, "train"), (6, "validation")]
    assert run.saved == [6]


class Reading:
    """A statistic that records when it is read."""

    def __init__(self, log, step):
        self.log, self.step = log, step

    def __array__(self, dtype=None, copy=None):
        self.log.append(f"read {self.step}")
        return np.asarray(1.0)


def test_statistics_are_read_one_step_late(toy, tmp_path):
    """The next step is on its way to the device before anything waits for the one before."""
    log = []

    def spy(runner):
        def step(state, batch):
            state, statistics = runner.step(state, batch)
            log.append(f"step {int(state.step)}")
            return state, {**statistics, "weight": Reading(log, int(state.step))}

        return with_step(runner, step)

    Run(toy, tmp_path, runner=spy).start(steps=4, log_every=1, checkpoint_every=0, evaluators={})
    assert log == ["step 1", "step 2", "read 1", "step 3", "read 2", "step 4", "read 3", "read 4"]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_no_row_has_a_speed_that_cannot_be(toy, tmp_path, every):
    """Of steps that run while they are dispatched, and take 50 ms, none is counted without its time; the first has no speed."""

    def slow(runner):
        def step(state, batch):
            time.sleep(0.05)
            return jax.block_until_ready(runner.step(state, batch))

        return with_step(runner, step)

    run = Run(toy, tmp_path, runner=slow)
    run.start(steps=5, log_every=every, eval_every=3, checkpoint_every=0)
    speeds = {row["step"]: row.get("tokens_per_second", 0.0) for row in run.rows if row["split"] == "train"}
    assert all(speed <= toy.batch(0).inputs.size / 0.05 for speed in speeds.values())
    assert speeds.pop(1, 0.0) == 0.0
    assert all(speed > 0.0 for speed in speeds.values())


# ---- Interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_resumes_to_the_bit_from_anywhere(toy, uninterrupted, tmp_path, seed):
    """Accidents at random steps: before the first checkpoint, in the middle of a row's window, right after a save."""
    expected, rows, _ = uninterrupted
    run = Run(toy, tmp_path)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        first = max(run.saved, default=0) + 1
        with pytest.raises(Accident):
            run.start(hooks=[at(int(rng.integers(first, min(first + 9, STEPS + 1))), fail)])
    assert_same_bits(run.start(), expected)
    assert untimed(run.rows) == untimed(rows)


@pytest.mark.parametrize("step", [1, 5, 8, 11, 23])
def test_a_signal_finishes_the_step_saves_and_raises(toy, uninterrupted, tmp_path, step):
    """Also a signal that comes when all steps are done: a loop over runs is to end there."""
    expected, rows, _ = uninterrupted
    run = Run(toy, tmp_path)
    handlers = [signal.getsignal(s) for s in SIGNALS]
    number = SIGNALS[step % len(SIGNALS)]
    with pytest.raises(
        Interrupted, match=f"{signal.Signals(number).name}: stopped at step {step} of 23 and saved"
    ) as stop:
        run.start(hooks=[at(step, lambda: os.kill(os.getpid(), number))])
    assert (stop.value.exit_code, stop.value.agreed) == (128 + number, True)
    assert run.saved[-1] == step
    assert [signal.getsignal(s) for s in SIGNALS] == handlers
    assert_same_bits(run.start(), expected)
    assert untimed(run.rows) == untimed(rows)


@pytest.mark.parametrize("place", ["evaluation", "sample", "save", "last save"])
def test_a_signal_between_two_steps_is_not_lost(toy, uninterrupted, tmp_path, place, monkeypatch):
    """What is under way is finished and saved, with its row, without another step."""
    expected, rows, _ = uninterrupted
    run, step = Run(toy, tmp_path), {"evaluation": 10, "sample": 7, "save": 5, "last save": STEPS}[place]

    def interrupt():
        os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(params):
        if place == "evaluation" and run.rows[-1]["split"] != "validation":
            interrupt()
        return run.evaluate(params)

    write = manifest.write_manifest
    if "save" in place:
        monkeypatch.setattr(
            manifest, "write_manifest", lambda path: (path.name == f"{step}.unfinished" and interrupt(), write(path))
        )
    sampler = (lambda params, now: now == step and interrupt()) if place == "sample" else None
    reached = rf"at step {step} " if place != "save" else r"at step \d+ "  # it is saved beside the next steps
    with pytest.raises(Interrupted, match=reached):
        run.start(evaluators={"validation": evaluate}, sampler=sampler, sample_every=7)
    monkeypatch.undo()
    assert run.saved[-1] == step or place == "save"
    assert_same_bits(run.start(sample_every=7), expected)
    assert untimed(run.rows) == untimed(rows)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_at_once(toy, tmp_path):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    run = Run(toy, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.start(hooks=[at(7, twice)])
    assert run.saved == [5]


def test_rows_after_the_checkpoint_and_a_torn_line_are_dropped(toy, uninterrupted, tmp_path):
    expected, rows, _ = uninterrupted
    run = Run(toy, tmp_path)
    with pytest.raises(Accident):
        run.start(hooks=[at(10, fail)])
    path = tmp_path / "metrics.jsonl"
    assert [row["step"] for row in run.rows] == [4, 8]
    with path.open("a") as file:
        file.write('{"step": 9, "split": "train", "lo')
    assert_same_bits(run.start(), expected)
    assert untimed(run.rows) == untimed(rows)


def test_a_damaged_checkpoint_is_passed_over(toy, uninterrupted, tmp_path):
    expected, rows, _ = uninterrupted
    run = Run(toy, tmp_path)
    with pytest.raises(Accident):
        run.start(hooks=[at(12, fail)])
    assert run.saved == [5, 10]
    path = tmp_path / "checkpoints" / "10" / "checkpoint.json"
    path.write_bytes(path.read_bytes()[:-2])
    assert_same_bits(run.start(), expected)
    assert untimed(run.rows) == untimed(rows)


def test_a_longer_run_goes_on(toy, tmp_path):
    run = Run(toy, tmp_path)
    run.start(steps=6)
    state = run.start(steps=9)
    assert int(state.step) == 9
    assert run.batches[1].count == 9
    assert [row["step"] for row in run.rows if row["split"] == "train"] == [4, 6, 8, 9]


def test_a_restarted_schedule_resumes_to_the_bit(toy, tmp_path):
    """A finished run goes on with a new warm-up, and is killed twice on the way."""

    def run(name):
        found = Run(toy, tmp_path / name)
        found.runner, found.make_state = toy.runner(steps=6, ema_decay=0.9)
        found.start(steps=6, log_every=1, evaluators={})
        found.runner, found.make_state = toy.runner(
            steps=14, ema_decay=0.9, schedule=CosineSchedule(warmup_steps=3, restarts=(6,))
        )
        return found, {"steps": 14, "log_every": 1, "evaluators": {}, "checkpoint_every": 3}

    (whole, changes), (killed, _) = run("whole"), run("killed")
    expected = whole.start(**changes)
    for step in (8, 13):
        with pytest.raises(Accident):
            killed.start(hooks=[at(step, fail)], **changes)
    assert_same_bits(killed.start(**changes), expected)
    assert untimed(killed.rows) == untimed(whole.rows)
    rates = [row["learning_rate"] for row in whole.rows]
    assert rates[6:9] == rates[:3]  # the same warm-up
    assert rates[5] == pytest.approx(rates[-1]) == pytest.approx(0.003)


def test_an_exception_lets_the_checkpoint_under_way_finish(toy, tmp_path, monkeypatch):
    write, written = manifest.write_manifest, []
    monkeypatch.setattr(manifest, "write_manifest", lambda path: (written.append(path), write(path)))
    run = Run(toy, tmp_path)
    with pytest.raises(Accident):
        run.start(hooks=[at(6, fail)])
    assert run.saved == [5]
    assert len(written) == 1


@pytest.mark.parametrize("failing", ["evaluators", "sampler"])
def test_a_step_is_saved_even_if_its_evaluation_or_sample_fails(toy, uninterrupted, tmp_path, failing):
    run = Run(toy, tmp_path)
    broken = (
        {"evaluators": {"validation": lambda _: fail()}} if failing == "evaluators" else {"sampler": lambda *_: fail()}
    )
    with pytest.raises(Accident):
        run.start(steps=STEPS, eval_every=0, **broken)
    assert run.saved[-1] == STEPS
    assert_same_bits(run.start(), uninterrupted[0])


def test_an_exception_is_not_hidden_by_trouble_with_the_checkpoint(toy, tmp_path, monkeypatch):
    def full(path):
        raise OSError("disk full")

    monkeypatch.setattr(manifest, "write_manifest", full)
    run = Run(toy, tmp_path)
    with pytest.raises(Accident) as error:
        run.start(hooks=[at(6, fail)])
    assert "disk full" in error.value.__notes__[0]
    with pytest.raises(WriteError, match="disk full"):
        run.start(steps=6)


def test_writers_are_closed_and_get_the_step_of_a_resumed_run(toy, tmp_path):
    calls = []

    class Spy:
        def write(self, step, split, metrics):
            calls.append((step, split))

        def resume(self, step):
            calls.append(f"resume {step}")

        def close(self):
            calls.append("close")

    run = Run(toy, tmp_path)
    with pytest.raises(Accident):
        run.start(hooks=[at(6, fail)], writers=[Spy()])
    run.start(steps=8, writers=[Spy()], evaluators={})
    assert calls == ["resume 0", (4, "train"), "close", "resume 5", (8, "train"), "close"]


# ---- Numbers that are not finite -------------------------------------------------------------------------------------


def spoil(step, name, value):
    """A runner whose statistic turns bad at one step."""

    def wrap(runner):
        def run_step(state, batch):
            now = int(state.step) + 1
            state, statistics = runner.step(state, batch)
            return state, {**statistics, name: jnp.float32(value)} if now == step else statistics

        return with_step(runner, run_step)

    return wrap


@pytest.mark.parametrize(
    ("step", "name", "value", "saved"),
    [
        (7, "loss", math.nan, [5]),
        (10, "loss", math.inf, [5]),
        (12, "grad_norm", math.nan, [5, 10]),
        (3, "loss", math.nan, []),
    ],
)
def test_stops_at_the_step_whose_loss_is_not_finite(toy, tmp_path, step, name, value, saved):
    """At a step that is to be saved, too: what it leads to is never saved."""
    run = Run(toy, tmp_path, runner=spoil(step, name, value))
    good = f"The checkpoint of step {saved[-1]} is good" if saved else "No checkpoint was saved before"
    with pytest.raises(UserError, match=rf"The {name} must be finite, got {value} at step {step}\. Lower .*{good}"):
        run.start()
    assert run.saved == saved
    assert all(math.isfinite(v) for row in run.rows for v in row.values() if isinstance(v, float))


def test_parameters_that_are_not_finite_are_not_saved(toy, tmp_path):
    """The loss of a step tells of the parameters before it, not of those it leaves."""

    def wrap(runner):
        def run_step(state, batch):
            state, statistics = runner.step(state, batch)
            if int(state.step) == 10:
                params = jax.tree.map(lambda x: x * jnp.inf, state.params)
                state = state._replace(params=params)
            return state, statistics

        return with_step(runner, run_step)

    run = Run(toy, tmp_path, runner=wrap)
    with pytest.raises(UserError, match="The parameters must be finite, they are not at step 10"):
        run.start(evaluators={})
    assert run.saved == [5]


def test_open_window_is_written_so_that_it_reads_back_exactly(toy, tmp_path):
    run = Run(toy, tmp_path)
    run.start(steps=7, checkpoint_every=6)
    text = (tmp_path / "checkpoints" / "6" / "checkpoint.json").read_text()
    window = json.loads(text)["loop"]["window"]
    assert set(window) == {"loss", "objective", "weight", "correct", "bytes"}
    assert all(repr(value) in text for value in window.values())
