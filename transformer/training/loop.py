"""The training loop: steps, metric rows, evaluation, samples, checkpoints, and an orderly stop."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transformer.config import TrainingConfig
from transformer.parallel.runner import Runner
from transformer.storage import understood
from transformer.training.checkpoint import Checkpointer
from transformer.training.loss_scale import FINITE, SMALLEST
from transformer.training.metrics import Ledger, Stopwatch, Window, Work
from transformer.training.patience import Patience
from transformer.training.processes import largest_over_processes, merged_over_processes
from transformer.training.signals import StopRequest
from transformer.training.state import TrainState, evaluation_params
from transformer.training.step import PER_STEP
from transformer.training.watchdog import Watchdog
from transformer.training.writers import Writer
from transformer.types import Array, CheckpointableIterator, Interrupted, PyTree, Statistics, UserError

Evaluator = Callable[[PyTree], Mapping[str, float]]
"""Parameters as placed by the runner -> metrics of a whole split."""
Sampler = Callable[[PyTree, int], object]
"""`(params of one replica, step)`: print or write a sample."""
Hook = Callable[[int, TrainState, Statistics], object]
"""`(step, state, statistics)`, called after every step. Reading an array waits for the device, and the next step donates the
state."""


class NotFinite(UserError):
    """A run diverged; `step` is the first whose loss, gradient or result is not finite."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def train(
    state: TrainState,
    *,
    config: TrainingConfig,
    runner: Runner,
    batches: CheckpointableIterator,
    checkpointer: Checkpointer,
    init_state: Callable[[], TrainState] | None = None,
    frozen: Callable[[], PyTree] = tuple,
    measure_work: Callable[[Any], Work] = lambda _: Work(),
    peak_flops: float = 0.0,
    epochs_a_step: float = 0.0,
    writers: Sequence[Writer] = (),
    evaluators: Mapping[str, Evaluator] | None = None,
    sampler: Sampler | None = None,
    hooks: Sequence[Hook] = (),
) -> TrainState:
    """Train to `config.steps`, or until `config.patience` ends it, from the latest good checkpoint if there is one.

    A plain step never waits for the device: statistics are fetched while the next step runs. A resumed run writes the rows of
    an uninterrupted one, to the bit: the checkpoint has the sums of the unfinished row, and rows after the checkpoint are
    dropped. A signal (`signals.SIGNALS`) finishes the step, and its evaluation if one is due, saves, and raises; a second one
    acts at once.

    Args:
        state: the state of one replica before the first step. It also has the shapes and shardings of restored arrays; they
            suffice if there is an `init_state`.
        config: the length of training, and the intervals of reports, evaluations, samples and saves.
        runner: the compiled steps.
        batches: this process's rows of the endless training batches.
        checkpointer: saves the state, the data position and open sums.
        init_state: makes the initial state as placed by the runner; None means `state`.
        frozen: reads the frozen parameters, which no checkpoint has, as placed by the runner.
        measure_work: the operations and tokens of a step on a batch, for tokens per second and MFU.
        peak_flops: of all devices together; 0 (unknown) omits MFU.
        epochs_a_step: the fraction of an epoch per step; with 0 (unknown), rows have no `epoch`.
        writers: receive the metric rows in this process; closed at the end.
        evaluators: split -> evaluator; the loss of `validation` selects the best checkpoint, among those saved at a step that
            was evaluated.
        sampler: called every `config.sample_every` steps.
        hooks: called after every step.

    Returns:
        The last state, of one replica.

    Raises:
        Interrupted: a signal came; the step that it names is saved, even if it is the last one.
        NotFinite: the loss, the gradient or a parameter is not finite (in float16: and the loss scale has reached its
            minimum); checkpoints of earlier steps stay.
    """
    # ---- Resume: from the latest good checkpoint; rows written after it are dropped ---------------------------------
    watchdog, ledger = Watchdog(config.hang_timeout), Ledger()
    with watchdog.watching():
        restored = checkpointer.restore(state)
        start, sums, patience = restored.step if restored else 0, dict[str, float](), Patience({})
        if restored:
            with understood(f"What the checkpoint of step {start} holds of the data and the metrics"):
                batches.set_state(restored.loop["batches"])
                sums = {name: float(value) for name, value in restored.loop["window"].items()}
                patience = Patience(restored.loop["evaluations"])
        checkpointer.clean(start)
        for writer in writers:
            writer.resume(start)
        if restored or init_state is None:
            state = runner.place_state((restored.state if restored else state)._replace(frozen=()))
        else:
            state = init_state()
        state = state._replace(frozen=frozen())
    window = Window(sums)
    report = _Report(writers, config, Stopwatch(peak_flops), ledger, window, checkpointer, epochs_a_step)

    step, ended = start, patience.ended(config.patience)
    with watchdog.watching(), StopRequest() as stop, _finishing(checkpointer, writers, watchdog):
        for step in () if ended else range(start + 1, config.steps + 1):
            # ---- Step: dispatched without waiting; meanwhile the statistics of the previous step are fetched ---------
            ledger.enter("data")
            batch = next(batches)
            ledger.enter("step" if step > start + 1 else "compile")
            watchdog.step(batch)
            report.note_end()
            state, statistics = runner.step(state, runner.place_batch(batch))
            checkpointer.check()
            report.settle()
            report.in_flight = (step, statistics, measure_work(batch))
            for hook in hooks:
                hook(step, state, statistics)

            last = step == config.steps
            # Processes must save at the same step, and agreeing costs a message.
            alone = jax.process_count() == 1
            stopping = (alone or _due(step, config.log_every)) and largest_over_processes(stop.number) > 0
            evaluating = bool(evaluators) and (last or _due(step, config.eval_every))
            sampling = sampler is not None and (last or _due(step, config.sample_every))
            saving = last or stopping or _due(step, config.checkpoint_every)
            if not (evaluating or sampling or saving):
                continue
            watchdog.long()
            report.settle()  # this step's own row comes first

            validation_loss = None
            try:
                # ---- Evaluate ---------------------------------------------------------------------------------------
                ledger.enter("evaluation")
                for split, evaluate in (evaluators or {}).items() if evaluating else ():
                    metrics = evaluate(evaluation_params(state))
                    report.write(step, split, metrics)
                    validation_loss = metrics["loss"] if split == "validation" else validation_loss
                if validation_loss is not None:
                    better, ended = patience.add(step, validation_loss), patience.ended(config.patience)
                    saving = saving or ended or (better and config.patience > 0)
                    sampling = sampling or (ended and sampler is not None)

                # ---- Sample -----------------------------------------------------------------------------------------
                ledger.enter("sample")
                if sampling and sampler is not None:
                    sampler(runner.fetch_state(evaluation_params(state)), step)
                stopping = stopping or (alone and stop.number > 0)  # the signal came meanwhile
            finally:
                # ---- Save, even if stopping: this step's loss is known to be finite (or it was skipped) -----------------
                ledger.enter("save")
                if saving or stopping:
                    one_copy = runner.fetch_state(state)
                    if not _all_finite(one_copy.params):
                        raise NotFinite(_not_finite("parameters", "they are not", step, checkpointer), step)
                    loop = {"batches": merged_over_processes(batches.get_state()), "window": report.window.sums}
                    loop["evaluations"] = patience.state
                    checkpointer.save(one_copy, loop, validation_loss=validation_loss)
            report.stopwatch.skip()
            if stopping or ended:
                break
    number = largest_over_processes(stop.number)  # includes a signal during the last step
    if number:
        on = "training is done." if step == config.steps or ended else "the same command continues from there."
        raise Interrupted(number, f"stopped at step {step} of {config.steps} and saved; {on}", agreed=True)
    return runner.fetch_state(state)


class _Report:
    """Turns the statistics of steps, fetched one step late, into rows."""

    def __init__(
        self,
        writers: Sequence[Writer],
        config: TrainingConfig,
        stopwatch: Stopwatch,
        ledger: Ledger,
        window: Window,
        checkpointer: Checkpointer,
        epochs_a_step: float,
    ) -> None:
        self._epochs_a_step = epochs_a_step
        self.window = window
        self.stopwatch = stopwatch
        self._ledger = ledger
        self.in_flight: tuple[int, Statistics, Work] | None = None
        self._ended: float | None = None
        self._writers, self._config, self._checkpointer = writers, config, checkpointer

    def note_end(self) -> None:
        """Take the time if the step in flight has ended: on a CPU, dispatching may run the next step, which must not count."""
        arrays: list[Any] = [x for x in jax.tree.leaves(self.in_flight) if isinstance(x, jax.Array)]
        self._ended = time.perf_counter() if arrays and all(x.is_ready() for x in arrays) else None

    def settle(self) -> None:
        """Wait for the step in flight; add its statistics, and write a row if one is due."""
        if self.in_flight is None:
            return
        (step, statistics, work), self.in_flight = self.in_flight, None
        values = {name: float(value) for name, value in jax.device_get(statistics).items()}
        bad = [name for name in FINITE if not math.isfinite(values[name])]
        if bad:
            scale, found = values.get("loss_scale", 0.0), f"got {values[bad[0]]}"
            if "loss_scale" in values:
                found += f" with a loss scale that fell to {scale:g}, below {SMALLEST:g} (try model.dtype=bfloat16),"
            if scale < SMALLEST:
                raise NotFinite(_not_finite(bad[0], found, step, self._checkpointer), step)
            # The step was skipped, and contributes nothing to the row.
            values = {name: values[name] for name in PER_STEP if name in values and name not in bad}
        self.stopwatch.lap(work, self._ended)
        self._ended = None
        self.window.add(values)
        if _due(step, self._config.log_every) or step == self._config.steps:
            epoch = {"epoch": step * self._epochs_a_step} if self._epochs_a_step else {}
            self.write(step, "train", {**self.window.close(), **epoch, **self.stopwatch.close()})

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Pass a row to every writer, with the seconds since the previous row."""
        seconds = self._ledger.close()
        metrics = {**metrics, **{name: value for name, value in seconds.items() if name not in metrics}}
        for writer in self._writers:
            writer.write(step, split, metrics)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@jax.jit
def _all_finite(tree: PyTree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _not_finite(what: str, found: str, step: int, checkpointer: Checkpointer) -> str:
    checkpointer.wait()  # includes the save in progress
    steps = checkpointer.steps()
    return (
        f"The {what} must be finite, {found} at step {step}. Lower optimizer.learning_rate, lengthen "
        "optimizer.schedule.warmup_steps or set optimizer.clip_norm, in a new run. "
        + (f"The checkpoint of step {steps[-1]} is good." if steps else "No checkpoint was saved before.")
    )


@contextlib.contextmanager
def _finishing(checkpointer: Checkpointer, writers: Sequence[Writer], watchdog: Watchdog) -> Iterator[None]:
    """Complete the save in progress and close the writers, whatever happens inside."""
    try:
        yield
        checkpointer.wait()
        for writer in writers:
            writer.close()
    except BaseException as error:
        watchdog.long()
        for what, finish in (("last checkpoint", checkpointer.wait), *(("rows", writer.close) for writer in writers)):
            try:
                finish()
            except Exception as second:
                error.add_note(f"The {what} could not be finished either: {second!r}")
        raise
