"""Metrics from sums: per-token loss, bits per byte, accuracy; and the window of steps that a row covers."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from transformer.evaluation.confusion import macro_f1
from transformer.training.step import PER_STEP

PARTS = ("start", "compile", "data", "step", "evaluation", "sample", "save")
"""The categories of a run's time. A start restores or initializes; compilation includes the first step after it."""
TIMINGS = ("tokens_per_second", "mfu", *(f"{part}_seconds" for part in PARTS))
"""Metrics that differ between two runs with the same arithmetic."""


def without_timings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that are equal in two runs with the same arithmetic."""
    return {name: value for name, value in metrics.items() if name not in TIMINGS}


_NAMED = ("loss", "weight", "correct", "bytes", "objective", "objective_weight")


def derive(sums: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of summed statistics: `loss` (nats per token), and the others if their sums are present.

    bits_per_byte = loss / (ln 2 * bytes), accuracy = correct / weight, objective = objective / weight (with class weights,
    / objective_weight); macro_f1 comes from a confusion matrix. Every other numeric sum, of routers or of user-defined
    objectives, is reported as its mean, / weight, under its name. If the weight is zero (only padding), all metrics are zero.
    """
    weight = sums["weight"] or 1.0
    metrics = {"loss": sums["loss"] / weight}
    if sums.get("bytes", 0.0) > 0:
        metrics["bits_per_byte"] = sums["loss"] / (math.log(2) * sums["bytes"])
    if "correct" in sums:
        metrics["accuracy"] = sums["correct"] / weight
    if sums.get("objective", sums["loss"]) != sums["loss"]:
        metrics["objective"] = sums["objective"] / (sums.get("objective_weight", 0.0) or weight)
    own = {name: value / weight for name, value in sums.items() if name not in _NAMED and np.ndim(value) == 0}
    if "confusion" in sums:
        metrics["macro_f1"] = macro_f1(np.asarray(sums["confusion"]))
    return metrics | own


class Window:
    """Statistics of the steps since the last row, added in float64 in the order of the steps."""

    def __init__(self, sums: Mapping[str, float]) -> None:
        self.sums = dict(sums)
        self._per_step: dict[str, float] = {}

    def add(self, statistics: Mapping[str, float]) -> None:
        """Add one step; a skipped step contributes only the statistics of a single step."""
        self._per_step = {}
        for name, value in statistics.items():
            if name in PER_STEP:
                self._per_step[name] = value
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value

    def close(self) -> dict[str, float]:
        """The metrics of the window and of its last step; resets the window."""
        metrics = {**(derive(self.sums) if self.sums else {}), **self._per_step}
        self.sums = {}
        return metrics


class Work(NamedTuple):
    """The work of a step, over all devices."""

    tokens: int = 0
    """Positions of the batch, padding included."""
    flops: float = 0.0
    """Operations of forward and backward (`training.flops`)."""


class Stopwatch:
    """Work per second, without pauses (evaluation, checkpoints) and without the first step, which compiles."""

    def __init__(self, peak_flops: float = 0.0) -> None:
        """`peak_flops` of all devices together; 0 (unknown) omits MFU."""
        self._peak_flops = peak_flops
        self._last = time.perf_counter()
        self._laps: list[tuple[float, Work]] = []
        self._compiling = True

    def lap(self, work: Work, at: float | None = None) -> None:
        """Record the end of a step, now or at a time of `time.perf_counter`."""
        now = time.perf_counter() if at is None else at
        self._laps.append((now - self._last, work))
        self._last = now

    def skip(self) -> None:
        """Exclude the time since the last lap."""
        self._last = time.perf_counter()

    def close(self) -> dict[str, float]:
        """Tokens per second, and MFU, model FLOPs utilization (Chowdhery et al. 2022, section 4.1), since the last call.

        Empty if no complete step was timed.
        """
        laps = self._laps[1:] if self._compiling else self._laps
        self._laps, self._compiling = [], False
        seconds = sum(lap for lap, _ in laps)
        if seconds <= 0.0:
            return {}
        metrics = {"tokens_per_second": sum(work.tokens for _, work in laps) / seconds}
        if self._peak_flops > 0:
            metrics["mfu"] = sum(work.flops for _, work in laps) / seconds / self._peak_flops
        return metrics


class Ledger:
    """Seconds by category (`PARTS`) since the last row. Each moment belongs to one category."""

    def __init__(self) -> None:
        self._part, self._last, self._seconds = PARTS[0], time.perf_counter(), dict[str, float]()

    def enter(self, part: str) -> None:
        """Assign the following time to a category."""
        now = time.perf_counter()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._last
        self._part, self._last = part, now

    def close(self) -> dict[str, float]:
        """Metrics of the time since the last call."""
        self.enter(self._part)
        seconds, self._seconds = self._seconds, {}
        return {f"{part}_seconds": round(seconds[part], 4) for part in PARTS if seconds.get(part, 0.0) >= 1e-4}
