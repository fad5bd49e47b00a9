"""Builds the parts of a run from a `Config`: data, tokenizer, steps, evaluators, sampler."""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from rich.console import Console

from transformer.config import Config
from transformer.data.datasets import Dataset, data_of
from transformer.data.tokenizers import Tokenizer, load_tokenizer
from transformer.data.trust import is_known, remember_paths
from transformer.evaluation.scores import sum_statistics
from transformer.generation.generate import generate
from transformer.generation.sampling import SamplingConfig
from transformer.layers.adapters import HEADS
from transformer.memory import check_batch, check_model
from transformer.parallel.runner import Runner
from transformer.parts import Steps, check_devices, resolve
from transformer.runs.base import Base, base_in, base_place, check_base, find_base
from transformer.runs.directory import BASE_FILE, Record
from transformer.runs.donor import (
    Donor,
    Inherited,
    compare_base,
    inherit_params,
    inherit_parts,
    inherit_tokenizer,
    read_donor,
)
from transformer.runs.given import NOTHING, Given
from transformer.terminal import say
from transformer.tokenizer import TokenizerKind, drawable, prompt_ids, stop_ids
from transformer.training import loop
from transformer.training.checkpoint import load_params
from transformer.training.manifest import files_below
from transformer.training.metrics import derive
from transformer.training.processes import made_by_first
from transformer.training.state import TrainState
from transformer.training.writers import SamplesWriter
from transformer.types import PyTree, UserError
from transformer.validation import require


class Run(NamedTuple):
    """A config with everything that the training loop needs."""

    steps: Steps
    """The steps, with the resolved config and the model (`steps.parts`)."""
    data: Dataset
    tokenizer: Tokenizer
    init_state: Callable[[], TrainState]
    """Makes the initial state, on the devices."""
    notes: str
    """Notes for the user."""
    kept: Mapping[str, bytes]
    """Files for its record from the run in `training.init_from`; with adapters, one that identifies the base."""
    frozen: Callable[[], PyTree] = tuple
    """Reads the base of adapters, on the devices."""

    @property
    def config(self) -> Config:
        """The config with vocab_size, max_length, class weights and the tokenizer resolved."""
        return self.steps.parts.config

    @property
    def runner(self) -> Runner:
        """The runner of the steps."""
        return self.steps.runner

    @property
    def state(self) -> TrainState:
        """The shapes of the state, with the target shardings of a restored checkpoint."""
        return self.steps.state

    @property
    def own_part(self) -> dict[str, int]:
        """This process's share of each batch, as arguments for the batches of `data`."""
        index, count = self.runner.feeds
        return {"process_index": index, "process_count": count}


def make_run(
    config: Config,
    given: Given = NOTHING,
    *,
    data: Dataset | None = None,
    tokenizer: Tokenizer | None = None,
    old: Record | None = None,
    counted: bool = False,
) -> Run:
    """Build every part of a run; only prepared datasets are written.

    Args:
        config: the run's config (`given.applied`).
        given: objects that replace parts of the config.
        data: the config's data, if already open.
        tokenizer: the run's tokenizer, if it exists; else the tokenizer of `training.init_from`, or one from the train split.
        old: the record of its latest checkpoint, if any. Its initial state is then not needed, nor the run that it started from,
            unless that is the base of its adapters.
        counted: its steps were already computed from its epochs.
    """
    check_devices(config)
    require(
        given.optimizer is None or not config.optimizer.parameter_groups,
        "optimizer.parameter_groups are of the config's optimizer, and one was given to train(optimizer=...), got "
        f"{config.optimizer.parameter_groups}; leave them out, and freeze with optax.partition.",
    )
    data = data or data_of(config)
    training = config.training
    donor = read_donor(training.init_from, training.init_from_step) if training.init_from and old is None else None
    notes: list[str] = []
    if tokenizer is None and donor is not None:
        config, note = inherit_tokenizer(config, donor)
        tokenizer, notes = donor.tokenizer, [note]
    elif tokenizer is None:
        own = given.data is not None or jax.process_count() == 1
        tokenizer = data.make_tokenizer() if own else _make_together(data, config.data.tokenizer.filled())
    if not counted:
        config = with_steps(config, data, tokenizer)
    filled = dataclasses.replace(config.data, tokenizer=config.data.tokenizer.filled())
    unresolved = config = dataclasses.replace(config, data=filled)
    config = resolve(config, tokenizer)
    check_model(config.model, config.objective.num_stacks)
    check_batch(config, jax.process_count())
    objective, note = config.objective.fit(data)
    config = dataclasses.replace(config, objective=objective)
    own, names = given.data is not None, data.class_names
    steps = Steps(config, tokenizer, optimizer=given.optimizer, model=given.model, class_names=names, own_batches=own)
    if given.model is not None:
        steps.parts.trace()
    notes += [note for note in (note, steps.describe_whole()) if note]
    run, note = _started(
        Run(steps, data, tokenizer, steps.init_state, "", donor.kept if donor else {}), unresolved, donor, old
    )
    return run._replace(notes="\n".join([*notes, *filter(None, [note])]))


def _make_together(data: Dataset, kind: TokenizerKind) -> Tokenizer:
    """The tokenizer made by process 0, in every process: two trainings of one vocabulary may differ."""
    with tempfile.TemporaryDirectory() as folder:
        root = epath.Path(folder)

        def files() -> dict[str, str]:
            data.make_tokenizer().save(root)
            return {name: file.read_bytes().decode() for name, file in files_below(root).items()}

        for name, content in made_by_first(files).items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(content.encode())
        return load_tokenizer(root, kind)


def _started(run: Run, config: Config, donor: Donor | None, old: Record | None) -> tuple[Run, str]:
    """A run with the parts inherited from the run in `training.init_from`, and lines for the user."""
    if config.adapter.rank > 0:
        return _with_base(run, config, donor, old)
    if donor is None:
        return run, ""
    parts = inherit_parts(config, run.state.params, donor, run.data.class_names)
    if parts is not None:
        return run._replace(init_state=functools.partial(_started_from, run.steps, parts)), parts.note
    params, note = inherit_params(config, run.steps.parts, donor, run.data.class_names)
    return run._replace(init_state=functools.partial(run.steps.init_state, params)), note


def _with_base(run: Run, config: Config, donor: Donor | None, old: Record | None) -> tuple[Run, str]:
    """A run with adapters and its base, and lines for the user: the donor's checkpoint, or the base that its record names."""
    steps, path, note, init_state = run.steps, base_place(config.training.init_from), "", run.init_state
    require(
        steps.parts.module is None,
        "Adapters are of the package's models, and one was given to train(model=...); set adapter.rank=0.",
    )
    named = old if donor is None else donor.record
    assert named is not None
    adapted = BASE_FILE in named.files  # a run with adapters names its base
    found = find_base(path, base_in(named), config.workdir, "set training.init_from") if adapted else named
    if donor is not None:
        require(
            not adapted or is_known(path),
            f"A run's directory may name only a base that you have trained with; {donor.path} names {path!r}, which is not read. "
            f"To trust it, write the whole model (`transformer export {donor.path} FOLDER --base {path}`), and import that.",
        )
        own = run.state.params if adapted else {name: x for name, x in run.state.params.items() if name in HEADS}
        inherited = inherit_parts(config, own, donor, run.data.class_names, adapted=adapted)
        require(
            not adapted or inherited is not None,
            f"Adapters that start from the adapters of {donor.path} must have their rank and paths; leave out adapter.rank and "
            "adapter.paths, or export that run (`transformer export`), import the folder, and start from it.",
        )
        note = compare_base(config, steps.parts, donor, path, run.data.class_names, inherited)
        init_state = functools.partial(_started_from, steps, inherited) if inherited else init_state
    if jax.process_index() == 0:
        remember_paths(path, config.training.init_from)
    kept = {**run.kept, BASE_FILE: Base.of(found).to_file()}
    check_base(found, steps.state.frozen)

    def frozen() -> PyTree:
        return steps.runner.place_state(load_params(found.path, steps.state.frozen, some=True)[1])

    return run._replace(kept=kept, frozen=frozen, init_state=init_state), note


def _started_from(steps: Steps, parts: Inherited) -> TrainState:
    return steps.init_state(parts.read())


def with_steps(config: Config, data: Dataset, tokenizer: Tokenizer) -> Config:
    """The config with the steps of its `training.epochs`, if set.

    Raises:
        UserError: the steps cannot be computed, or are too few for other settings of the config.
    """
    training = config.training
    if training.epochs == 0:
        return config
    steps = max(1, math.ceil(training.epochs * (data.batches_of_epoch(tokenizer) or 0.0)))
    training = dataclasses.replace(training, steps=steps)
    try:
        dataclasses.replace(config, training=dataclasses.replace(training, epochs=0.0))
    except UserError as error:
        raise UserError(f"{error} (training.epochs={training.epochs:g} of this data makes {steps} steps.)") from error
    return dataclasses.replace(config, training=training)


def epochs_a_step(config: Config, data: Dataset) -> float:
    """The fraction of an epoch per step; 0 if unknown."""
    if config.training.epochs > 0:
        return config.training.epochs / config.training.steps
    return 1.0 / (data.batches_of_epoch(None) or math.inf)


def make_evaluator(run: Run, split: str) -> loop.Evaluator:
    """A function of the parameters, as placed by the runner, that returns metrics of a whole split."""
    parts, runner = run.steps.parts, run.runner
    batches = run.data.evaluation_batches(run.tokenizer, split, **run.own_part)

    def evaluate_split(params: PyTree) -> Mapping[str, float]:
        placed = (runner.place_batch(batch) for batch in batches)
        # Numpy arrays: rows of this process, like the rows of a batch.
        rows = run.config.data.batch_size // runner.feeds[1]
        carry = runner.place_batch(jax.device_get(parts.loss.init_carry(rows)))
        metrics = derive(sum_statistics(runner.evaluate_step, params, placed, carry, split=split))
        one_copy = runner.gather(runner.fetch_state(params))
        generated = run.config.objective.generation_scores(
            parts.model, one_copy, run.tokenizer, run.data, split, run.config
        )
        return metrics | {name: value for name, value in generated.items() if isinstance(value, float)}

    return evaluate_split


def make_sampler(run: Run, console: Console, samples: SamplesWriter) -> loop.Sampler:
    """A function that prints a continuation of `training.sample_prompt`, and adds it to the samples."""
    model: Any = run.steps.parts.model
    training = run.config.training
    prompt = prompt_ids(run.tokenizer, training.sample_prompt)
    allowed = drawable(run.tokenizer, run.config.model.vocab_size)
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
            end_of_text=stop_ids(run.tokenizer),
            drawable=allowed,
        )
        text = run.tokenizer.decode([*prompt, *output.tokens[0][: output.lengths[0]].tolist()])
        console.rule(f"sample at step {step}")
        say(console, text)
        console.rule()
        if jax.process_index() == 0:
            samples.add(step, text)

    return sample
