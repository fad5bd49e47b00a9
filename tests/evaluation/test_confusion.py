"""Scores of a confusion matrix by their definitions, and as scikit-learn 1.9 gives them."""

import numpy as np
import pytest

from transformer.evaluation.confusion import average_scores, class_scores, macro_f1

# precision_recall_fscore_support(truth, prediction, labels=range(C), zero_division=0) and f1_score(..., average="macro").
GOLDEN = {
    "all classes occur": (
        [[50, 10, 0], [5, 20, 5], [0, 0, 10]],
        0.778743961352657,
        [0.9090909090909091, 0.6666666666666666, 0.6666666666666666],
        [0.8333333333333334, 0.6666666666666666, 1.0],
        [0.8695652173913043, 0.6666666666666666, 0.8],
    ),
    "one class, all right": ([[4, 0], [0, 0]], 1.0, [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]),
    "predicted only": ([[4, 1], [0, 0]], 0.4444444444444444, [1.0, 0.0], [0.8, 0.0], [0.8888888888888888, 0.0]),
    "never right": (
        [[0, 0, 0], [3, 0, 2], [0, 0, 5]],
        0.2777777777777778,
        [0.0, 0.0, 0.7142857142857143],
        [0.0, 0.0, 1.0],
        [0.0, 0.0, 0.8333333333333334],
    ),
    "two that do not occur": (
        [[3, 2, 0, 0], [1, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        0.696969696969697,
        [0.75, 0.6666666666666666, 0.0, 0.0],
        [0.6, 0.8, 0.0, 0.0],
        [0.6666666666666666, 0.7272727272727273, 0.0, 0.0],
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_as_scikit_learn(case):
    confusion, macro, *columns = GOLDEN[case]
    confusion = np.array(confusion, float)
    assert macro_f1(confusion) == pytest.approx(macro, rel=1e-12)
    scores = class_scores(confusion)
    for name, expected in zip(("precision", "recall", "f1"), columns, strict=True):
        assert [score[name] for score in scores] == pytest.approx(expected, rel=1e-12)
    assert [score["support"] for score in scores] == confusion.sum(axis=1).tolist()


# classification_report(truth, prediction, output_dict=True, zero_division=0) of scikit-learn 1.9: macro and weighted average.
AVERAGES = {
    "all classes occur": (
        [0.7474747474747474, 0.8333333333333334, 0.778743961352657],
        [0.8121212121212121, 0.8, 0.8017391304347825],
    ),
    "predicted only": ([0.5, 0.4, 0.4444444444444444], [1.0, 0.8, 0.888888888888889]),
    "never right": (
        [0.2380952380952381, 0.3333333333333333, 0.2777777777777778],
        [0.35714285714285715, 0.5, 0.4166666666666667],
    ),
    "two that do not occur": (
        [0.7083333333333333, 0.7, 0.696969696969697],
        [0.7083333333333333, 0.7, 0.696969696969697],
    ),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_averages_as_scikit_learn(case):
    confusion = np.array(GOLDEN[case][0], float)
    found = average_scores(confusion)
    for name, expected in zip(("macro", "weighted"), AVERAGES[case], strict=True):
        assert [found[name][score] for score in ("precision", "recall", "f1")] == pytest.approx(expected, rel=1e-12)
        assert found[name]["support"] == confusion.sum()


def test_nothing_scored_is_zero_without_a_warning():
    assert macro_f1(np.zeros((2, 2))) == average_scores(np.zeros((2, 2)))["weighted"]["f1"] == 0
    assert class_scores(np.zeros((1, 1))) == [{"precision": 0, "recall": 0, "f1": 0, "support": 0}]
