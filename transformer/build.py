"""The one file that knows every package: a `Config` becomes a run, and a run's directory a model again."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from etils import epath
from rich.console import Console

from transformer.config import Config
from transformer.config_io import from_dict, resume_conflicts, to_dict
from transformer.data.datasets import Dataset, open_data
from transformer.data.tokenizers import Tokenizer, load_tokenizer
from transformer.evaluation.compression import compressed_bits_per_byte
from transformer.evaluation.scores import sum_statistics
from transformer.generation.generate import generate
from transformer.generation.sampling import SamplingConfig
from transformer.models.decoder import Decoder
from transformer.parallel.runner import Runner
from transformer.steps import check_devices, make_steps
from transformer.tasks import (
    count_parameters,
    describe_attention,
    generation_scores,
    make_model,
    make_objective,
    make_params,
    measure_work,
    resolve,
    split_metrics,
)
from transformer.training import loop
from transformer.training.checkpoint import Checkpointer, committed_steps, load_params
from transformer.training.hardware import keep_freed_memory, peak_flops
from transformer.training.profile import trace_steps
from transformer.training.state import TrainState
from transformer.training.step import make_eval_step
from transformer.training.transfer import transfer
from transformer.training.writers import ConsoleWriter, JsonlWriter, TensorBoardWriter, Writer, read_jsonl
from transformer.types import PyTree, UserError
from transformer.validation import require

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
CLASSES_FILE = "classes.json"  # their names, of a classifier
_SCORES = ("loss", "accuracy", "macro_f1", "bleu", "chrf", "bits_per_byte")


class Run(NamedTuple):
    """A config made real: everything the training loop needs."""

    config: Config
    """With vocab_size, max_length and num_classes resolved."""
    data: Dataset
    tokenizer: Tokenizer
    model: nn.Module
    runner: Runner
    state: TrainState
    """Shapes of the state, with the shardings of what a checkpoint is restored to."""
    init_state: Callable[[], TrainState]
    """Makes the state before the first step, on the devices."""
    notes: str
    """What the user should know of how it was made."""


# ---- From a config to its parts --------------------------------------------------------------------------------------


def make_run(
    config: Config, *, data: Dataset | None = None, tokenizer: Tokenizer | None = None, begun: bool = False
) -> Run:
    """Build every part of a run; nothing is written but prepared datasets.

    Args:
        config: of the run.
        data: that of the config, if it is open already.
        tokenizer: the run's, if it has one already; else that of `training.init_from`, or one made from the training split.
        begun: it has a checkpoint, so that its first state is not asked for, nor the run that it started from.
    """
    check_devices(config)
    data = data or open_data(config.data, config.objective)
    if tokenizer is None and config.training.init_from:
        tokenizer = load_tokenizer(config.training.init_from)
    elif tokenizer is None:
        tokenizer = data.make_tokenizer()
    given, config = to_dict(config), resolve(config, tokenizer, data.class_names)
    steps, notes, init_state = make_steps(config, tokenizer), "", None
    if config.training.init_from and not begun:
        donor = epath.Path(config.training.init_from)
        step, donor_params = load_params(donor / CHECKPOINTS)
        # What shapes need not show: an activation, a window, the distances of position buckets.
        differs = [line for line in resume_conflicts(to_dict(_read_config(donor)), given) if line.startswith("model.")]
        # On the host: each device is given its part only.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            own = make_params(steps.model, jax.random.key(config.training.seed))
            transferred = transfer(own, donor_params, pattern_length=len(config.model.pattern))
        init_state = functools.partial(steps.init_state, jax.device_get(transferred.params))
        notes = "\n  differs: ".join([f"from {donor}, step {step}: {transferred.report()}", *differs])
    return Run(config, data, tokenizer, steps.model, steps.runner, steps.state, init_state or steps.init_state, notes)


# ---- A run and its directory -----------------------------------------------------------------------------------------


def check_workdir(config: Config) -> int:
    """The step up to which `config.workdir` holds a finished or interrupted run of this config; 0 for a new one.

    Raises:
        UserError: the directory is another run's, or holds something that is no run.
    """
    workdir = epath.Path(config.workdir)
    if not workdir.exists() or not any(workdir.iterdir()):
        return 0
    if not (workdir / CONFIG_FILE).exists():
        raise UserError(
            f"A run directory must be new or hold a run ({CONFIG_FILE}), {workdir} holds other files; choose another workdir."
        )
    conflicts = resume_conflicts(to_dict(_read_config(workdir)), to_dict(config))
    if conflicts:
        raise UserError(
            f"A run goes on with the config it began with; {workdir} differs in\n  "
            + "\n  ".join(conflicts)
            + "\nUndo that, or choose another workdir."
        )
    return max(committed_steps(workdir / CHECKPOINTS), default=0)


def _read_config(directory: epath.Path) -> Config:
    """The config of a run; a field that did not exist when it began has its default."""
    if not (directory / CONFIG_FILE).exists():
        raise UserError(f"A run directory must hold {CONFIG_FILE}, which training writes; {directory} does not.")
    return from_dict(Config, json.loads((directory / CONFIG_FILE).read_text()))


def train(
    config: Config, *, writers: Sequence[Writer] = (), hooks: Sequence[loop.Hook] = (), console: Console | None = None
) -> None:
    """Train a config in its workdir, from the latest checkpoint there if there is one.

    Args:
        config: with a workdir.
        writers: besides the run's own (terminal, metrics.jsonl, TensorBoard).
        hooks: called after every step.
        console: where progress is printed.
    """
    console = console or Console(highlight=False)
    workdir = epath.Path(config.workdir)
    done = check_workdir(config)
    if done >= config.training.steps:
        console.print(f"{workdir} is finished: step {done} of {config.training.steps}. More --training.steps goes on.")
        return
    use_compilation_cache()
    keep_freed_memory()
    if jax.process_index() > 0:
        console.quiet = True

    # ---- Build: every error of the config or the data comes before the first file is written -------------------------
    data = open_data(config.data, config.objective)
    console.print(data.description)
    old = load_tokenizer(workdir) if (workdir / CONFIG_FILE).exists() else None
    run = make_run(config, data=data, tokenizer=old, begun=done > 0)
    if run.notes:
        console.print(run.notes)
    batches = data.train_batches(run.tokenizer, **_own_part(run.runner))
    evaluators = {"validation": make_evaluator(run, "validation")} if "validation" in data.split_names else {}
    continues = config.training.sample_length > 0 and isinstance(run.model, Decoder)
    sampler = make_sampler(run, console) if continues else None
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        run.tokenizer.save(workdir)
        if data.class_names:
            _write_whole(workdir / CLASSES_FILE, json.dumps(data.class_names))
        _write_whole(workdir / CONFIG_FILE, json.dumps(to_dict(config), indent=2))
    peak = peak_flops(config.model.dtype, run.runner.num_devices)
    devices = f"{run.runner.num_devices} {jax.devices()[0].device_kind} device(s), {config.parallel.strategy}, "
    devices += f"attention {describe_attention(run.config, jax.devices()[0].platform)}"
    console.print(
        f"{count_parameters(run.state.params):,} parameters, vocabulary {run.config.model.vocab_size}, {devices}, "
        f"peak {peak / 1e12:.2f} TFLOP/s" + (f"; going on from step {done}" if done else "")
    )

    # ---- Train -------------------------------------------------------------------------------------------------------
    own_writers: list[Writer] = []
    if jax.process_index() == 0:
        own_writers = [
            ConsoleWriter(config.training.steps, console),
            JsonlWriter(workdir / "metrics.jsonl"),
            TensorBoardWriter(workdir / "tensorboard"),
        ]
    with trace_steps(config.training.profile_steps, workdir / "profile", console.print) as trace_hooks:
        state = loop.train(
            run.state,
            config=config.training,
            runner=run.runner,
            init_state=run.init_state,
            batches=batches,
            checkpointer=Checkpointer(
                workdir / CHECKPOINTS, keep=config.training.keep_checkpoints, report=console.print
            ),
            measure_work=measure_work(run.config, run.state.params, parts=run.runner.feeds[1]),
            peak_flops=peak,
            writers=[*own_writers, *writers],
            evaluators=evaluators,
            sampler=sampler,
            hooks=[*hooks, *trace_hooks],
        )
    if int(state.step) < config.training.steps:
        console.print(f"Stopped at step {int(state.step)} and saved; the same command goes on from there.")
    elif evaluators and jax.process_index() == 0:
        (*_, last) = (row for row in read_jsonl(workdir / "metrics.jsonl") if row["split"] == "validation")
        scores = [f"{name.replace('_', ' ')} {last[name]:.4g}" for name in _SCORES if name in last]
        if "bits_per_byte" in last:
            scored: Any = data.evaluation_batches(run.tokenizer, "validation")
            others = compressed_bits_per_byte(scored.texts())
            scores[-1] += f"; on the same bytes gzip -9 {others['gzip']:.4g}, xz {others['xz']:.4g}"
        console.print(f"validation {', '.join(scores)}")


def make_evaluator(run: Run, split: str) -> loop.Evaluator:
    """Placed parameters -> metrics of a whole split."""
    batches = run.data.evaluation_batches(run.tokenizer, split, **_own_part(run.runner))
    init_carry = make_objective(run.config, run.model, run.tokenizer).init_carry

    def evaluate_split(params: PyTree) -> Mapping[str, float]:
        placed = (run.runner.place_batch(batch) for batch in batches)
        # Numpy: rows of this process, as those of a batch.
        carry = run.runner.place_batch(jax.device_get(init_carry(run.config.data.batch_size // run.runner.feeds[1])))
        metrics = split_metrics(sum_statistics(run.runner.evaluate_step, params, placed, carry))
        one_copy = run.runner.gather(run.runner.fetch_state(params))
        generated = generation_scores(run.model, one_copy, run.tokenizer, run.data, split, run.config)
        return metrics | {name: value for name, value in generated.items() if isinstance(value, float)}

    return evaluate_split


def _own_part(runner: Runner) -> dict[str, int]:
    index, count = runner.feeds
    return {"process_index": index, "process_count": count}


def make_sampler(run: Run, console: Console) -> loop.Sampler:
    """Prints a continuation of `training.sample_prompt`, and appends it to samples.txt."""
    model = run.model
    if not isinstance(model, Decoder):
        raise ValueError(f"Only a decoder continues a text, got {type(model).__name__}.")
    training, path = run.config.training, epath.Path(run.config.workdir) / "samples.txt"
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
        text = training.sample_prompt + run.tokenizer.decode(output.tokens[0][: output.lengths[0]])
        console.rule(f"sample at step {step}")
        console.print(text, markup=False)
        console.rule()
        if jax.process_index() == 0:
            with path.open("a") as file:
                file.write(f"---- step {step}\n{text}\n")

    return sample


class Loaded(NamedTuple):
    """A trained model, as a run's directory holds it."""

    model: Any
    """The linen module: a `Decoder`, `Encoder` or `Classifier`."""
    params: PyTree
    tokenizer: Tokenizer
    config: Config
    step: int


def load(workdir: str | os.PathLike[str]) -> Loaded:
    """The model of a run, from the latest undamaged checkpoint (the moving average where there is one).

    Raises:
        UserError: there is no run, or no undamaged checkpoint.

    Example:
        `model, params, tokenizer, config, step = load("runs/python_stdlib")`
    """
    directory = epath.Path(workdir)
    config = _read_config(directory)
    tokenizer = load_tokenizer(directory)
    config = resolve(config, tokenizer, _class_names(directory))
    model = make_model(config.model)
    shapes = jax.eval_shape(lambda key: make_params(model, key), jax.random.key(0))
    step, params = load_params(directory / CHECKPOINTS, shapes)
    return Loaded(model, params, tokenizer, config, step)


def _class_names(directory: epath.Path) -> tuple[str, ...]:
    classes = directory / CLASSES_FILE
    return tuple(json.loads(classes.read_text())) if classes.exists() else ()


def evaluate(
    workdir: str | os.PathLike[str],
    *,
    split: str = "validation",
    source: Sequence[str] = (),
    data_dir: str = "",
    stride: int | None = None,
    limit: int | None = None,
    memory_length: int | None = None,
) -> dict[str, Any]:
    """Scores of a run's model over a split; for a language model next to gzip's and xz's on the same text.

    Args:
        workdir: of the run.
        split: train, validation or test.
        source: corpora to score instead of the run's own.
        data_dir: where prepared datasets live, instead of where the run's do.
        stride: `data.stride`, instead of the run's.
        limit: `data.limit`, instead of the run's.
        memory_length: `model.memory_length`, instead of the run's; its positions must be of distances.
    """
    model, params, tokenizer, config, step = load(workdir)
    changes: dict[str, Any] = {"source": tuple(source), "weights": ()} if source else {}
    changes |= {"data_dir": data_dir} if data_dir else {}
    changes |= {name: value for name, value in (("stride", stride), ("limit", limit)) if value is not None}
    if memory_length is not None:
        changes["continue_rows"] = memory_length > 0
        if memory_length > 0:  # both of training only: evaluation packs in any case, and has no streams
            changes |= {"pack": True, "num_streams": 0}
        model_config = dataclasses.replace(config.model, memory_length=memory_length)
        model = make_model(model_config)
        config = dataclasses.replace(config, model=model_config, data=dataclasses.replace(config.data, **changes))
    data = open_data(dataclasses.replace(config.data, **changes), config.objective)
    learned = _class_names(epath.Path(workdir))
    require(
        data.class_names == learned,
        f"The classes of {', '.join(source or config.data.source)} must be those of {workdir}, {', '.join(learned)}, in that "
        f"order, got {', '.join(data.class_names)}; prepare it with these labels.",
    )
    objective = make_objective(config, model, tokenizer)
    batches: Any = data.evaluation_batches(tokenizer, split)
    carry = objective.init_carry(config.data.batch_size)
    sums = sum_statistics(jax.jit(make_eval_step(objective)), params, batches, carry)
    scores: dict[str, Any] = {
        "workdir": str(workdir),
        "step": step,
        "split": split,
        "source": list(source or config.data.source),
        "targets": int(sums["weight"]),
        **split_metrics(sums),
        **generation_scores(model, params, tokenizer, data, split, config),
    }
    if "bytes" in sums:
        others = compressed_bits_per_byte(batches.texts())
        scores |= {"bytes": int(sums["bytes"]), **{f"{name}_bits_per_byte": bits for name, bits in others.items()}}
    if "confusion" in sums:
        scores |= {"classes": list(data.class_names), "confusion": sums["confusion"].astype(int).tolist()}
    return scores


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX was told where (or not to) already."""
    if jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "transformer" / "compiled"))


def _write_whole(path: epath.Path, text: str) -> None:
    """Write aside and rename: a reader finds the old file or the new one."""
    aside = path.parent / f"{path.name}.tmp"
    aside.write_text(text)
    aside.replace(path)
