"""From sums to metrics: per-token loss, bits per byte, accuracy; and the window of steps that a row covers."""

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

from transformer.training.step import PER_STEP

TIMINGS = ("tokens_per_second", "mfu")
"""Metrics that differ between two runs of the same arithmetic."""


def derive(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of summed statistics: `loss` (nats a token) and, where their sums are there, the others.

    bits_per_byte = loss / (ln 2 * bytes), accuracy = correct / weight, objective = objective / weight.
    With no weight at all (nothing but padding) there is nothing to report but zeros.
    """
    weight = sums["weight"] or 1.0
    metrics = {"loss": sums["loss"] / weight}
    if sums.get("bytes", 0.0) > 0:
        metrics["bits_per_byte"] = sums["loss"] / (math.log(2) * sums["bytes"])
    if "correct" in sums:
        metrics["accuracy"] = sums["correct"] / weight
    if sums.get("objective", sums["loss"]) != sums["loss"]:
        metrics["objective"] = sums["objective"] / weight
    return metrics


class Window:
    """Statistics of the steps since the last row, added in float64 in the order of the steps."""

    def __init__(self, sums: Mapping[str, float]) -> None:
        self.sums = dict(sums)
        self._per_step: dict[str, float] = {}

    def add(self, statistics: Mapping[str, float]) -> None:
        """Add one step."""
        for name, value in statistics.items():
            if name in PER_STEP:
                self._per_step[name] = value
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value

    def close(self) -> dict[str, float]:
        """The metrics of the window, with the last step's own; the next window is empty."""
        metrics = {**derive(self.sums), **self._per_step}
        self.sums = {}
        return metrics


class Speed(NamedTuple):
    """What a step amounts to, in tokens and in operations."""

    tokens_per_step: int
    flops_per_token: float
    peak_flops: float  # of all devices together; 0 if unknown, and then MFU is left out

    def metrics(self, steps_per_second: float) -> dict[str, float]:
        """Tokens a second, and MFU: model FLOPs utilisation (Chowdhery et al. 2022, section 4.1)."""
        tokens_per_second = self.tokens_per_step * steps_per_second
        if self.peak_flops <= 0:
            return {"tokens_per_second": tokens_per_second}
        return {
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops_per_token / self.peak_flops,
        }


class Stopwatch:
    """Steps a second, pauses (evaluation, checkpoints) left out, and the first step, which compiles, where possible."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._laps: list[float] = []
        self._compiling = True

    def lap(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self._laps.append(now - self._last)
        self._last = now

    def skip(self) -> None:
        """Leave out the time since the last lap."""
        self._last = time.perf_counter()

    def close(self) -> float:
        """Steps a second since the last call."""
        laps = self._laps[1:] if self._compiling and len(self._laps) > 1 else self._laps
        self._laps, self._compiling = [], False
        return len(laps) / sum(laps)
