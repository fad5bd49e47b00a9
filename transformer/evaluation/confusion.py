"""Scores of a classifier from its confusion matrix."""

import numpy as np
from jaxtyping import Float


def class_scores(confusion_CC: Float[np.ndarray, "C C"]) -> list[dict[str, float]]:
    """Precision, recall, F1 and support of each class, in order, as `sklearn.metrics.precision_recall_fscore_support`.

    Precision is TP / (TP + FP), recall TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN), support TP + FN. A ratio of nothing (the
    precision of a class that was never predicted) is 0.

    Args:
        confusion_CC: number of examples of each true class (row) and predicted class (column).
    """
    hits_C, support_C, predicted_C = np.diag(confusion_CC), confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)

    def share(whole_C: np.ndarray) -> np.ndarray:
        return hits_C / np.where(whole_C > 0, whole_C, 1)

    columns = (share(predicted_C), share(support_C), share((support_C + predicted_C) / 2), support_C)
    names = ("precision", "recall", "f1", "support")
    return [dict(zip(names, map(float, values), strict=True)) for values in zip(*columns, strict=True)]


def average_scores(confusion_CC: Float[np.ndarray, "C C"]) -> dict[str, dict[str, float]]:
    """The means of `class_scores`: `macro` of the classes that occur, as truth or as prediction, and `weighted` by support.

    As `sklearn.metrics.classification_report`; support is the number of all texts.

    Example:
        >>> found = average_scores(np.array([[8.0, 2.0, 0.0], [4.0, 6.0, 0.0], [0.0, 0.0, 0.0]]))
        >>> round(found["macro"]["precision"], 4), found["weighted"]["support"]
        (0.7083, 20.0)
    """
    support_C, predicted_C = confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)
    weights = {"macro": (support_C + predicted_C > 0).astype(float), "weighted": support_C}
    of_class = class_scores(confusion_CC)
    return {
        name: {
            score: float(np.dot(weights_C, [scores[score] for scores in of_class]) / max(weights_C.sum(), 1.0))
            for score in ("precision", "recall", "f1")
        }
        | {"support": float(support_C.sum())}
        for name, weights_C in weights.items()
    }


def macro_f1(confusion_CC: Float[np.ndarray, "C C"]) -> float:
    """The mean F1 of the classes that occur, as truth or as prediction (`sklearn.metrics.f1_score(average="macro")`).

    Args:
        confusion_CC: number of examples of each true class (row) and predicted class (column); the result is 0 without any.

    Example:
        >>> round(macro_f1(np.array([[8.0, 2.0, 0.0], [4.0, 6.0, 0.0], [0.0, 0.0, 0.0]])), 4)
        0.697
    """
    return average_scores(confusion_CC)["macro"]["f1"]
