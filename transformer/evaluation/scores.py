"""The sums of an objective's statistics over a whole split."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from transformer.types import PyTree, Statistics
from transformer.validation import require

_PENDING = 8  # steps in flight: the device stays busy, and no more batches need memory


def sum_statistics(
    evaluate_step: Callable[[PyTree, PyTree, Any], tuple[PyTree, Statistics]],
    params: PyTree,
    batches: Iterable[Any],
    carry: PyTree = (),
    *,
    split: str = "",
) -> dict[str, Any]:
    """Add the statistics of every batch in float64, in order.

    Args:
        evaluate_step: `(params, carry, batch) -> (carry, statistics)`, compiled.
        params: the parameters for `evaluate_step`.
        batches: the batches of the split for `evaluate_step`.
        carry: the objective's initial carry.
        split: the name of the split, for errors.

    Raises:
        UserError: there is no batch, or no target with weight.
    """
    pending: collections.deque[Statistics] = collections.deque()
    sums: dict[str, Any] = {}
    number = 0

    def add(statistics: Statistics) -> None:
        for name, value in jax.device_get(statistics).items():
            require(
                not np.any(np.isnan(value)),
                f"Scores must be numbers, the {name} of batch {number} of the {split or 'given'} split is NaN; "
                "the parameters are not finite, or overflow in half precision: take an earlier checkpoint, or "
                "model.dtype=float32.",
            )
            sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)

    for batch in batches:
        carry, statistics = evaluate_step(params, carry, batch)
        pending.append(statistics)
        if len(pending) > _PENDING:
            number += 1
            add(pending.popleft())
    while pending:
        number += 1
        add(pending.popleft())
    require(number > 0, "Scores need at least one batch, got none; choose a split that holds something.")
    require(
        bool(sums.get("weight", 1) > 0), "Scores need a target that counts, all have weight 0; choose another split."
    )
    return {name: float(value) if value.ndim == 0 else value for name, value in sums.items()}
