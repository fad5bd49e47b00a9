"""Macro-F1 by its definition."""

import numpy as np
import pytest

from transformer.evaluation.confusion import macro_f1


def test_by_hand():
    confusion = np.array([[50.0, 10.0, 0.0], [5.0, 20.0, 5.0], [0.0, 0.0, 10.0]])
    f1 = []
    for c in range(3):
        precision, recall = confusion[c, c] / confusion[:, c].sum(), confusion[c, c] / confusion[c].sum()
        f1.append(2 * precision * recall / (precision + recall))
    assert macro_f1(confusion) == pytest.approx(np.mean(f1))


def test_a_class_that_is_not_there_counts_zero():
    assert macro_f1(np.array([[4.0, 0.0], [0.0, 0.0]])) == 0.5
    assert macro_f1(np.zeros((2, 2))) == 0
