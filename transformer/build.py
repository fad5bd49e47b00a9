"""The one file that knows every package: a `Config` becomes a run, and a run's directory a model again."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from rich.console import Console

from transformer.config import Config
from transformer.config_io import from_dict, resume_conflicts, to_dict
from transformer.data.pipeline import EvaluationBatches, evaluation_batches, train_batches
from transformer.data.prepare import Source, open_sources, split_text
from transformer.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from transformer.evaluation.compression import compressed_bits_per_byte
from transformer.evaluation.scores import sum_statistics
from transformer.generation.generate import generate
from transformer.generation.sampling import SamplingConfig
from transformer.model_config import ModelConfig
from transformer.models.decoder import Decoder
from transformer.models.init import init_params
from transformer.objectives.next_token import next_token
from transformer.ops import dense_cpu
from transformer.parallel.mesh import make_mesh, mesh_runner
from transformer.parallel.pmap import AXIS_NAME, pmap_runner
from transformer.parallel.runner import Runner, check_divisible
from transformer.training import loop
from transformer.training.checkpoint import Checkpointer, committed_steps, load_params
from transformer.training.hardware import keep_freed_memory, model_flops_per_token, peak_flops
from transformer.training.metrics import derive
from transformer.training.optimizer import freeze_objective, make_optimizer
from transformer.training.state import TrainState, create_state
from transformer.training.step import make_eval_step, make_train_step
from transformer.training.writers import ConsoleWriter, JsonlWriter, TensorBoardWriter, Writer, read_jsonl
from transformer.types import Objective, PyTree, UserError
from transformer.validation import require

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


class Run(NamedTuple):
    """A config made real: everything the training loop needs."""

    config: Config
    """With vocab_size and max_length resolved."""
    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    model: Decoder
    runner: Runner
    state: TrainState
    """Before the first step."""
    flops_per_token: float


# ---- From a config to its parts --------------------------------------------------------------------------------------


def resolve(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with the model's vocab_size and max_length filled in."""
    model, smallest = config.model, tokenizer.vocab_size
    require(
        model.vocab_size == 0 or model.vocab_size >= smallest,
        f"model.vocab_size must be at least the tokenizer's {smallest}, got {model.vocab_size}; 0 takes the tokenizer's.",
    )
    require(
        model.architecture == "decoder",
        f"Training the next-token objective needs model.architecture=decoder, got {model.architecture!r}.",
    )
    model = dataclasses.replace(
        model, vocab_size=model.vocab_size or smallest, max_length=model.max_length or config.data.sequence_length
    )
    return dataclasses.replace(config, model=model)


def make_model(config: ModelConfig, *, cpu_kernels: bool = False) -> Decoder:
    """The linen module of a resolved model config; `cpu_kernels` is `training.cpu_kernels`."""
    return Decoder(config, dot_general=dense_cpu.dot_general if cpu_kernels else jax.lax.dot_general)


def make_run(config: Config, *, sources: Sequence[Source] = (), tokenizer: Tokenizer | None = None) -> Run:
    """Build every part of a run; nothing is written but prepared datasets.

    Args:
        config: of the run.
        sources: those of `config.data`, if they are open already.
        tokenizer: the run's, if it has one already; else it is made from the training split.
    """
    devices = config.parallel.data or jax.device_count()
    check_divisible(config.data.batch_size, devices, config.optimizer.accumulate_steps)
    sources = tuple(sources) or open_sources(config.data)
    if tokenizer is None:
        tokenizer = make_tokenizer(config.data, _texts(sources, "train"))
    config = resolve(config, tokenizer)
    model = make_model(config.model, cpu_kernels=config.training.cpu_kernels)
    params, _ = init_params(model, jax.random.key(config.training.seed))
    optimizer, schedule = make_optimizer(config.optimizer, config.training.steps, params)
    objective = next_token(model, config.objective, tokenizer.token_bytes)
    objective = freeze_objective(objective, config.optimizer, params)
    state = create_state(
        params, optimizer, jax.random.key(config.training.seed + 1), ema=config.optimizer.ema_decay > 0
    )
    runner = make_runner(config, objective, optimizer, schedule)
    return Run(config, sources, tokenizer, model, runner, state, flops_per_token(config, params))


def make_runner(config: Config, objective: Objective, optimizer: Any, schedule: Any) -> Runner:
    """The compiled steps of a run, over a mesh or under pmap."""
    axis_name = AXIS_NAME if config.parallel.strategy == "pmap" else None
    train_step = make_train_step(
        objective,
        optimizer,
        schedule,
        accumulate_steps=config.optimizer.accumulate_steps,
        ema_decay=config.optimizer.ema_decay,
        axis_name=axis_name,
    )
    evaluate_step = make_eval_step(objective, axis_name=axis_name)
    if axis_name:
        return pmap_runner(config.parallel.data, train_step, evaluate_step)
    return mesh_runner(make_mesh(config.parallel.data), train_step, evaluate_step)


def _texts(sources: Sequence[Source], split: str) -> Iterator[str]:
    for source in sources:
        yield from split_text(source, split)


def count_parameters(params: PyTree) -> int:
    """Numbers in a tree of arrays."""
    return sum(x.size for x in jax.tree.leaves(params))


def flops_per_token(config: Config, params: PyTree) -> float:
    """Operations of a training step per token.

    Position tables, and an embedding that is only looked up, take part in no matrix product.
    """
    looked_up = [params["decoder"].get("positions", {})]
    looked_up += [] if config.model.tie_embeddings else [params["token_embedding"]]
    attention = config.model.pattern[0].attention
    return model_flops_per_token(
        count_parameters(params) - count_parameters(looked_up),
        num_layers=config.model.num_layers,
        num_heads=attention.num_heads,
        head_dim=attention.resolved_head_dim(config.model.embed_dim),
        sequence_length=config.data.sequence_length,
    )


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
    conflicts = resume_conflicts(json.loads((workdir / CONFIG_FILE).read_text()), to_dict(config))
    if conflicts:
        raise UserError(
            f"A run goes on with the config it began with; {workdir} differs in\n  "
            + "\n  ".join(conflicts)
            + "\nUndo that, or choose another workdir."
        )
    return max(committed_steps(workdir / CHECKPOINTS), default=0)


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

    # ---- Build: every error of the config or the data comes before the first file is written -------------------------
    sources = open_sources(config.data)
    console.print("\n".join(source.description for source in sources))
    old = load_tokenizer(workdir) if (workdir / CONFIG_FILE).exists() else None
    run = make_run(config, sources=sources, tokenizer=old)
    batches = train_batches(
        run.config.data,
        run.tokenizer,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        sources=sources,
    )
    evaluators = {}
    if all("validation" in source.split_names for source in sources):
        evaluators["validation"] = make_evaluator(run, "validation")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        run.tokenizer.save(workdir)
        _write_whole(workdir / CONFIG_FILE, json.dumps(to_dict(config), indent=2))
    peak = peak_flops(config.model.dtype)
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), {config.parallel.strategy}"
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
    sampler = make_sampler(run, console) if config.training.sample_length > 0 else None
    state = loop.train(
        run.state,
        config=config.training,
        runner=run.runner,
        batches=batches,
        checkpointer=Checkpointer(workdir / CHECKPOINTS, keep=config.training.keep_checkpoints, report=console.print),
        tokens_per_step=config.data.batch_size * config.data.sequence_length,
        flops_per_token=run.flops_per_token,
        peak_flops=peak,
        writers=[*own_writers, *writers],
        evaluators=evaluators,
        sampler=sampler,
        hooks=hooks,
    )
    if int(state.step) < config.training.steps:
        console.print(f"Stopped at step {int(state.step)} and saved; the same command goes on from there.")
    elif evaluators and jax.process_index() == 0:
        (*_, last) = (row for row in read_jsonl(workdir / "metrics.jsonl") if row["split"] == "validation")
        others = compressed_bits_per_byte(_texts(sources, "validation"))
        console.print(
            f"validation bits per byte {last['bits_per_byte']:.3f}; "
            f"on the same bytes gzip -9 {others['gzip']:.3f}, xz {others['xz']:.3f}"
        )


def make_evaluator(run: Run, split: str) -> loop.Evaluator:
    """Placed parameters -> metrics of a whole split."""
    batches = _evaluation_batches(run, split)

    def evaluate_split(params: PyTree) -> Mapping[str, float]:
        placed = (run.runner.place_batch(batch) for batch in batches)
        return derive(sum_statistics(run.runner.evaluate_step, params, placed))

    return evaluate_split


def _evaluation_batches(run: Run, split: str) -> EvaluationBatches:
    return evaluation_batches(
        run.config.data,
        run.tokenizer,
        split,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        sources=run.sources,
    )


def make_sampler(run: Run, console: Console) -> loop.Sampler:
    """Prints a continuation of `training.sample_prompt`, and appends it to samples.txt."""
    training, path = run.config.training, epath.Path(run.config.workdir) / "samples.txt"
    prompt = [run.tokenizer.end_of_text, *run.tokenizer.encode(training.sample_prompt)]
    length = min(training.sample_length, run.config.model.max_length - len(prompt))

    def sample(params: PyTree, step: int) -> None:
        output = generate(
            run.model,
            params,
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

    model: Decoder
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
    if not (directory / CONFIG_FILE).exists():
        raise UserError(f"A run directory must hold {CONFIG_FILE}, which training writes; {directory} does not.")
    config = from_dict(Config, json.loads((directory / CONFIG_FILE).read_text()))
    tokenizer = load_tokenizer(directory)
    config = resolve(config, tokenizer)
    model = make_model(config.model)
    shapes = jax.eval_shape(lambda key: init_params(model, key)[0], jax.random.key(0))
    step, params = load_params(directory / CHECKPOINTS, shapes)
    return Loaded(model, params, tokenizer, config, step)


def evaluate(
    workdir: str | os.PathLike[str], *, split: str = "validation", source: Sequence[str] = (), data_dir: str = ""
) -> dict[str, Any]:
    """Scores of a run's model over a whole split, next to gzip's and xz's on the same text.

    Args:
        workdir: of the run.
        split: train, validation or test.
        source: corpora to score instead of the run's own.
        data_dir: where prepared datasets live, instead of where the run's do.
    """
    model, params, tokenizer, config, step = load(workdir)
    data = config.data
    if source:
        data = dataclasses.replace(data, source=tuple(source), weights=())
    if data_dir:
        data = dataclasses.replace(data, data_dir=data_dir)
    sources = open_sources(data)
    batches = evaluation_batches(data, tokenizer, split, sources=sources)
    step_function = jax.jit(make_eval_step(next_token(model, config.objective, tokenizer.token_bytes)))
    sums = sum_statistics(step_function, params, batches)
    return {
        "workdir": str(workdir),
        "step": step,
        "split": split,
        "source": list(data.source),
        "tokens": int(sums["weight"]),
        "bytes": int(sums["bytes"]),
        **derive(sums),
        **{f"{name}_bits_per_byte": bits for name, bits in compressed_bits_per_byte(_texts(sources, split)).items()},
    }


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
