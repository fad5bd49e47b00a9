"""Evaluations since the lowest validation loss: training stops after `training.patience` of them without a lower one."""

import math
from collections.abc import Mapping
from typing import Any


class Patience:
    """The lowest validation loss and the evaluations since; its `state` is in every checkpoint, with or without a limit.

    Args:
        state: the state stored in a checkpoint; empty before the first evaluation.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._loss: float = float(state.get("loss", math.inf))
        self._step: int = int(state.get("step", 0))
        self.since: int = int(state.get("since", 0))

    @property
    def state(self) -> dict[str, Any]:
        """The argument of `__init__`, ready for JSON."""
        return {"since": self.since} | ({"loss": self._loss, "step": self._step} if self._step else {})

    def add(self, step: int, loss: float) -> bool:
        """Count an evaluation; returns whether its loss is the lowest so far. A loss that is not finite never is."""
        better = math.isfinite(loss) and loss < self._loss
        self.since += 1
        if better:
            self._loss, self._step, self.since = loss, step, 0
        return better

    def ended(self, limit: int) -> bool:
        """Whether `limit` evaluations have passed without a lower loss; 0 means no limit."""
        return 0 < limit <= self.since

    def describe(self) -> str:
        """The lowest loss, for the user."""
        best = f"the lowest, {self._loss:.4g}, was at step {self._step}" if self._step else "none was finite"
        return f"no lower validation loss in {self.since} evaluations; {best}"
