"""The report in a browser: its numbers equal the runs' numbers, pointing at it changes it, and it requests nothing."""

import json
import re

import numpy as np
import pytest
from chromium import chromium

from transformer.analysis.report_page import MOST_POINTS, Curve, RunView, render_report, thinned

STEPS = np.arange(10, 210, 10)


def view(name, *, shift=0.0, **changes):
    """A run with curves of train and validation, samples, scores, settings and times."""
    loss = 3 / np.sqrt(STEPS) + shift
    values = {
        "settings": {"objective.kind": "next_token", "data.tokenizer.kind": "bytes", "optimizer.learning_rate": shift},
        "changed": ["optimizer.learning_rate"],
        "curves": {
            ("loss", "train"): Curve(STEPS, loss),
            ("loss", "validation"): Curve(STEPS[9::10], loss[9::10] + 0.125),
            ("learning_rate", "train"): Curve(STEPS, np.linspace(0.01, 0, 20)),
        },
        "seconds": {"start": 1.0, "step": 6.0, "evaluation": 3.0},
        "latest": 200,
        "samples": [(100, f"early {name}"), (200, f"late {name}")],
        "scores": [],
        "notes": [],
    }
    return RunView(name, **(values | changes))


CLASSES = ["good", "<b>bad</b>"]
SCORES = {
    "split": "validation",
    "step": 200,
    "source": ["reviews.jsonl"],
    "accuracy": 0.75,
    "classes": CLASSES,
    "confusion": [[8, 2], [3, 7]],
}


def data_of(text):
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


RUNS = [view("a </script><b>", scores=[SCORES]), view("b", shift=0.5)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(RUNS), "utf-8")
    return path


@pytest.fixture
def opened(browser, page):
    """The browser with the page in it, which must have asked for nothing else and said nothing."""
    browser.problems.clear()
    browser.requests.clear()
    browser.open(page)
    yield browser
    browser.run("1")
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.resolve().as_uri()]


def tip(browser):
    """What is shown beside the pointer: its heading, and a number by name."""
    rows = "[...document.querySelectorAll('.tip div')]"
    found = browser.run(
        f"{rows}.map(r => [r.querySelector('span').textContent, +r.querySelector('output').textContent])"
    )
    return browser.text(".tip b"), dict(found)


def test_what_it_shows_at_first(opened):
    assert opened.text("h1") == "a </script><b> · b"
    assert opened.run("[...document.querySelectorAll('figcaption')].map(c => c.innerText)") == [
        "Loss nats",
        "Learning rate",
    ]
    assert opened.run("document.querySelectorAll('[data-metric=loss] path.curve').length") == 4
    assert opened.run("document.querySelectorAll('#legend button').length") == 2
    assert "early" not in opened.text("#samples") and "late a </script><b>" in opened.text("#samples")


def test_pointing_at_a_curve_reads_the_values_of_every_run(opened):
    for share, index in ((0.04, 0), (0.5, 9), (0.99, 19)):
        opened.hover("[data-metric=loss] svg", 0.15 + 0.83 * share, 0.4)
        heading, values = tip(opened)
        step = int(heading.removeprefix("step "))
        assert abs(step - STEPS[index]) <= 10
        at = list(STEPS).index(step)
        for run in RUNS:
            assert values[f"{run.name}, train"] == pytest.approx(run.curves["loss", "train"].values[at], rel=1e-5)
    assert values["b, validation"] == pytest.approx(RUNS[1].curves["loss", "validation"].values[1], rel=1e-5)
    assert opened.run("document.querySelectorAll('.cross').length") == 2  # in every picture at the same step


def test_keys_go_along_a_curve(opened):
    opened.run("document.querySelector('[data-metric=learning_rate] svg').focus()")
    for key, step in (("Home", 10), ("ArrowRight", 20), ("End", 200), ("ArrowLeft", 190)):
        opened.press(key)
        heading, values = tip(opened)
        assert heading == f"step {step}"
        assert values["b, train"] == pytest.approx(0.01 * (1 - (step / 10 - 1) / 19), rel=1e-4)


def test_a_run_can_be_hidden(opened):
    opened.click("#legend button:nth-child(1)")
    assert opened.run("document.querySelectorAll('[data-metric=loss] path.curve').length") == 2
    opened.hover("[data-metric=loss] svg", 0.5, 0.4)
    assert all(name.startswith("b, ") for name in tip(opened)[1])
    opened.click("#legend button:nth-child(1)")
    assert opened.run("document.querySelectorAll('[data-metric=loss] path.curve').length") == 4


def test_the_scale_can_be_logarithmic(opened):
    curve = "document.querySelector('[data-metric=loss] path.curve').getAttribute('d')"
    linear = opened.run(curve)
    opened.click("#scale button:nth-child(2)")
    assert opened.run(curve) != linear
    assert opened.run("document.querySelector('#scale [aria-checked=true]').textContent") == "logarithmic"


def test_samples_go_with_the_slider(opened):
    opened.run(
        "(() => { const r = document.getElementById('samples-range'); r.value = 0; r.dispatchEvent(new Event('input')); })()"
    )
    assert "step 100" in opened.text("#samples-step")
    assert opened.run("[...document.querySelectorAll('#samples pre')].map(p => p.textContent)") == [
        "early a </script><b>",
        "early b",
    ]


def test_the_confusion_matrix_tells_its_cells(opened):
    assert opened.run("[...document.querySelectorAll('.matrix th')].map(c => c.textContent)") == [
        "",
        *CLASSES,
        *CLASSES,
    ]
    assert opened.run("[...document.querySelectorAll('.matrix td')].map(c => +c.textContent)") == [8, 2, 3, 7]
    opened.hover(".matrix tr:nth-child(3) td:nth-child(2)")
    assert "3 of 10 of class “<b>bad</b>” were given “good” (30.0 %)." in opened.text("#scores")
    assert "0.75" in opened.text("#scores dl")


def test_times_differences_and_latest_values(opened):
    times = opened.text("#times")
    assert "10 s together" in times and "steps: 6 s (60.0 %)" in times and "waiting for data" not in times
    widths = "[...document.querySelectorAll('.bar')[0].children].map(p => p.style.width)"
    assert opened.run(widths) == ["10%", "60%", "30%"]
    cells = "[...document.querySelectorAll('#settings tr')].map(r => [...r.cells].map(c => c.textContent))"
    assert opened.run(cells)[1:] == [["optimizer.learning_rate", "0.0", "0.5"]]
    latest = opened.run(
        "[...document.querySelectorAll('#latest tr')].map(r => [...r.cells].map(c => c.firstChild?.textContent))"
    )
    by_name = {row[0]: [float(x) for x in row[1:]] for row in latest[1:]}
    expected = [run.curves["loss", "validation"].values[-1] for run in RUNS]
    assert by_name["Loss, validation"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_phone(browser, page, dark):
    browser.problems.clear()
    browser.open(page, width=360, height=740, dark=dark, phone=True)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    light = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != dark and browser.problems == []
    browser.hover("[data-metric=loss] svg", 0.9, 0.4)
    assert browser.run("document.querySelector('.tip').getBoundingClientRect().right") <= 360


def test_a_run_without_anything(browser, tmp_path):
    """What is not there is not drawn; values that are not finite leave gaps."""
    empty = view("empty", settings={}, changed=[], curves={}, seconds={}, latest=0, samples=[], notes=["No rows yet."])
    odd = view("odd", curves={("loss", "train"): Curve(STEPS[:4], np.array([2.0, np.nan, np.inf, 1.0]))}, samples=[])
    path = tmp_path / "report.html"
    for runs, title in (([empty], "empty"), ([empty, odd], "empty · odd")):
        path.write_text(render_report(runs), "utf-8")
        browser.problems.clear()
        browser.open(path)
        assert browser.text("h1") == title and "No rows yet." in browser.text("#notes") and browser.problems == []
    assert "2 values not finite" in browser.text("#notes")
    assert browser.run("document.querySelector('path.curve').getAttribute('d').match(/M/g).length") == 2
    assert browser.run("document.getElementById('samples-section').hidden")
    browser.run("document.querySelector('[data-metric=loss] svg').focus()")
    for key, value in (("Home", "2"), ("ArrowRight", "not finite")):
        browser.press(key)
        assert browser.text(".tip output") == value


def test_objectives_that_differ_are_named():
    other = view("other", settings={"objective.kind": "masked_lm", "data.tokenizer.kind": "bytes"})
    (note,) = data_of(render_report([view("a"), other]))["notes"]
    assert "objective (masked_lm, next_token)" in note and "not comparable" in note
    assert data_of(render_report(RUNS))["notes"] == []


def test_a_million_steps_are_thinned_out_without_losing_a_spike():
    steps, values = np.arange(1_000_000), np.random.default_rng(0).normal(size=1_000_000)
    values[123_456], values[700_000] = 50.0, np.nan
    names = ("loss", "bits_per_byte", "accuracy", "grad_norm", "learning_rate")
    long = view("long", curves={(name, "train"): Curve(steps, values) for name in names})
    text = render_report([long])
    assert len(text.encode()) < 5e6
    found_steps, found = data_of(text)["runs"][0]["curves"]["loss"]["train"]
    assert len(found) <= MOST_POINTS // len(names) and found_steps[0] == 0 and found_steps[-1] == 999_999
    assert found[found_steps.index(123_456)] == 50.0 and found[found_steps.index(700_000)] is None
    np.testing.assert_allclose([v for v in found if v is not None][:100], values[found_steps[:100]], rtol=1e-6)


@pytest.mark.parametrize("most", [1, 2, 5, 30, 1000])
def test_thinning_keeps_the_ends_and_the_bound(most):
    values = np.random.default_rng(most).normal(size=500)
    kept = thinned(values, most)
    assert len(kept) <= max(most, 5) and kept[0] == 0 and kept[-1] == 499
    assert (most < 3) or values.argmax() in kept


def test_nothing_in_a_run_ends_the_script(page):
    text = page.read_text("utf-8")
    assert data_of(text)["runs"][0]["name"] == "a </script><b>" and "<b>bad" not in text
