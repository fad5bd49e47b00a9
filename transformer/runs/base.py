"""The base run of adapters: its checkpoint is identified by a checksum, located, and read."""

import dataclasses
import hashlib
import json

import jax
from etils import epath

from transformer.config_io import from_json
from transformer.data.trust import is_known
from transformer.layers.adapters import join, split
from transformer.runs.directory import BASE_FILE, Record, read_run
from transformer.storage import expand
from transformer.training import manifest
from transformer.training.checkpoint import describe, load_params, read_description
from transformer.training.layout import stored_layout
from transformer.types import PyTree, UserError
from transformer.validation import Settings, require


@dataclasses.dataclass(frozen=True)
class Base(Settings):
    """The checkpoint that adapters were trained on; its location is `training.init_from` of their run."""

    step: int
    sha256: str
    """The checksum of its manifest, which has the SHA-256 of each of its files."""

    @classmethod
    def of(cls, record: Record) -> "Base":
        """Identify a checkpoint as a base.

        Raises:
            UserError: the checkpoint holds adapters itself.
        """
        require(
            BASE_FILE not in record.files,
            f"The base of adapters must be a whole model, {record.path} holds adapters; export it (`transformer export`), and "
            "import the folder.",
        )
        return cls(record.step, hashlib.sha256((record.path / manifest.NAME).read_bytes()).hexdigest())

    def to_file(self) -> bytes:
        """The content of the base file in the record of a run."""
        return json.dumps(dataclasses.asdict(self)).encode()


def base_in(record: Record) -> Base:
    """The base of a run's adapters."""
    return from_json(Base, record.files.get(BASE_FILE, b"{}"), f"{record.path}: {BASE_FILE}")


def base_place(path: str) -> str:
    """The location of the base of adapters: the path itself, or for a run with adapters, the location of that run's base."""
    seen = set[str]()
    while path not in seen and (epath.Path(expand(path)) / BASE_FILE).exists():
        seen.add(path)
        path = read_run(path, lambda record: record).config.training.init_from
    return path


def find_base(path: str, base: Base, run: object, remedy: str) -> Record:
    """The record of a base, if the adapters of a run were trained on it.

    Args:
        path: the directory of the base's run.
        base: the base named in the run of the adapters.
        run: the directory of the adapters, for messages.
        remedy: how to give the location of the base.

    Raises:
        UserError: the base is missing, or is another one.
    """
    try:
        record = read_run(path, lambda record: record, base.step)
    except (UserError, OSError) as error:
        raise UserError(
            f"The adapters in {run} need the base that they were trained on, step {base.step} of {path}: {error} If it is "
            f"elsewhere, {remedy}."
        ) from error
    found = Base.of(record)
    require(
        found == base,
        f"The adapters in {run} must have the base that they were trained on, whose manifest has the SHA-256 "
        f"{base.sha256:.16}..., but the manifest of {record.path} has {found.sha256:.16}...: it is another model, or it changed. "
        f"Put it back; if it is elsewhere, {remedy}.",
    )
    return record


def check_base(record: Record, frozen: PyTree) -> None:
    """Require that a base has the parameters of a model without its adapters, with the same types.

    Args:
        record: the record of the base.
        frozen: the shapes of these parameters.
    """
    arrays: dict[str, str] = read_description(record.path)["arrays"]
    field = "ema_params/" if any(name.startswith("ema_params/") for name in arrays) else "params/"
    within = tuple(f"{field}{part}/" for part in frozen)  # a base may have other parts, such as another head
    found = {name.removeprefix(field): text for name, text in arrays.items() if name.startswith(within)}
    layout = stored_layout(found, frozen, describe)
    wanted = describe(frozen if layout is None else layout.stored(frozen))
    lines = [
        f"{name}: {found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
        for name in sorted(found | wanted)
        if found.get(name) != wanted.get(name)
    ]
    require(
        not lines,
        f"The base of adapters must have all parameters of the model, as model.param_dtype; {record.path} differs in\n  "
        + "\n  ".join(lines[:10])
        + "\nGive the model the base's config.",
    )


def load_model_params(record: Record, target: PyTree, base: str = "") -> tuple[int, PyTree]:
    """The step and all parameters of a run's model (`load_params`); with adapters, including the base's.

    Args:
        record: the record of the checkpoint.
        target: shapes of all parameters, with the target shardings.
        base: directory of the base's run, if it has moved since training.

    Raises:
        UserError: there is no such base, it is another one, or this user has never trained with it.
    """
    run, adapted = record.path.parent.parent, record.config.adapter.rank > 0
    require(adapted or base == "", f"A base belongs to adapters, {run} has none; leave it out, got {base!r}.")
    if not adapted:
        return load_params(record.path, target)
    path = base or record.config.training.init_from
    for place in (path, path := base_place(path) if base or is_known(path) else path):
        require(
            base != "" or is_known(place),
            f"A run's directory may name only a base that you have trained with; {run} names {place!r}, which is not read. If "
            f"it is the one that you want, give it: --base {place} (base=).",
        )
    found = find_base(path, base_in(record), run, "give it: --base DIR (base=)")
    frozen, trained = split(target)
    step, adapters = load_params(record.path, trained)
    check_base(found, frozen)
    return step, join(load_params(found.path, frozen, some=True)[1], adapters)


def on_host(shapes: PyTree) -> PyTree:
    """The shapes with shardings in the host's memory."""
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), shapes)
