"""Scores of a classifier from its confusion matrix."""

import numpy as np
from jaxtyping import Float


def macro_f1(confusion_CC: Float[np.ndarray, "C C"]) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN); a class that neither occurs nor is given counts 0.

    Args:
        confusion_CC: how many examples of the row's class were given the column's.

    Example:
        >>> round(macro_f1(np.array([[8.0, 2.0], [4.0, 6.0]])), 4)
        0.697
    """
    hits_C = np.diag(confusion_CC)
    both_C = confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1)
    return float(np.mean(2 * hits_C / np.where(both_C > 0, both_C, 1)))
