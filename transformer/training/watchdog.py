"""A process that hangs ends, so that the others of its run do too."""

import contextlib
import faulthandler
import sys
from collections.abc import Iterator
from typing import Any

import jax

SEVERAL_PROCESSES = 1800
"""Seconds a step may take in a run of several processes, unless `training.hang_timeout` says otherwise."""
PATIENCE = 4 * 3600
"""Seconds that compiling, evaluating, sampling, saving or restoring may take, each."""


class Watchdog:
    """Ends the process, with every thread's traceback and exit status 1, when the next sign of life is late.

    It is `faulthandler`'s, a thread of C that needs no lock of Python's: it also ends a process that waits for ever in an
    exchange between devices. The others then see that it is gone, or wait for it and end by their own.

    Args:
        seconds: that a step may take; 0 for 1,800 in a run of several processes and no limit in one of a single one.
        patience: seconds for what is longer than a step; at least `seconds`.
    """

    def __init__(self, seconds: int = 0, patience: int = PATIENCE) -> None:
        self.seconds = seconds or (SEVERAL_PROCESSES if jax.process_count() > 1 else 0)
        self._patience = max(patience, self.seconds)
        self._compiled: set[Any] = set()
        self._long_steps = 0

    def step(self, batch: Any) -> None:
        """A step begins; one with a batch of new shapes is compiled first."""
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
        """Something longer than a step begins; the two steps after it may have to wait for other processes to end theirs."""
        self._arm(self._patience)
        self._long_steps = 2

    def _arm(self, seconds: int) -> None:
        if self.seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=_stderr())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context after which nothing is watched any more; it begins with something long."""
        self.long()
        try:
            yield
        finally:
            if self.seconds:
                faulthandler.cancel_dump_traceback_later()


def _stderr() -> Any:
    """Where tracebacks go: a file of the operating system, which a notebook's `sys.stderr` is not."""
    try:
        sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2
    return sys.stderr
