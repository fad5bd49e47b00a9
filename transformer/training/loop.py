"""The training loop: steps, metric rows, evaluation, samples, checkpoints, and stopping in good order."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from transformer.config import TrainingConfig
from transformer.parallel.runner import Runner
from transformer.training.checkpoint import Checkpointer
from transformer.training.metrics import Stopwatch, Window
from transformer.training.signals import StopRequest
from transformer.training.state import TrainState, evaluation_params
from transformer.training.writers import Writer
from transformer.types import CheckpointableIterator, PyTree, Statistics, UserError

Evaluator = Callable[[PyTree], Mapping[str, float]]
"""Parameters as the runner places them -> metrics of a whole split."""
Sampler = Callable[[PyTree, int], None]
"""`(params of one copy, step)`: print or write a sample."""
Hook = Callable[[int, TrainState, Statistics], None]
"""`(step, state, statistics)` after every step; reading an array waits for the device, the state lives until the next step."""


def train(
    state: TrainState,
    *,
    config: TrainingConfig,
    runner: Runner,
    batches: CheckpointableIterator,
    checkpointer: Checkpointer,
    tokens_per_step: int,
    flops_per_token: float = 0.0,
    peak_flops: float = 0.0,
    writers: Sequence[Writer] = (),
    evaluators: Mapping[str, Evaluator] | None = None,
    sampler: Sampler | None = None,
    hooks: Sequence[Hook] = (),
) -> TrainState:
    """Train to `config.steps`, from the latest good checkpoint if there is one.

    The device is never waited for in a plain step: statistics are fetched while the next step runs. A resumed run
    writes the rows an uninterrupted one would have written, to the bit: the sums of a row not yet due are in the
    checkpoint, and rows after the checkpoint are dropped. SIGTERM and SIGINT finish the step, save and return.

    Args:
        state: of one copy, before the first step; shapes and shardings of what is restored.
        config: how long, and how often to report, evaluate, sample and save.
        runner: the compiled steps.
        batches: this process's rows of the training batches, without end.
        checkpointer: where state, place in the data and open sums are saved.
        tokens_per_step: positions of a batch (rows x length), for the speed.
        flops_per_token: of forward and backward, for MFU.
        peak_flops: of all devices; 0 leaves MFU out.
        writers: take the metric rows; closed at the end.
        evaluators: split -> evaluator; the loss of `validation` decides which checkpoint is the best.
        sampler: called at `sample_every`.
        hooks: called after every step.

    Returns:
        The last state, of one copy.

    Raises:
        UserError: the loss or the gradient is not finite; earlier checkpoints stay.
    """
    evaluators = evaluators or {}

    # ---- Resume -----------------------------------------------------------------------------------------------------
    restored = checkpointer.restore(state)
    start = restored.step if restored else 0
    if restored:
        state = restored.state
        batches.set_state(restored.loop["batches"])
    checkpointer.clean(start)
    for writer in writers:
        writer.resume(start)
    state = runner.place_state(state)
    report = _Report(writers, config, Window(restored.loop["window"] if restored else None))
    report.speed = (tokens_per_step, flops_per_token, peak_flops)

    # ---- Steps ------------------------------------------------------------------------------------------------------
    try:
        with StopRequest() as stop:
            for step in range(start + 1, config.steps + 1):
                state, statistics = runner.step(state, runner.place_batch(next(batches)))
                report.settle()  # the step before, while the device works on this one
                report.in_flight = (step, statistics)
                for hook in hooks:
                    hook(step, state, statistics)

                stopping, last = bool(stop), step == config.steps
                evaluating = bool(evaluators) and (last or _due(step, config.eval_every))
                sampling = sampler is not None and (last or _due(step, config.sample_every))
                saving = last or stopping or _due(step, config.checkpoint_every)
                if not (evaluating or sampling or saving):
                    continue

                # ---- Evaluate: after this step's own row, with the device idle ----------------------------------------
                report.settle()
                validation_loss = None
                if evaluating:
                    for split, evaluator in evaluators.items():
                        metrics = evaluator(evaluation_params(state))
                        report.write(step, split, metrics)
                        validation_loss = metrics["loss"] if split == "validation" else validation_loss

                # ---- Sample -------------------------------------------------------------------------------------------
                if sampling:
                    sampler(runner.fetch_state(evaluation_params(state)), step)

                # ---- Save: this step's loss is known and finite, its rows are written ----------------------------------
                if saving:
                    loop = {"batches": batches.get_state(), "window": report.window.sums}
                    checkpointer.save(runner.fetch_state(state), loop, validation_loss=validation_loss)
                report.stopwatch.skip()
                if stopping:
                    break
    finally:
        checkpointer.wait()
        for writer in writers:
            writer.close()
    return runner.fetch_state(state)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Report:
    """Turns the statistics of steps, fetched one step late, into rows."""

    def __init__(self, writers: Sequence[Writer], config: TrainingConfig, window: Window) -> None:
        self.window = window
        self.stopwatch = Stopwatch()
        self.in_flight: tuple[int, Statistics] | None = None
        self.speed: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self._writers = writers
        self._config = config

    def settle(self) -> None:
        """Wait for the step in flight; add its statistics, and write a row where one is due."""
        if self.in_flight is None:
            return
        (step, statistics), self.in_flight = self.in_flight, None
        values = {name: float(value) for name, value in jax.device_get(statistics).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise UserError(f"The {name} must be finite, got {values[name]} at step {step}.")
        self.stopwatch.lap()
        self.window.add(values)
        if _due(step, self._config.log_every) or step == self._config.steps:
            tokens_per_step, flops_per_token, peak_flops = self.speed
            metrics: dict[str, Any] = self.window.close()
            metrics["tokens_per_second"] = tokens_per_step * self.stopwatch.close()
            if peak_flops > 0:
                metrics["mfu"] = metrics["tokens_per_second"] * flops_per_token / peak_flops
            self.write(step, "train", metrics)

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """A row to every writer."""
        for writer in self._writers:
            writer.write(step, split, metrics)
