"""Trains a config in its directory, from the latest checkpoint there if there is one."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from etils import epath
from rich.console import Console

from transformer.config import Config
from transformer.config_io import fill_open, to_dict
from transformer.data.datasets import Dataset, data_of
from transformer.data.tokenizers import Tokenizer
from transformer.data.trust import remember
from transformer.evaluation.compression import compressed_bits_per_byte, describe_compressed
from transformer.memory import check_config, check_state
from transformer.objective import Objective
from transformer.parts import check_devices, count_parameters
from transformer.runs.directory import (
    CHECKPOINTS,
    METRICS_FILE,
    SAMPLES_FILE,
    Record,
    compare_data,
    make_record,
    open_workdir,
    stored_record,
    write_copies,
)
from transformer.runs.divergence import located
from transformer.runs.given import Given, compare_given
from transformer.runs.lock import locked
from transformer.runs.recipe import (
    Run,
    epochs_a_step,
    make_evaluator,
    make_run,
    make_sampler,
)
from transformer.storage import WriteError, explain
from transformer.terminal import make_console, say
from transformer.tracker import TRACKERS
from transformer.training import folders, loop, out_of_memory
from transformer.training.checkpoint import Checkpointer, retire
from transformer.training.hardware import keep_freed_memory, peak_flops, use_compilation_cache
from transformer.training.learning_rate import describe_change
from transformer.training.metrics import without_timings
from transformer.training.out_of_memory import Needs
from transformer.training.profile import trace_steps
from transformer.training.signals import interruptible
from transformer.training.state import TrainState
from transformer.training.writers import (
    ConsoleWriter,
    JsonlWriter,
    SamplesWriter,
    TensorBoardWriter,
    Writer,
    read_jsonl,
)
from transformer.types import PyTree
from transformer.validation import counted, require, shown

_SCORES = ("loss", "accuracy", "macro_f1", "bleu", "chrf", "bits_per_byte")


class Reached(NamedTuple):
    """The state of a run when training returns."""

    workdir: str
    step: int
    """The last step, which is saved."""
    metrics: dict[str, float]
    """The metrics of the validation split at that step, by name; empty for a run without one."""


def train(
    config: Config,
    *,
    model: nn.Module | None = None,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    data: Dataset | Mapping[str, Iterable[Any]] | Iterable[Any] | None = None,
    tokenizer: Tokenizer | None = None,
    evaluators: Mapping[str, loop.Evaluator] | None = None,
    writers: Sequence[Writer] = (),
    hooks: Sequence[loop.Hook] = (),
    console: Console | None = None,
) -> Reached:
    """Train a config in its workdir, from the latest checkpoint there if there is one.

    Objects passed here replace those that the config names. The run's directory records their names. A run that is continued
    or loaded (`load`) needs the same objects again.

    Args:
        config: a config with a workdir.
        model: a linen module with the call signature of the class that the objective trains (`Objective.model_class`; for
            language models, `LanguageModel`). Of `config.model`, only `vocab_size`, `max_length` and `dtype` still apply.
            Parameters with Flax partition metadata are sharded by it, over the axes of the same names; others are replicated.
        objective: the objective to minimize instead of `config.objective`; its kind need not be registered.
        optimizer: replaces the config's, including its learning rate; rows then have no learning rate. Of `config.optimizer`,
            `accumulate_steps` and `ema_decay` still apply.
        data: batches to train on, endless or iterable again; or a dictionary of such batches for the splits `train`,
            `validation` and others; or a `Dataset`. `BatchData` describes batches and the names of classes.
        tokenizer: replaces the tokenizer that the config names. Without one, a run on batches needs `model.vocab_size`.
        evaluators: name -> function of the parameters (whole, of one replica) that returns metrics; each has its own rows, at
            the steps that are evaluated. One named `validation` replaces the run's, and its `loss` selects the best checkpoint.
        writers: writers besides the run's own (terminal, metrics.jsonl, TensorBoard).
        hooks: called after every step.
        console: prints progress and scores; by default, progress goes to standard error, scores to standard output.

    Returns:
        The final step and scores; a finished run is left unchanged.

    Raises:
        Interrupted: a `KeyboardInterrupt`; SIGINT, SIGTERM or SIGHUP came. Between two steps the run is saved first; before the
            first step there is nothing to save.
        UserError: the config, the data or the directory is not usable for training, a file cannot be written, or training
            diverged.
    """
    require(isinstance(config, Config), f"train takes a transformer.Config, got {shown(config)}.")
    given = Given(model, objective, optimizer, data, tokenizer, evaluators or {}, writers, hooks).opened(config)
    with (
        interruptible(lambda: f"stopped at once. {_saved(config)} The same command continues the run."),
        _explained(config),
        out_of_memory.explained(what="Building this run"),
    ):
        session = _Session(config, given, console or make_console(), console or make_console(stderr=False))
        if jax.process_index() > 0:
            return session.start()
        with locked(config.workdir, session.report):
            return session.start()


class _Session:
    """One start of a run in its directory: it is opened, built and trained, in this order.

    All errors of the config or the data are raised before the first file is written.
    """

    def __init__(self, config: Config, given: Given, console: Console, results: Console) -> None:
        if jax.process_index() > 0:
            console.quiet = results.quiet = True
        self.config, self.given = config, given
        self.console, self.results = console, results
        self.report = functools.partial(say, console)
        self.workdir = epath.Path(config.workdir)
        self.old: Record | None = None
        """The record of the latest checkpoint, for a continued run."""

    def start(self) -> Reached:
        """Train, unless the run is finished."""
        self.old = open_workdir(self.config, self.report)
        before = self.old.config if self.old else self.config
        self.config = fill_open(self.config, before)
        counted = self.old is not None and self.config.training.epochs == before.training.epochs
        if self._is_finished(counted or self.config.training.epochs == 0):
            return self._finished()
        compare_given(self.old, self.given)
        require(
            "train" not in self.given.evaluators,
            "An evaluator must have a name of its own, got train, which names the rows of training; choose another.",
        )
        if jax.process_index() == 0:
            for name in self.config.training.trackers:
                TRACKERS.find(name)().check()
        use_compilation_cache()
        keep_freed_memory()
        run = self._build(counted)
        if self._is_finished(True):  # steps are known now
            return self._finished()
        return self._train(run, self._describe(run, before))

    def _build(self, counted: bool) -> Run:
        """The parts of the run, and its config with the settings that depend on the data."""
        used = self.given.applied(self.config)
        check_devices(used)
        check_config(used)
        data = self.given.data or data_of(used)
        self.report(data.description)
        if jax.process_index() == 0 and self.given.data is None:
            remember(used.data)
        if self.old:
            compare_data(self.old, data, remedy="Restore it to continue, or start a new run in another workdir.")
        tokenizer = self.given.tokenizer or (self.old.load_tokenizer() if self.old else None)
        run = make_run(used, self.given, data=data, tokenizer=tokenizer, old=self.old, counted=counted)
        self.config = dataclasses.replace(self.config, data=run.config.data, training=run.config.training)
        return run

    def _describe(self, run: Run, before: Config) -> Needs | None:
        """Print notes for the user before the first step, and return the memory needs of a step."""
        processes, devices = jax.process_count(), run.runner.num_devices
        check_state(run.state, devices // processes)
        # The devices of a host share its memory.
        local = devices // processes if jax.devices()[0].platform == "cpu" else 1
        needs = Needs(run.config, run.state, devices, local) if self.given.model is None else None
        done = self.old.step if self.old else 0
        change = describe_change(before, self.config, done) if self.given.optimizer is None else ""
        warning = out_of_memory.warning(needs) if needs else ""
        for note in (run.notes, run.data.describe_rows(run.tokenizer), change, warning):
            if note:
                self.report(note)
        return needs

    def _train(self, run: Run, needs: Needs | None) -> Reached:
        config, workdir, evaluators = self.config, self.workdir, self._evaluators(run)
        batches = run.data.train_batches(run.tokenizer, **run.own_part)
        samples = SamplesWriter(workdir / SAMPLES_FILE)
        sampler = make_sampler(run, self.console, samples) if self._continues(run) else None
        record = make_record(config, run.tokenizer, run.data, self.old, self.given.described, run.kept)
        if jax.process_index() == 0:
            write_copies(workdir, record, begun=self.old is not None)
        peak = peak_flops(config.model.dtype, run.runner.num_devices)
        epochs = epochs_a_step(config, run.data)
        self.report(self._headline(run, peak, epochs))
        latest = _Latest()
        traced = trace_steps(config.training.profile_steps, workdir / "profile", self.report)
        with traced as trace_hooks, out_of_memory.explained(needs), located(run, self.report):
            state = loop.train(
                run.state,
                config=config.training,
                runner=run.runner,
                init_state=run.init_state,
                frozen=run.frozen,
                batches=batches,
                checkpointer=Checkpointer(
                    workdir / CHECKPOINTS,
                    keep=config.training.keep_checkpoints,
                    record=stored_record(record),
                    report=self.report,
                ),
                measure_work=run.steps.parts.measure_work(run.runner.feeds[1]),
                peak_flops=peak,
                epochs_a_step=epochs,
                writers=[latest, *self._writers(samples), *self.given.writers],
                evaluators=evaluators,
                sampler=sampler,
                hooks=[*self.given.hooks, *trace_hooks],
            )
        return self._reached(run, state, latest.metrics)

    def _evaluators(self, run: Run) -> dict[str, loop.Evaluator]:
        given, splits = self.given.evaluators, run.data.split_names
        require(
            "validation" in (*splits, *given) or self.config.training.patience == 0,
            f"training.patience={self.config.training.patience} counts evaluations of a validation split, and the data has none; "
            "set data.validation_fraction (or give data= a split validation), or training.patience=0.",
        )
        own = {"validation": make_evaluator(run, "validation")} if "validation" in splits else {}
        return own | {name: _of_one_copy(run, evaluate) for name, evaluate in given.items()}

    def _continues(self, run: Run) -> bool:
        """Whether samples are generated: by the package's models, if there is a tokenizer."""
        given = self.given
        known = given.model is None and (given.data is None or given.tokenizer is not None)
        return known and self.config.training.sample_length > 0 and run.config.objective.continues_text

    def _writers(self, samples: SamplesWriter) -> list[Writer]:
        if jax.process_index() > 0:
            return []
        return [
            ConsoleWriter(self.config.training.steps, self.console),
            JsonlWriter(self.workdir / METRICS_FILE),
            samples,
            TensorBoardWriter(self.workdir / "tensorboard"),
            *(TRACKERS.find(name)().open(self.workdir, to_dict(self.config)) for name in self.config.training.trackers),
        ]

    def _headline(self, run: Run, peak: float, epochs: float) -> str:
        """A line with the model, the devices and the steps."""
        steps, parts = self.config.training.steps, run.steps.parts
        device = jax.devices()[0]
        devices = f"{counted(run.runner.num_devices, f'{device.device_kind} device')}, {run.config.parallel.strategy}, "
        attention = parts.describe_attention(device.platform)
        devices += f"attention {attention}, " if attention else ""
        return (
            f"{count_parameters(run.state.model_params):,} parameters, vocabulary {run.config.model.vocab_size}, {devices}"
            f"peak {peak / 1e12:.2f} TFLOP/s"
            + (f"; {steps:,} steps, {steps * epochs:.3g} epochs" if epochs else "")
            + (f"; continuing from step {self.old.step}" if self.old else "")
        )

    def _reached(self, run: Run, state: TrainState, metrics: dict[str, float]) -> Reached:
        """Print the last scores."""
        if int(state.step) < self.config.training.steps:
            self.report(_ended(self.config, open_workdir(self.config, self.report)))
        if metrics and jax.process_index() == 0:
            scores = [f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in _SCORES if name in metrics]
            if "bits_per_byte" in metrics and self.given.data is None:
                scored: Any = run.data.evaluation_batches(run.tokenizer, "validation")
                scores[-1] += f"; {describe_compressed(compressed_bits_per_byte(scored.texts()))}"
            say(self.results, f"validation {', '.join(scores)}")
        return Reached(str(self.workdir), int(state.step), metrics)

    def _is_finished(self, counted: bool) -> bool:
        """Whether the run is finished; with epochs, the number of steps decides only once it is counted."""
        if self.old is None:
            return False
        return (counted and self.old.step >= self.config.training.steps) or bool(_ended(self.config, self.old))

    def _finished(self) -> Reached:
        """Leave a finished run unchanged."""
        old, workdir = self.old, self.workdir
        assert old is not None
        if jax.process_index() == 0:  # a kill may have interrupted the removal of older checkpoints
            folders.clean(workdir / CHECKPOINTS, old.step, self.report)
            retire(workdir / CHECKPOINTS, self.config.training.keep_checkpoints)
        why = _ended(self.config, old) or _how_to_go_on(self.config, old)
        self.report(f"{workdir} is finished: step {old.step} of {self.config.training.steps}. {why}")
        return Reached(str(workdir), old.step, _scores_at(workdir, old.step))


@contextlib.contextmanager
def _explained(config: Config) -> Iterator[None]:
    """Convert every failed write of a run into a `WriteError` that names the last saved step."""
    try:
        yield
    except BrokenPipeError:  # the terminal's
        raise
    except Exception as error:
        told = error if isinstance(error, WriteError) else explain(error, "A file of the run", "read or written")
        if told is None:
            raise
        raise WriteError(f"{told} {_saved(config)}") from error


def _saved(config: Config) -> str:
    """A sentence on the last checkpoint."""
    try:
        done = max(folders.committed_steps(epath.Path(config.workdir) / CHECKPOINTS), default=0)
    except OSError:
        return "Its checkpoints cannot be read now."
    of = "" if config.training.epochs > 0 else f" of {config.training.steps}"  # with epochs, counted later
    return f"Step {done}{of} is saved." if done else "No step was saved yet."


def _of_one_copy(run: Run, evaluate: loop.Evaluator) -> loop.Evaluator:
    """An evaluator that receives whole parameters, regardless of their sharding."""

    def evaluate_whole(params: PyTree) -> dict[str, float]:
        metrics = evaluate(run.runner.gather(run.runner.fetch_state(params)))
        require(
            isinstance(metrics, Mapping) and all(np.ndim(value) == 0 for value in metrics.values()),
            f"An evaluator must give numbers by name, such as {{'score': 0.5}}, got {shown(metrics)}.",
        )
        return {name: float(value) for name, value in metrics.items()}

    return evaluate_whole


def _ended(config: Config, old: Record | None) -> str:
    """Why a run ended before its last step, and how to continue it; empty if it did not."""
    if old is None or not old.evaluations.ended(config.training.patience):
        return ""
    return (
        f"Training stopped at step {old.step}: {old.evaluations.describe()}. `--step best` of evaluate and "
        "generate takes that one; it continues with more --training.patience, or 0."
    )


def _how_to_go_on(config: Config, old: Record) -> str:
    """How to continue a finished run; its previous restarts stay."""
    schedule, done = old.config.optimizer.schedule, old.step
    restarts = " ".join(map(str, (*(step for step in schedule.restarts if step < done), done)))
    steps = f"--training.steps {done + max(1, schedule.warmup_steps)} or more"
    more, least = ("epochs", "") if config.training.epochs > 0 else ("steps", f" ({steps})")
    return (
        f"It continues with more --training.{more}. With --optimizer.schedule.restarts {restarts} it warms up and decays again "
        f"over the added steps{least}."
    )


class _Latest:
    """A writer that keeps the last row of the validation split, in every process."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        if split == "validation":
            self.metrics = without_timings(metrics)

    def resume(self, step: int) -> None: ...

    def close(self) -> None: ...


def _scores_at(workdir: epath.Path, step: int) -> dict[str, float]:
    """The recorded validation metrics of a finished run."""
    path = workdir / METRICS_FILE
    rows = read_jsonl(path) if path.exists() else []
    found = [row for row in rows if (row["step"], row.get("split")) == (step, "validation")]
    scores = without_timings({name: value for row in found for name, value in row.items()})
    return {name: value for name, value in scores.items() if name not in ("step", "split")}
