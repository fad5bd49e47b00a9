"""A trace of some steps, for TensorBoard's profile page, XProf or Perfetto."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath


@contextlib.contextmanager
def trace_steps(
    steps: tuple[int, int], directory: epath.Path, report: Callable[[str], object] = print
) -> Iterator[list[Any]]:
    """The hook of `training.loop` that traces from the first to the last of `steps`; no hook for (0, 0).

    Args:
        steps: the first and the last step. A run that ends between them leaves the trace of the steps so far.
        directory: the folder of the traces, one per process.
        report: receives a sentence for the user.
    """
    first, last = steps
    latest, tracing = 0, False

    def stop(statistics: Any) -> None:
        nonlocal tracing
        jax.block_until_ready(statistics)
        jax.profiler.stop_trace()
        tracing = False
        report(f"Steps {first} to {latest} are traced in {directory}.")

    def hook(step: int, state: Any, statistics: Any) -> None:
        nonlocal latest, tracing
        del state
        if latest == 0 and step >= first:
            report(f"Step {first} is not traced: the run continues from step {step}.")
        latest = step
        if tracing and step >= last:
            stop(statistics)
        # Hooks run after their step: the trace of the first step starts when the previous step has ended.
        elif step == first - 1:
            jax.block_until_ready(statistics)
            jax.profiler.start_trace(str(directory))
            tracing = True

    try:
        yield [hook] if steps != (0, 0) else []
    finally:
        if tracing:
            stop(())
