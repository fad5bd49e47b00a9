"""Learning rates by step equal their definitions."""

import itertools
import math

import jax
import numpy as np
import pytest

from transformer.config import Config, TrainingConfig
from transformer.optimizer import SCHEDULES
from transformer.optimizers.adamw import AdamW
from transformer.schedules.cosine import CosineSchedule
from transformer.training.learning_rate import describe_change, make_schedule
from transformer.types import UserError

STEPS, WARMUP, PEAK = 101, 10, 2.0
NAMES = SCHEDULES.names


def schedule(name, steps=STEPS, **changes):
    kind = SCHEDULES.find(name)(**{"warmup_steps": WARMUP, **changes})
    return make_schedule(AdamW(learning_rate=PEAK, schedule=kind), steps)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_a_line_from_zero_to_the_peak(name):
    rates = [float(schedule(name)(count)) for count in range(WARMUP + 1)]
    np.testing.assert_allclose(rates, [PEAK * (count + 1) / (WARMUP + 1) for count in range(WARMUP + 1)], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_warm_up_starts_at_the_peak(name):
    assert float(schedule(name, warmup_steps=0)(0)) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("name", "count", "factor"),
    [
        ("cosine", 55, 0.1 + 0.9 / 2),  # half way between peak (10) and last step (100)
        ("cosine", 100, 0.1),
        ("cosine", 10_000, 0.1),
        ("linear", 55, 0.55),
        ("linear", 100, 0.1),
        ("linear", 10_000, 0.1),
        ("inverse_sqrt", 43, 0.5),  # sqrt(11 / 44)
        ("inverse_sqrt", 98, 1 / 3),
        ("constant", 100, 1.0),
        ("wsd", 79, 1.0),  # the last fifth of the steps decays
        ("wsd", 80, 1.0),
        ("wsd", 90, 0.55),
        ("wsd", 100, 0.1),
        ("wsd", 10_000, 0.1),
    ],
)
def test_landmarks(name, count, factor):
    assert float(schedule(name)(count)) == pytest.approx(PEAK * factor, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_never_rises_after_the_warm_up_and_never_jumps(name):
    rates = [float(schedule(name)(count)) for count in range(STEPS)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(rates[WARMUP:]))
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) < PEAK / WARMUP


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 2), (3, 3)])
def test_runs_of_a_few_steps_are_finite(name, steps, warmup):
    rate = schedule(name, steps, warmup_steps=warmup)
    assert all(math.isfinite(float(rate(count))) and float(rate(count)) > 0 for count in range(steps + 1))


@pytest.mark.parametrize("name", NAMES)
def test_same_under_jit_for_traced_counts(name):
    rate = schedule(name)
    assert float(jax.jit(rate)(np.int32(57))) == pytest.approx(float(rate(57)), rel=1e-6)


def test_a_stage_of_no_decay_steps_stays_up():
    assert float(schedule("wsd", decay_fraction=0.0)(STEPS - 2)) == pytest.approx(PEAK)


# ---- Restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_after_a_restart_the_schedule_is_a_new_runs(name):
    """And before it the one that was, to the bit: a run that went on has the schedule of its config from its first step."""
    rate, first, second, third = (
        schedule(name, 301, restarts=(STEPS, 240)),
        *(schedule(name, steps) for steps in (STEPS, 240 - STEPS, 301 - 240)),
    )
    counts = np.arange(301)
    expected = [*first(counts[:STEPS]), *second(counts[: 240 - STEPS]), *third(counts[: 301 - 240])]
    np.testing.assert_array_equal(rate(counts), np.asarray(expected))
    np.testing.assert_array_equal(jax.jit(rate)(counts[:STEPS]), jax.jit(first)(counts[:STEPS]))


def run_of(steps, *restarts, learning_rate=0.001, **schedule):
    optimizer = AdamW(learning_rate=learning_rate, schedule=CosineSchedule(restarts=restarts, **schedule))
    return Config(optimizer=optimizer, training=TrainingConfig(steps=steps))


def test_what_becomes_of_the_learning_rate_is_said():
    before = run_of(1800, final_fraction=0.0, learning_rate=0.02)
    longer = run_of(3600, final_fraction=0.0, learning_rate=0.02)
    anew = run_of(3600, 1800, final_fraction=0.0, learning_rate=0.02, warmup_steps=0)
    assert describe_change(before, longer, 1800) == (
        "learning rate 0 at step 1800, 0.01 at step 1801, as a schedule over 3600 steps has it; "
        "--optimizer.schedule.restarts 1800 begins a new one, with warm-up and decay, over the added steps."
    )
    assert (
        describe_change(before, anew, 1800) == "learning rate 0 at step 1800, 0.02 at step 1801: a new schedule begins."
    )
    assert "--optimizer.schedule.restarts 1800 3600 begins" in describe_change(anew, run_of(5000, 1800), 3600)
    assert describe_change(anew, anew, 2000) == describe_change(before, longer, 0) == ""


def test_a_schedule_that_was_trained_with_stays():
    describe_change(run_of(100, 50), run_of(100), 50)  # not there yet
    kept = (
        r"before step 51, .* must stay as they were, 50; got none\. Give --optim.*restarts 50 to keep .* 50 51 to begin"
    )
    with pytest.raises(UserError, match=kept):
        describe_change(run_of(100, 50), run_of(100), 51)
    with pytest.raises(
        UserError, match=r"got 20\. Leave them out to keep .* --optimizer\.schedule\.restarts 100 to begin"
    ):
        describe_change(run_of(100), run_of(200, 20), 100)


@pytest.mark.parametrize("restarts", [(0,), (5, 5), (7, 3), (-1,)])
def test_restarts_rise(restarts):
    with pytest.raises(UserError, match="must be rising steps above 0"):
        AdamW(schedule=CosineSchedule(restarts=restarts))


@pytest.mark.parametrize(("restarts", "warmup"), [((100,), 0), ((150,), 0), ((95,), 6), ((5,), 6)])
def test_each_schedule_has_room_for_its_warm_up(restarts, warmup):
    with pytest.raises(UserError, match="raise training"):
        run_of(100, *restarts, warmup_steps=warmup)
