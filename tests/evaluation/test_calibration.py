"""Calibration by its definition (Guo et al. 2017), its sums over batches, and its picture."""

import doctest
import math
import xml.etree.ElementTree as ET

import jax.numpy as jnp
import numpy as np
import pytest

from transformer.evaluation import calibration
from transformer.evaluation.calibration import (
    calibration_bins,
    calibration_statistics,
    expected_calibration_error,
    reliability_diagram,
)


def by_definition(probabilities, labels, bins=15):
    """A loop over bins and texts, as the paper has it."""
    total = 0.0
    for m in range(1, bins + 1):
        of_bin = [
            (max(row), int(np.argmax(row)) == label)
            for row, label in zip(probabilities.tolist(), labels, strict=True)
            if (m - 1) / bins < max(row) <= m / bins
        ]
        if of_bin:
            accuracy = sum(right for _, right in of_bin) / len(of_bin)
            confidence = sum(confidence for confidence, _ in of_bin) / len(of_bin)
            total += len(of_bin) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.fixture(scope="module")
def texts():
    draws = np.random.default_rng(0)
    probabilities = draws.dirichlet(np.full(3, 0.4), 500).astype(np.float32)
    return probabilities, draws.integers(0, 3, 500).astype(np.int32)


def test_is_the_definition_and_adds_over_batches(texts):
    probabilities, labels = texts
    sums = sum(
        np.asarray(calibration_statistics(jnp.array(probabilities[part]), jnp.array(labels[part]), jnp.ones(len(part))))
        for part in np.split(np.arange(500), [7, 250])
    )
    assert expected_calibration_error(sums) == pytest.approx(by_definition(probabilities, labels), rel=1e-5)
    assert sums[0].sum() == 500 and (sums[0] > 0).sum() == 10  # three classes: no confidence below a third
    assert sums[2].sum() == (probabilities.argmax(1) == labels).sum()


def test_by_hand():
    """Two texts of confidence 0.9, one right; one of 0.6, right: (2 |0.5 - 0.9| + |1 - 0.6|) / 3 = 0.4."""
    probabilities = jnp.array([[0.9, 0.1], [0.1, 0.9], [0.4, 0.6]])
    sums = np.asarray(calibration_statistics(probabilities, jnp.array([0, 0, 1]), jnp.ones(3)))
    assert expected_calibration_error(sums) == pytest.approx(0.4, rel=1e-6)
    low, high = calibration_bins(sums)
    assert (low["texts"], high["texts"], low["accuracy"], high["accuracy"]) == (1, 2, 1.0, 0.5)
    assert low["above"] < 0.6 <= low["up_to"] + 1e-6 and math.isclose(high["confidence"], 0.9, rel_tol=1e-6)


def test_a_text_of_no_weight_counts_for_nothing_whatever_it_holds():
    probabilities = jnp.array([[0.9, 0.1], [jnp.nan, jnp.nan]])
    sums = np.asarray(calibration_statistics(probabilities, jnp.array([0, 0]), jnp.array([1.0, 0.0])))
    assert np.isfinite(sums).all() and sums[0].sum() == 1
    assert expected_calibration_error(sums) == pytest.approx(0.1, rel=1e-6)


def test_certain_texts_are_in_the_last_bin():
    sums = np.asarray(calibration_statistics(jnp.array([[1.0, 0.0]]), jnp.array([0]), jnp.ones(1)))
    assert sums[:, -1].tolist() == [1.0, 1.0, 1.0] and expected_calibration_error(sums) == 0


def test_the_picture_has_a_bar_for_each_bin_and_escapes_its_title(texts):
    probabilities, labels = texts
    sums = np.asarray(calibration_statistics(jnp.array(probabilities), jnp.array(labels), jnp.ones(500)))
    bins = calibration_bins(sums)
    text = reliability_diagram(bins, expected_calibration_error(sums), 'runs/<script>&"\x1b')
    root = ET.fromstring(text)
    bars = [node for node in root.iter() if node.get("class") == "accuracy" and node.get("width") != "12.00"]
    assert [float(bar.get("height")) for bar in bars] == pytest.approx(
        [400 * row["accuracy"] for row in bins], abs=0.01
    )
    counts = [float(node.get("height")) for node in root.iter() if node.get("class") == "count"]
    assert sum(counts) == pytest.approx(72, abs=0.1)
    titles = [node.text for node in root.iter() if node.get("class") == "title"]
    assert (
        titles == ['runs/<script>&"\\x1b']
        and "<script" not in text
        and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    )


def test_examples():
    assert doctest.testmod(calibration).failed == 0
