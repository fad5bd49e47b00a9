"""Locates divergence: the steps since the last checkpoint are repeated, and the first step that is not finite is examined."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from transformer.layers.scan_params import loop_params
from transformer.runs.directory import CHECKPOINTS
from transformer.runs.recipe import Run
from transformer.training import loop
from transformer.training.checkpoint import Checkpointer
from transformer.training.divergence import first_not_finite, split
from transformer.types import UserError


@contextlib.contextmanager
def located(run: Run, report: Callable[[str], object]) -> Iterator[None]:
    """If training diverges inside the context, add the layer to its error.

    Args:
        run: the run that trains in its directory.
        report: receives a sentence for the user, because the search may take as long as the steps since the last checkpoint.
    """
    try:
        yield
    except loop.NotFinite as error:
        directory = epath.Path(run.config.workdir) / CHECKPOINTS
        with contextlib.closing(Checkpointer(directory, report=report)) as checkpointer:
            found = locate(run, checkpointer, error.step, report)
        raise UserError(f"{error} {found}".strip()) from error


def locate(run: Run, checkpointer: Checkpointer, step: int, report: Callable[[str], object]) -> str:
    """A sentence on the first layer that is not finite at a step; empty if it cannot be found.

    Steps are deterministic: repeating those since the last checkpoint gives the state before the step, and nothing is stored
    for the search while a run is healthy. With several processes, none of which has the whole batch, no search is done.
    """
    if jax.process_count() > 1:
        return ""
    try:
        return _locate(run, checkpointer, step, report)
    except Exception as error:  # the original error must be reported in any case
        return f"The layer was looked for, without success: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _locate(run: Run, checkpointer: Checkpointer, step: int, report: Callable[[str], object]) -> str:
    batches: Any = run.data.train_batches(run.tokenizer, **run.own_part)
    restored = checkpointer.restore(run.state)
    if restored:
        batches.set_state(restored.loop["batches"])
    done = restored.step if restored else 0
    state = run.runner.place_state(restored.state._replace(frozen=())) if restored else run.init_state()
    state = state._replace(frozen=run.frozen())
    report(f"Looking for the first layer that is not finite at step {step}; steps from {done + 1} on are repeated.")
    for _ in range(done + 1, step):
        state, _ = run.runner.step(state, run.runner.place_batch(next(batches)))
    state = run.runner.fetch_state(state)

    # In a looped stack without recomputation, every module's output is observable.
    params = loop_params(state.model_params) if run.config.model.scan_layers else state.model_params
    looped = run.steps.parts.changed(scan_layers=False, remat="none")
    parts = split(
        jax.device_get(state.carry),
        jax.device_get(next(batches)),
        jax.random.fold_in(state.key, state.step),
        devices=run.runner.num_programs,
        accumulate_steps=run.config.optimizer.accumulate_steps,
    )
    scale = state.loss_scale.scale if state.loss_scale else 1.0
    return first_not_finite(looped.loss, params, list(parts), scale=scale)
