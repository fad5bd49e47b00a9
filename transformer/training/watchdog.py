"""Ends a process that hangs, which lets the other processes of its run end too."""

import contextlib
import faulthandler
import sys
from collections.abc import Iterator
from typing import Any

import jax

from transformer.types import PyTree

SEVERAL_PROCESSES = 1800
"""Time limit in seconds of a step in a run of several processes, unless `training.hang_timeout` is set."""
PATIENCE = 4 * 3600
"""Time limit in seconds of each compilation, evaluation, sample, save or restoration."""


class Watchdog:
    """Ends the process, with every thread's traceback and exit status 1, when the next sign of life is late.

    It uses `faulthandler`, a C thread that needs no Python lock: it also ends a process that waits forever in a collective
    operation between devices. The others then notice its absence, or wait for it until their own watchdogs end them.

    Args:
        seconds: time limit of a step; 0 means 1,800 in a run of several processes and no limit in a single one.
        patience: time limit in seconds of operations longer than a step; at least `seconds`.
    """

    def __init__(self, seconds: int = 0, patience: int = PATIENCE) -> None:
        self.seconds = seconds or (SEVERAL_PROCESSES if jax.process_count() > 1 else 0)
        self._patience = max(patience, self.seconds)
        self._compiled: set[Any] = set()
        self._long_steps = 0

    def step(self, batch: PyTree) -> None:
        """Start of a step; the first step with a new batch shape is compiled first."""
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            self._compiled.add(shapes)
            self.long()
        elif self._long_steps > 0:
            self._arm(self._patience)
        else:
            self._arm(self.seconds)
        self._long_steps -= 1

    def long(self) -> None:
        """Start of a long operation; the next two steps may have to wait for other processes to finish theirs."""
        self._arm(self._patience)
        self._long_steps = 2

    def _arm(self, seconds: int) -> None:
        if self.seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=_stderr())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context that ends the watch on exit; it starts with a long operation."""
        self.long()
        try:
            yield
        finally:
            if self.seconds:
                faulthandler.cancel_dump_traceback_later()


def _stderr() -> Any:
    """The destination of tracebacks: an operating system file, unlike `sys.stderr` in a notebook."""
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2
    return sys.stderr
