"""A trace of some steps, for TensorBoard's profile page, XProf or Perfetto."""

from collections.abc import Callable
from typing import Any

import jax
from etils import epath


def trace_hooks(steps: tuple[int, int], directory: epath.Path, report: Callable[[str], object] = print) -> list[Any]:
    """The hook of `training.loop` that traces from the first to the last of `steps`; none for (0, 0).

    Args:
        steps: the first and the last.
        directory: where the trace goes, one for each process.
        report: takes a sentence for the user.
    """
    first, last = steps
    tracing = False

    def hook(step: int, state: Any, statistics: Any) -> None:
        nonlocal tracing
        del state
        if tracing and step >= last:
            jax.block_until_ready(statistics)
            jax.profiler.stop_trace()
            tracing = False
            report(f"Steps {first} to {last} are traced in {directory}.")
        # Hooks come after their step: the trace of the first begins when the one before has ended.
        elif step == first - 1:
            jax.block_until_ready(statistics)
            jax.profiler.start_trace(str(directory))
            tracing = True

    return [hook] if steps != (0, 0) else []
