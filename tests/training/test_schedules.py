"""Learning rates by step are those of their definitions."""

import itertools
import math

import jax
import numpy as np
import pytest

from transformer.config import OptimizerConfig
from transformer.training.schedules import make_schedule

STEPS, WARMUP, PEAK = 101, 10, 2.0
NAMES = ["cosine", "linear", "inverse_sqrt", "constant", "wsd"]


def schedule(name, steps=STEPS, **changes):
    config = OptimizerConfig(**{"schedule": name, "learning_rate": PEAK, "warmup_steps": WARMUP, **changes})
    return make_schedule(config, steps)


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
