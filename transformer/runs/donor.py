"""What a run takes from the run that it starts from (`training.init_from`): its tokenizer, and the parameters that fit."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from transformer.config import Config
from transformer.config_io import differences, resume_conflicts, to_dict
from transformer.data.tokenizers import Tokenizer, describe_entries
from transformer.layers.adapters import HEADS, merge, split
from transformer.memory import check_params
from transformer.parts import Parts, count_parameters, resolve
from transformer.runs.base import load_model_params, on_host
from transformer.runs.directory import BASE_FILE, FAMILY_FILE, Record, read_run
from transformer.training.checkpoint import load_step_params, stored_params
from transformer.training.optimizer import parameter_path
from transformer.training.transfer import Transfer, transfer
from transformer.types import PyTree
from transformer.validation import require

_HEAD = "classifier"


class Donor(NamedTuple):
    """The run that another one starts from."""

    path: str
    config: Config
    tokenizer: Tokenizer
    class_names: tuple[str, ...]
    step: int | str = "latest"
    """Of the checkpoint, as it was asked for."""
    kept: Mapping[str, bytes] = {}
    """Files of its record that a run that starts from it has too."""
    record: Record | None = None
    """Of that checkpoint."""


class Inherited(NamedTuple):
    """Parts of a model that a run has from the run that it starts from: branches at the top of the tree of parameters."""

    parts: Mapping[str, PyTree]
    """Their shapes."""
    read: Callable[[], PyTree]
    """Reads them straight to the devices, each process its own shards."""
    note: str
    """Lines for the user."""


def read_donor(directory: str, step: int | str = "latest") -> Donor:
    """The run in a directory, by the checkpoint of a step, but for its parameters."""

    def donor(run: Record) -> Donor:
        kept = {name: content for name, content in run.files.items() if name == FAMILY_FILE}
        return Donor(directory, run.config, run.load_tokenizer(), run.class_names, step, kept, run)

    return read_run(directory, donor, step)


def inherit_tokenizer(config: Config, donor: Donor) -> tuple[Config, str]:
    """The config with the donor's tokenizer, whose ids its embeddings are of, and a line that says so.

    Raises:
        UserError: the config asks for another one.
    """
    tokenizer = donor.tokenizer
    kept = donor.config.data.tokenizer
    data = dataclasses.replace(config.data, tokenizer=config.data.tokenizer.going_on(kept))
    theirs = dataclasses.replace(data, tokenizer=kept, **config.objective.tokenizer_settings(tokenizer))
    conflicts = differences(data, theirs)
    require(
        not conflicts,
        f"A run that starts from {donor.path} has that run's tokenizer, got {', '.join(conflicts)}; ask for the same or leave it "
        f"out, also in a config file, or leave out training.init_from. `transformer train {donor.path}` has that run's config.",
    )
    note = f"tokenizer from {donor.path}: {tokenizer.kind}, {describe_entries(tokenizer)}"
    return dataclasses.replace(config, data=theirs), note


def inherit_params(config: Config, parts: Parts, donor: Donor, class_names: tuple[str, ...]) -> tuple[PyTree, str]:
    """Initial parameters on the host, the donor's where they fit, and lines that say which, and where the models differ.

    Args:
        config: of the run, as it was given.
        parts: of the run.
        donor: whose parameters are read.
        class_names: of the run's data; a head for other classes, or the same in another order, is not taken.
    """
    check_params(config)
    step, params = read_run(donor.path, _whole_params, donor.step)
    if donor.class_names != class_names:
        params = {name: part for name, part in params.items() if name != _HEAD}
    # On the host: each device is given its part only.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        own = parts.init_params(jax.random.key(config.training.seed))
        blocks = {"pattern_length": len(config.model.pattern), "num_first": len(config.model.first)}
        transferred = transfer(own, params, **blocks)
    return jax.device_get(transferred.params), _note(transferred, step, config, donor, class_names)


def inherit_parts(
    config: Config, target: PyTree, donor: Donor, class_names: tuple[str, ...], *, adapted: bool = False
) -> Inherited | None:
    """The parts of a run's model (an embedding, a stack, a head) that the donor has in the same shapes.

    Args:
        config: of the run, as it was given.
        target: shapes of the run's parameters, with their shardings.
        donor: whose parameters are read.
        class_names: of the run's data.
        adapted: whether these are what is trained of a run with adapters.

    Returns:
        None where no part fits, or one in some of its parameters only, of which `inherit_params` then takes these.
    """
    wanted = jax.tree.map(lambda x: getattr(x, "sharding", None), target)
    if not jax.tree.leaves(wanted):
        return None

    def shapes_in(record: Record) -> tuple[int, PyTree]:
        return record.step, stored_params(record.path)[1] if (BASE_FILE in record.files) == adapted else {}

    step, stored = read_run(donor.path, shapes_in, donor.step)
    if donor.class_names != class_names:
        stored = {name: part for name, part in stored.items() if name != _HEAD}
    fits = {name: part for name, part in stored.items() if name in target and _shapes(part) == _shapes(target[name])}
    if not fits or any(name in target and name not in fits for name in stored):
        return None
    own = {name: target[name] for name in fits}
    # As they are stored, where they are wanted.
    fits = jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own.sharding), fits, own)

    def read() -> PyTree:
        _, params = read_run(donor.path, lambda record: load_step_params(record.path, fits, some=True), donor.step)
        return jax.tree.map(lambda x, own: x if x.dtype == own.dtype else x.astype(own.dtype), params, own)

    taken, fresh, skipped = (
        tuple(parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
        for tree in (fits, _without(target, fits), _without(stored, fits))
    )
    transferred = Transfer({}, taken, (), fresh, skipped)
    return Inherited(fits, read, _note(transferred, step, config, donor, class_names))


def _note(transferred: Transfer, step: int, config: Config, donor: Donor, class_names: tuple[str, ...]) -> str:
    lines = [f"from {donor.path}, step {step}: {transferred.report()}", *_differing(config, donor, class_names)]
    return "\n  differs: ".join(lines)


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.shape, tree)


def _without(tree: Mapping[str, PyTree], parts: Mapping[str, PyTree]) -> dict[str, PyTree]:
    return {name: part for name, part in tree.items() if name not in parts}


def compare_base(
    config: Config, parts: Parts, donor: Donor, base: str, class_names: tuple[str, ...], inherited: Inherited | None
) -> str:
    """Lines that say which kernels have adapters beside which base, and where the models differ.

    Args:
        config: of the run, as it was given.
        parts: of the run.
        donor: the base, or a run with adapters beside it.
        base: where the base lies.
        class_names: of the run's data.
        inherited: what is trained, as far as the donor has it.
    """
    frozen, trained = split(parts.shapes)
    whole = {name: trained.pop(name) for name in HEADS if name in trained}
    line = (
        f"adapters of rank {config.adapter.rank}, {count_parameters(trained):,} parameters, beside the "
        f"{count_parameters(frozen):,} of {base}, which are frozen"
    )
    if base != donor.path:
        line += f"\n  adapters as {donor.path} has them"
    for name, part in whole.items():
        origin = f"as {donor.path} has it" if inherited and name in inherited.parts else "new"
        line += f"\n  trained whole: {name}, {count_parameters(part):,} parameters, {origin}"
    return "\n  differs: ".join([line, *_differing(config, donor, class_names)])


def _whole_params(record: Record) -> tuple[int, PyTree]:
    """Of a run with adapters, merged."""
    if BASE_FILE not in record.files:
        return load_step_params(record.path)
    tokenizer = record.load_tokenizer()
    parts = Parts(resolve(record.config, tokenizer), tokenizer, class_names=record.class_names)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        step, params = load_model_params(record, on_host(parts.shapes))
        return step, merge(params, record.config.adapter.scale)


def _differing(config: Config, donor: Donor, class_names: tuple[str, ...]) -> list[str]:
    """What shapes need not show: an activation, a window, the distances of position buckets."""
    conflicts = resume_conflicts(donor.config, to_dict(config))
    differs = [line for line in conflicts if line.startswith("model.")]
    if donor.class_names and class_names and donor.class_names != class_names:
        differs.append(f"classes: {', '.join(donor.class_names)} -> {', '.join(class_names)}")
    return differs
