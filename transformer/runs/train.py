"""Training a config in its directory, from the latest checkpoint there if there is one."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from etils import epath
from rich.console import Console

from transformer.config import Config
from transformer.config_io import fill_open
from transformer.data.datasets import open_data
from transformer.data.trust import remember
from transformer.evaluation.compression import compressed_bits_per_byte
from transformer.generation.generate import generate
from transformer.generation.sampling import SamplingConfig
from transformer.memory import check_config, check_state
from transformer.parts import check_devices, count_parameters
from transformer.runs.directory import (
    CHECKPOINTS,
    METRICS_FILE,
    SAMPLES_FILE,
    Record,
    compare_data,
    compare_given,
    describe_given,
    make_record,
    open_workdir,
    stored_record,
    write_copies,
)
from transformer.runs.divergence import located
from transformer.runs.lock import locked
from transformer.runs.recipe import Run, epochs_a_step, make_evaluator, make_run
from transformer.storage import WriteError, explain
from transformer.terminal import make_console, say
from transformer.training import folders, loop, out_of_memory
from transformer.training.checkpoint import Checkpointer, retire
from transformer.training.hardware import keep_freed_memory, peak_flops, use_compilation_cache
from transformer.training.learning_rate import describe_change
from transformer.training.out_of_memory import Needs
from transformer.training.profile import trace_steps
from transformer.training.signals import interruptible
from transformer.training.writers import (
    ConsoleWriter,
    JsonlWriter,
    SamplesWriter,
    TensorBoardWriter,
    Writer,
    read_jsonl,
)
from transformer.types import PyTree
from transformer.validation import require

_SCORES = ("loss", "accuracy", "macro_f1", "bleu", "chrf", "bits_per_byte")


class Reached(NamedTuple):
    """Where a run is when training returns."""

    workdir: str
    step: int
    """The last, which is saved."""
    metrics: dict[str, float]
    """Of the validation split at that step, by name; empty for a run without one."""


class Given(NamedTuple):
    """What the caller brings to a run, besides its config."""

    optimizer: optax.GradientTransformation | None
    evaluators: Mapping[str, loop.Evaluator]
    writers: Sequence[Writer]
    hooks: Sequence[loop.Hook]


def train(
    config: Config,
    *,
    optimizer: optax.GradientTransformation | None = None,
    evaluators: Mapping[str, loop.Evaluator] | None = None,
    writers: Sequence[Writer] = (),
    hooks: Sequence[loop.Hook] = (),
    console: Console | None = None,
) -> Reached:
    """Train a config in its workdir, from the latest checkpoint there if there is one.

    Args:
        config: with a workdir.
        optimizer: in the place of the config's, learning rate and all; rows then have no learning rate. Of `config.optimizer`,
            `accumulate_steps` and `ema_decay` still count. A run that goes on must be given it again.
        evaluators: name -> function of the parameters (whole, of one copy) that gives metrics; each has rows of its own, at the
            steps that are evaluated. One named `validation` takes the place of the run's, and its `loss` chooses the best.
        writers: besides the run's own (terminal, metrics.jsonl, TensorBoard).
        hooks: called after every step.
        console: where progress and scores are printed; without, progress goes to standard error, scores to standard output.

    Returns:
        What was reached; a finished run is left as it is.

    Raises:
        Interrupted: a `KeyboardInterrupt`; SIGINT, SIGTERM or SIGHUP came. Between two steps the run is saved first, before them
            there is nothing to save.
        UserError: the config, the data or the directory cannot be trained with, a file cannot be written, or training diverged.
    """
    with (
        interruptible(lambda: f"stopped at once. {_saved(config)} The same command goes on."),
        _explained(config),
        out_of_memory.explained(what="Building this run"),
    ):
        given = Given(optimizer, evaluators or {}, writers, hooks)
        return _train(config, given, console or make_console(), console or make_console(stderr=False))


def _train(config: Config, given: Given, console: Console, results: Console) -> Reached:
    if jax.process_index() > 0:
        console.quiet = results.quiet = True
        return _train_locked(config, given, console, results)
    with locked(config.workdir, functools.partial(say, console)):
        return _train_locked(config, given, console, results)


def _train_locked(config: Config, given: Given, console: Console, results: Console) -> Reached:
    report = functools.partial(say, console)
    workdir = epath.Path(config.workdir)
    old = open_workdir(config, report)
    done, before = (old.step, old.config) if old else (0, config)
    config = fill_open(config, before) if old else config
    counted = old is not None and config.training.epochs == before.training.epochs
    if old and ((done >= config.training.steps and (counted or config.training.epochs == 0)) or _ended(config, old)):
        return _finished(config, old, report)
    made_by = describe_given(optimizer=given.optimizer)
    if old:
        compare_given(old, made_by)
    require(
        "train" not in given.evaluators,
        "An evaluator must have a name of its own, got train, which is that of the rows of training; choose another.",
    )
    use_compilation_cache()
    keep_freed_memory()

    # ---- Build: every error of the config or the data comes before the first file is written -------------------------
    check_devices(config)
    check_config(config)
    data = open_data(config.data, config.objective, continued=config.model.memory_length > 0)
    report(data.description)
    if jax.process_index() == 0:
        remember(config.data)
    if old:
        compare_data(old, data, remedy="Restore it to go on, or start a new run in another workdir.")
    tokenizer = old.load_tokenizer() if old else None
    run = make_run(
        config, data=data, tokenizer=tokenizer, begun=old is not None, counted=counted, optimizer=given.optimizer
    )
    config = dataclasses.replace(config, data=run.config.data, training=run.config.training)
    if old and done >= config.training.steps:
        return _finished(config, old, report)
    change = describe_change(before, config, done) if given.optimizer is None else ""
    check_state(run.state, run.runner.num_devices // jax.process_count())
    # The devices of a host share its memory.
    local = run.runner.num_devices // jax.process_count() if jax.devices()[0].platform == "cpu" else 1
    needs = Needs(run.config, run.state, run.runner.num_devices, local)
    for note in filter(None, (run.notes, _describe_cut(run), change, out_of_memory.warning(needs))):
        report(note)
    batches = data.train_batches(run.tokenizer, **run.own_part)
    require(
        "validation" in (*data.split_names, *given.evaluators) or config.training.patience == 0,
        f"training.patience={config.training.patience} counts evaluations of a validation split, and the data has none; set "
        "data.validation_fraction, or training.patience=0.",
    )
    evaluators = {"validation": make_evaluator(run, "validation")} if "validation" in data.split_names else {}
    evaluators |= {name: _of_one_copy(run, evaluate) for name, evaluate in given.evaluators.items()}
    continues = config.training.sample_length > 0 and config.objective.continues_text
    samples = SamplesWriter(workdir / SAMPLES_FILE)
    sampler = make_sampler(run, console, samples) if continues else None
    record = make_record(config, run.tokenizer, data, old, made_by)
    if jax.process_index() == 0:
        write_copies(workdir, record, begun=old is not None)
    epochs = epochs_a_step(config, data)
    peak = peak_flops(config.model.dtype, run.runner.num_devices)
    devices = f"{run.runner.num_devices} {jax.devices()[0].device_kind} device(s), {config.parallel.strategy}, "
    devices += f"attention {run.steps.parts.describe_attention(jax.devices()[0].platform)}"
    report(
        f"{count_parameters(run.state.params):,} parameters, vocabulary {run.config.model.vocab_size}, {devices}, "
        f"peak {peak / 1e12:.2f} TFLOP/s"
        + (f"; {config.training.steps:,} steps, {config.training.steps * epochs:.3g} epochs" if epochs else "")
        + (f"; going on from step {done}" if done else "")
    )

    # ---- Train -------------------------------------------------------------------------------------------------------
    latest = _Latest()
    own_writers: list[Writer] = [latest]
    if jax.process_index() == 0:
        own_writers += [
            ConsoleWriter(config.training.steps, console),
            JsonlWriter(workdir / METRICS_FILE),
            samples,
            TensorBoardWriter(workdir / "tensorboard"),
        ]
    traced = trace_steps(config.training.profile_steps, workdir / "profile", report)
    with traced as trace_hooks, out_of_memory.explained(needs), located(run, report):
        state = loop.train(
            run.state,
            config=config.training,
            runner=run.runner,
            init_state=run.init_state,
            batches=batches,
            checkpointer=Checkpointer(
                workdir / CHECKPOINTS,
                keep=config.training.keep_checkpoints,
                record=stored_record(record),
                report=report,
            ),
            measure_work=run.steps.parts.measure_work(run.runner.feeds[1]),
            peak_flops=peak,
            epochs_a_step=epochs,
            writers=[*own_writers, *given.writers],
            evaluators=evaluators,
            sampler=sampler,
            hooks=[*given.hooks, *trace_hooks],
        )
    if int(state.step) < config.training.steps:
        report(_ended(config, open_workdir(config, report)))
    last = latest.metrics
    if last and jax.process_index() == 0:
        scores = [f"{name.replace('_', ' ')} {last[name]:.4g}" for name in _SCORES if name in last]
        if "bits_per_byte" in last:
            scored: Any = data.evaluation_batches(run.tokenizer, "validation")
            others = compressed_bits_per_byte(scored.texts())
            scores[-1] += f"; on the same bytes gzip -9 {others['gzip']:.4g}, xz {others['xz']:.4g}"
        say(results, f"validation {', '.join(scores)}")
    return Reached(str(workdir), int(state.step), last)


@contextlib.contextmanager
def _explained(config: Config) -> Iterator[None]:
    """Every failed write of a run, wherever it is, ends in a `WriteError` that says what is saved."""
    try:
        yield
    except BrokenPipeError:  # of the terminal
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
    of = "" if config.training.epochs > 0 else f" of {config.training.steps}"  # counted later
    return f"Step {done}{of} is saved." if done else "No step was saved yet."


def _of_one_copy(run: Run, evaluate: loop.Evaluator) -> loop.Evaluator:
    """An evaluator that is given whole parameters, however the run spreads them."""
    return lambda params: evaluate(run.runner.gather(run.runner.fetch_state(params)))


def _finished(config: Config, old: Record, report: folders.Report) -> Reached:
    """A run that has nothing left to do is left as it is."""
    workdir, done = epath.Path(config.workdir), old.step
    if jax.process_index() == 0:  # a kill may have come before or while the last save removed an older checkpoint
        folders.clean(workdir / CHECKPOINTS, done, report)
        retire(workdir / CHECKPOINTS, config.training.keep_checkpoints)
    why = _ended(config, old) or _how_to_go_on(config, old, done)
    report(f"{workdir} is finished: step {done} of {config.training.steps}. {why}")
    return Reached(str(workdir), done, _scores_at(workdir, done))


def _ended(config: Config, old: Record | None) -> str:
    """Why a run has ended before its last step, and how it goes on; empty if it has not."""
    if old is None or not old.evaluations.ended(config.training.patience):
        return ""
    return (
        f"Training stopped at step {old.step}: {old.evaluations.describe()}. `--step best` of evaluate and "
        "generate takes that one; it goes on with more --training.patience, or 0."
    )


def _how_to_go_on(config: Config, old: Record | None, done: int) -> str:
    """What a finished run takes to go on: the restarts that it has had stay."""
    schedule = (old.config if old else config).optimizer.schedule
    restarts = " ".join(map(str, (*(step for step in schedule.restarts if step < done), done)))
    steps = f"--training.steps {done + max(1, schedule.warmup_steps)} or more"
    more, least = ("epochs", "") if config.training.epochs > 0 else ("steps", f" ({steps})")
    return (
        f"It goes on with more --training.{more}. With --optimizer.schedule.restarts {restarts} it warms up and decays anew "
        f"over the added steps{least}."
    )


def _describe_cut(run: Run) -> str:
    """How many training texts are longer than a row, by up to a thousand of them; empty if none is."""
    cut, count = run.data.count_cut(run.tokenizer, "train", at_most=1000)
    longer = " and ".join(f"{n} of {count} {name}" for name, n in cut.items() if n)
    return longer and (
        f"{longer} of the training split are longer than a row ({run.config.data.sequence_length - 1} tokens) and are cut; "
        "a longer data.sequence_length has room for more."
    )


class _Latest:
    """A writer that keeps the last row of the validation split, in every process."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        if split == "validation":
            self.metrics = dict(metrics)

    def resume(self, step: int) -> None: ...

    def close(self) -> None: ...


def _scores_at(workdir: epath.Path, step: int) -> dict[str, float]:
    """The metrics of the validation split that a finished run has on record."""
    path = workdir / METRICS_FILE
    rows = read_jsonl(path) if path.exists() else []
    found = [row for row in rows if (row["step"], row.get("split")) == (step, "validation")]
    return {name: value for row in found for name, value in row.items() if name not in ("step", "split")}


def make_sampler(run: Run, console: Console, samples: SamplesWriter) -> loop.Sampler:
    """Prints a continuation of `training.sample_prompt`, and adds it to the samples."""
    model: Any = run.steps.parts.model
    training = run.config.training
    prompt = [run.tokenizer.end_of_text, *run.tokenizer.encode(training.sample_prompt)]
    length = min(training.sample_length, run.config.model.max_length - len(prompt))
    require(
        length >= 1,
        f"training.sample_prompt must leave room for a token: with end-of-text it has {len(prompt)}, and the model reaches "
        f"{run.config.model.max_length} (model.max_length); shorten it, or set training.sample_length=0.",
    )

    def sample(params: PyTree, step: int) -> None:
        output = generate(
            model,
            run.runner.gather(params),
            [prompt],
            max_new_tokens=length,
            sampling=SamplingConfig(temperature=0.8, top_p=0.95),
            seed=training.seed,
            end_of_text=run.tokenizer.end_of_text,
        )
        text = run.tokenizer.decode([*prompt, *output.tokens[0][: output.lengths[0]].tolist()])
        console.rule(f"sample at step {step}")
        say(console, text)
        console.rule()
        if jax.process_index() == 0:
            samples.add(step, text)

    return sample
