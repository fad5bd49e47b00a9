"""Configs as plain dictionaries and back, and the settings that a resumed run may change."""

import dataclasses
import functools
import json
import typing
from collections.abc import Iterator
from typing import Any

from transformer.config import Config, DataConfig
from transformer.kinds import Kind
from transformer.types import Json, UserError
from transformer.validation import require, shown, typed

CONFIG_FILE = "config.json"
"""File name of a run's config, in its record and at the top of its directory."""
IMPORT_FILE = "import.json"
"""The same for an imported model: the list of its original files."""

# Settings that a resumed run may change; a change to any other would make it a different run.
RESUMABLE = (
    "workdir",
    "parallel.",
    "model.scan_layers",
    "model.remat",
    "objective.loss_chunks",
    "data.source",  # only the path; the corpus is identified by its content
    "data.validation",
    "data.data_dir",
    "data.stride",
    "data.limit",
    "optimizer.schedule.restarts",
    "training.steps",
    "training.epochs",
    "training.patience",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.sample_every",
    "training.sample_prompt",
    "training.sample_length",
    "training.profile_steps",
    "training.hang_timeout",
    "training.trackers",
)

LEFT_OPEN = {"data.tokenizer.kind": "auto", "data.tokenizer.size": 0}
"""Fields and their values for "unspecified"; a run records the value used instead, and a resumed run keeps it. An unspecified
kind leaves its settings unspecified too."""


def to_dict(config: object) -> dict[str, Any]:
    """A config as nested dictionaries and lists, ready for JSON."""
    return plain(config)


def plain(value: object) -> Json:
    """A config, or a part of one, as JSON values."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": value.kind, **fields} if isinstance(value, Kind) else fields
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


_type_hints = functools.cache(typing.get_type_hints)


def from_dict(kind: Any, values: Json, name: str = "") -> Any:
    """The inverse of `to_dict`: a config of type `kind` from nested dictionaries, with the checks of its classes.

    Args:
        kind: a config, or the type of a field.
        values: as returned by `json.loads`.
        name: of the field, for messages.

    Raises:
        UserError: a field is unknown, or its value is not of its type.
    """
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        part = next((part for part in typing.get_args(kind) if dataclasses.is_dataclass(part)), None)
        if part is None or not isinstance(values, (dict, list)):
            return values
        return from_dict(part, values, name) if isinstance(values, dict) else [from_dict(part, v, name) for v in values]
    require(isinstance(values, dict), f"{name or kind.__name__} must be an object of fields, got {shown(values)}.")
    if issubclass(kind, Kind):
        kind = kind.family.find(values.get("kind"))
        values = {field: value for field, value in values.items() if field != "kind"}
    hints = _type_hints(kind)
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    unknown = sorted(set(values) - set(known))
    require(not unknown, f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}.")
    missing = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING and f.name not in values]
    require(not missing, f"{kind.__name__} must have {', '.join(missing)}, got {shown(values)}.")
    return kind(
        **{field: from_dict(hints[field], value, f"{kind.__name__}.{field}") for field, value in values.items()}
    )


def from_json(kind: Any, content: str | bytes, path: object) -> Any:
    """The content of a JSON file: a config, or a value of another type.

    Raises:
        UserError: it is not JSON, or of another type; the message names the file.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must be JSON as training writes it, but is damaged ({error}).") from error
    try:
        return typed(kind, from_dict(kind, values), "its content")
    except UserError as error:
        raise UserError(f"{path} is damaged, or of another version: {error}") from error


def leaves(values: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a config in JSON form, each with its path."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from leaves(value, f"{path}.{name}" if path else name)
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        for index, value in enumerate(values):
            yield from leaves(value, f"{path}.{index}")
    else:
        yield path, values


def differences(asked: DataConfig, found: DataConfig) -> list[str]:
    """Differences between two data configs, such as `data.tokenizer.size=300 (there 200)`; for two kinds, only their names."""
    before, after = dict(leaves(to_dict(asked), "data")), dict(leaves(to_dict(found), "data"))
    names = [name for name, value in before.items() if after.get(name, value) != value]
    return [f"{name}={before[name]} (there {after[name]})" for name in names]


def fill_open(config: Config, recorded: Config) -> Config:
    """The config of a resumed run, with recorded values in place of unspecified ones (`LEFT_OPEN`)."""
    data = dataclasses.replace(config.data, tokenizer=config.data.tokenizer.going_on(recorded.data.tokenizer))
    training = config.training
    if 0 < training.epochs == recorded.training.epochs:
        training = dataclasses.replace(training, steps=recorded.training.steps)
    return dataclasses.replace(config, data=data, training=training)


def resume_conflicts(old: Config, new: dict[str, Any]) -> list[str]:
    """Differences between a run's config and another (a dictionary) that a resumed run may not have, one line each.

    Fields that one of them leaves unspecified do not count.
    """
    before, after = dict(leaves(to_dict(old))), dict(leaves(new))
    resumable = tuple(path for path in RESUMABLE if path not in old.optimizer.fixed)
    return [
        f"{path}: {before.get(path, 'absent')} -> {after.get(path, 'absent')}"
        for path in sorted(set(before) | set(after))
        if before.get(path, "absent") != after.get(path, "absent")
        and not path.startswith(resumable)
        and not (path == "training.init_from" and old.adapter.rank > 0)  # a checksum verifies the base instead
        and not any(
            LEFT_OPEN.get(name, "absent") in (before.get(name, "missing"), after.get(name, "missing"))
            for name in (path, f"{path.rpartition('.')[0]}.kind")
        )
    ]
