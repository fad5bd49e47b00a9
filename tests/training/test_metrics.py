"""What a row says: sums over its steps, tokens a second and utilisation."""

import math

import pytest

from transformer.training import metrics
from transformer.training.metrics import Stopwatch, Window, Work, derive


def test_metrics_are_ratios_of_sums():
    sums = {"loss": 12.0, "objective": 16.0, "weight": 8.0, "correct": 2.0, "bytes": 24.0}
    assert derive(sums) == {
        "loss": 1.5,
        "bits_per_byte": pytest.approx(0.5 / math.log(2)),
        "accuracy": 0.25,
        "objective": 2.0,
    }


def test_metrics_without_their_sums_are_left_out():
    """The objective too, where it is the loss itself."""
    assert derive({"loss": 3.0, "objective": 3.0, "weight": 2.0, "bytes": 0.0}) == {"loss": 1.5}


def test_no_weight_at_all_is_zero_and_not_a_division():
    assert derive({"loss": 0.0, "weight": 0.0, "correct": 0.0}) == {"loss": 0.0, "accuracy": 0.0}


def test_a_window_weighs_its_steps_and_reports_the_last_step_of_what_does_not_add():
    window = Window({})
    window.add({"loss": 1.0, "weight": 1.0, "grad_norm": 5.0, "learning_rate": 0.1})
    window.add({"loss": 9.0, "weight": 3.0, "grad_norm": 7.0, "learning_rate": 0.2})
    assert window.close() == {"loss": 2.5, "grad_norm": 7.0, "learning_rate": 0.2}
    assert window.sums == {}


def test_a_window_goes_on_from_saved_sums():
    whole, first = Window({}), Window({})
    steps = [{"loss": 0.1 * n, "weight": 1.0} for n in range(1, 8)]
    for step in steps:
        whole.add(step)
    for step in steps[:3]:
        first.add(step)
    second = Window(first.sums)
    for step in steps[3:]:
        second.add(step)
    assert second.sums == whole.sums
    first.add(steps[0])
    assert second.sums == whole.sums, "the sums were shared, not copied"


@pytest.fixture
def clock(monkeypatch):
    """The time, as a list of one number."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def test_stopwatch_leaves_out_compilation_and_pauses(clock):
    watch = Stopwatch(peak_flops=300.0)

    def step(seconds, work):
        clock[0] += seconds
        watch.lap(work)

    step(60.0, Work(1000, 1000.0))  # compiles
    step(2.0, Work(100, 600.0))
    step(2.0, Work(20, 0.0))
    clock[0] += 100.0
    watch.skip()
    step(2.0, Work(60, 300.0))
    assert watch.close() == {"tokens_per_second": 30.0, "mfu": 0.5}
    step(4.0, Work(10, 0.0))
    assert watch.close() == {"tokens_per_second": 2.5, "mfu": 0.0}


def test_stopwatch_without_a_whole_step_says_nothing(clock):
    """The compiling step has no rate, nor has an interval that a clock cannot measure."""
    watch = Stopwatch(peak_flops=1.0)
    clock[0] = 10.0
    watch.lap(Work(5, 5.0))
    assert watch.close() == {}
    assert watch.close() == {}
    watch.lap(Work(5, 5.0))
    assert watch.close() == {}
    clock[0] = 11.0
    watch.lap(Work(5, 0.5))
    assert watch.close() == {"tokens_per_second": 5.0, "mfu": 0.5}


def test_what_routers_report_is_a_mean_by_weight():
    first = {"loss": 4.0, "objective": 5.0, "weight": 1.0, "load_balance": 1.0, "router_z": 2.0, "busiest_expert": 0.5}
    second = {"loss": 2.0, "objective": 4.0, "weight": 3.0, "load_balance": 6.0, "router_z": 3.0, "busiest_expert": 0.9}
    metrics = derive({name: first[name] + second[name] for name in first})
    expected = {"loss": 1.5, "objective": 2.25, "load_balance": 1.75, "router_z": 1.25, "busiest_expert": 0.35}
    assert metrics == pytest.approx(expected)
