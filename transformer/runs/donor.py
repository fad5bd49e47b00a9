"""The contributions of the run in `training.init_from` to a new run: its tokenizer, and the parameters that fit."""

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
from transformer.training.checkpoint import load_params, stored_params
from transformer.training.optimizer import parameter_path
from transformer.training.transfer import Transfer, transfer
from transformer.types import PyTree
from transformer.validation import require

_HEAD = "classifier"


class Donor(NamedTuple):
    """The run from which another one starts."""

    path: str
    config: Config
    tokenizer: Tokenizer
    class_names: tuple[str, ...]
    step: int | str = "latest"
    """The step of the checkpoint, as requested."""
    kept: Mapping[str, bytes] = {}
    """Files of its record that a run started from it inherits."""
    record: Record | None = None
    """The path of that checkpoint."""


class Inherited(NamedTuple):
    """Parts of a model that a run inherits: top-level branches of the parameter tree."""

    parts: Mapping[str, PyTree]
    """The shapes of the parts."""
    read: Callable[[], PyTree]
    """Reads the parts directly to the devices; each process reads its own shards."""
    note: str
    """Lines for the user."""


def read_donor(directory: str, step: int | str = "latest") -> Donor:
    """The run in a directory at the checkpoint of a step, without its parameters."""

    def donor(run: Record) -> Donor:
        kept = {name: content for name, content in run.files.items() if name == FAMILY_FILE}
        return Donor(directory, run.config, run.load_tokenizer(), run.class_names, step, kept, run)

    return read_run(directory, donor, step)


def inherit_tokenizer(config: Config, donor: Donor) -> tuple[Config, str]:
    """The config with the donor's tokenizer, whose ids its embeddings belong to, and a line about it.

    Raises:
        UserError: the config names another tokenizer.
    """
    tokenizer = donor.tokenizer
    kept = donor.config.data.tokenizer
    data = dataclasses.replace(config.data, tokenizer=config.data.tokenizer.going_on(kept))
    theirs = dataclasses.replace(data, tokenizer=kept, **config.objective.tokenizer_settings(tokenizer))
    conflicts = differences(data, theirs)
    require(
        not conflicts,
        f"A run that starts from {donor.path} has that run's tokenizer, got {', '.join(conflicts)}; give the same or leave it "
        f"out, also in a config file, or leave out training.init_from. `transformer train {donor.path}` has that run's config.",
    )
    note = f"tokenizer from {donor.path}: {tokenizer.kind}, {describe_entries(tokenizer)}"
    return dataclasses.replace(config, data=theirs), note


def inherit_params(config: Config, parts: Parts, donor: Donor, class_names: tuple[str, ...]) -> tuple[PyTree, str]:
    """Initial parameters on the host, the donor's where they fit, and lines about them and the differences of the models.

    Args:
        config: the run's config, as given.
        parts: the parts of the run.
        donor: the run whose parameters are read.
        class_names: the classes of the run's data; a head for other classes, or another order of classes, is not taken.
    """
    check_params(config)
    step, params = read_run(donor.path, _whole_params, donor.step)
    if donor.class_names != class_names:
        params = {name: part for name, part in params.items() if name != _HEAD}
    # On the host: each device receives its own part only.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        own = parts.init_params(jax.random.key(config.training.seed))
        blocks = {"pattern_length": len(config.model.pattern), "num_first": len(config.model.first)}
        transferred = transfer(own, params, **blocks)
    return jax.device_get(transferred.params), _note(transferred, step, config, donor, class_names)


def inherit_parts(
    config: Config, target: PyTree, donor: Donor, class_names: tuple[str, ...], *, adapted: bool = False
) -> Inherited | None:
    """The parts of a run's model (an embedding, a stack, a head) that the donor has with the same shapes.

    Args:
        config: the run's config, as given.
        target: shapes of the run's parameters, with their shardings.
        donor: the run whose parameters are read.
        class_names: the classes of the run's data.
        adapted: whether these are the trained parameters of a run with adapters.

    Returns:
        None if no part fits, or if a part fits only in some of its parameters, which `inherit_params` can then take.
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
    # In their stored types, with the target shardings.
    fits = jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own.sharding), fits, own)

    def read() -> PyTree:
        _, params = read_run(donor.path, lambda record: load_params(record.path, fits, some=True), donor.step)
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
    """Lines about the adapted kernels and their base, and the differences of the models.

    Args:
        config: the run's config, as given.
        parts: the parts of the run.
        donor: the base, or a run with adapters on it.
        base: the location of the base.
        class_names: the classes of the run's data.
        inherited: the trained parts that the donor has.
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
    """The step and parameters of a run; adapters are merged."""
    if BASE_FILE not in record.files:
        return load_params(record.path)
    tokenizer = record.load_tokenizer()
    parts = Parts(resolve(record.config, tokenizer), tokenizer, class_names=record.class_names)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        step, params = load_model_params(record, on_host(parts.shapes))
        return step, merge(params, record.config.adapter.scale)


def _differing(config: Config, donor: Donor, class_names: tuple[str, ...]) -> list[str]:
    """Differences that shapes may not reveal: an activation, a window, the distances of position buckets."""
    conflicts = resume_conflicts(donor.config, to_dict(config))
    differs = [line for line in conflicts if line.startswith("model.")]
    if donor.class_names and class_names and donor.class_names != class_names:
        differs.append(f"classes: {', '.join(donor.class_names)} -> {', '.join(class_names)}")
    return differs
