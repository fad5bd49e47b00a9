"""Changes to some fields of a config, with dependent fields adjusted: a smaller job is one change, not several."""

import copy
import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from transformer.config import Config, says_nothing, users, value_and_default
from transformer.config_io import RESUMABLE, from_dict, plain, to_dict
from transformer.kinds import chosen_kinds, kinds_with, switch
from transformer.types import UserError
from transformer.validation import require, typed

_Values = dict[str, Any]


class _Rule(NamedTuple):
    """When one of `after` has changed, `field` becomes `fit(new, old)`, where both are the values of its section."""

    field: str
    after: tuple[str, ...]
    fit: Callable[[_Values, _Values], Any]


def _divisor(number: int, limit: float) -> int:
    """The largest divisor of `number` that is at most `limit`, and at least 1."""
    small = [part for part in range(1, math.isqrt(number) + 1) if number % part == 0]
    return max(part for part in (*small, *(number // part for part in small)) if part <= max(1, limit))


def _at_most_length(new: _Values, old: _Values) -> int:
    return min(new["data"]["sequence_length"], max(2, new["model"]["max_length"] or new["data"]["sequence_length"]))


def _at_least_length(new: _Values, old: _Values) -> int:
    return new["model"]["max_length"] and max(new["model"]["max_length"], new["data"]["sequence_length"])


def _buckets(new: _Values, old: _Values) -> list[int]:
    length, buckets = new["data"]["sequence_length"], new["data"]["buckets"]
    return [*(bucket for bucket in buckets if bucket < length), length] if buckets else []


def _streams(new: _Values, old: _Values) -> int:
    streams, batch = new["data"]["num_streams"], new["data"]["batch_size"]
    if streams == 0 or batch < 1:
        return streams
    fits = streams == batch if new["model"]["memory_length"] > 0 else streams % batch == 0 or batch % streams == 0
    return streams if fits else 0


def _accumulate(new: _Values, old: _Values) -> int:
    return _divisor(max(1, new["data"]["batch_size"]), new["optimizer"]["accumulate_steps"])


def _restarts(new: _Values, old: _Values) -> list[int]:
    return [step for step in new["optimizer"]["schedule"]["restarts"] if step < new["training"]["steps"]]


def _warmup(new: _Values, old: _Values) -> int:
    """The old warm-up, or its share of the steps if the shortest period has too few."""
    warmup, steps = new["optimizer"]["schedule"]["warmup_steps"], max(0, new["training"]["steps"])
    shortest = min(b - a for a, b in itertools.pairwise((0, *new["optimizer"]["schedule"]["restarts"], steps)))
    return warmup if warmup <= shortest else max(0, min(shortest, warmup * steps // old["training"]["steps"]))


def _profile(new: _Values, old: _Values) -> list[int]:
    first, last = new["training"]["profile_steps"]
    return [first, min(last, new["training"]["steps"])] if first <= new["training"]["steps"] else [0, 0]


def _vocabulary(new: _Values, old: _Values) -> int:
    before, after = (values["data"]["tokenizer"].get("size", 0) for values in (old, new))
    return after if old["model"]["vocab_size"] == before > 0 else new["model"]["vocab_size"]


def _kv_heads(new: _Values, old: _Values) -> int:
    heads, kv_heads = new["attention"]["num_heads"], new["attention"]["num_kv_heads"]
    if kv_heads == 0 or heads < 1 or heads % kv_heads == 0:
        return kv_heads
    return _divisor(heads, heads * kv_heads / old["attention"]["num_heads"])


def _summary(new: _Values, old: _Values) -> int:
    return min(new["attention"]["pattern"]["summary"], max(1, new["attention"]["pattern"]["stride"]))


def _experts_per_token(new: _Values, old: _Values) -> int:
    chosen, experts = new["feed_forward"]["experts_per_token"], new["feed_forward"]["num_experts"]
    return min(chosen, experts) if experts > 0 else chosen


def _distance_buckets(new: _Values, old: _Values) -> int:
    buckets, distance = new["model"]["positions"]["num_buckets"], new["model"]["positions"]["max_distance"]
    return buckets if distance > buckets // 2 else max(4, (2 * distance - 1) // 4 * 4)


# In this order: a change by one rule may trigger a later one.
_RULES = (
    _Rule("data.weights", ("data.source",), lambda new, old: (
        new["data"]["weights"] if len(new["data"]["weights"]) == len(new["data"]["source"]) else [])),
    _Rule("data.sequence_length", ("model.max_length",), _at_most_length),
    _Rule("model.max_length", ("data.sequence_length",), _at_least_length),
    _Rule("data.buckets", ("data.sequence_length",), _buckets),
    _Rule("data.stride", ("data.sequence_length",), lambda new, old: (
        min(new["data"]["stride"], max(0, new["data"]["sequence_length"])))),
    _Rule("data.num_streams", ("data.batch_size", "model.memory_length"), _streams),
    _Rule("training.epochs", ("training.steps",), lambda new, old: 0.0),
    _Rule("optimizer.accumulate_steps", ("data.batch_size",), _accumulate),
    _Rule("optimizer.schedule.restarts", ("training.steps",), _restarts),
    _Rule("optimizer.schedule.warmup_steps", ("training.steps", "optimizer.schedule.restarts"), _warmup),
    _Rule("training.profile_steps", ("training.steps",), _profile),
    _Rule("model.vocab_size", ("data.tokenizer.size",), _vocabulary),
    _Rule("model.positions.num_buckets", ("model.positions.max_distance",), _distance_buckets),
)  # fmt: skip
_BLOCK_RULES = (
    _Rule("attention.num_kv_heads", ("attention.num_heads",), _kv_heads),
    _Rule("attention.pattern.summary", ("attention.pattern.stride",), _summary),
    _Rule("feed_forward.experts_per_token", ("feed_forward.num_experts",), _experts_per_token),
)  # fmt: skip


def override(
    config: Config,
    changes: Mapping[str, Any],
    report: Callable[[str], None] = lambda line: None,
    *,
    recorded: Config | None = None,
) -> Config:
    """`config` with the fields in `changes`, and with dependent fields adjusted to them.

    Values for a larger job (a warm-up longer than the new run, buckets longer than the new rows, more micro-batches than rows)
    are adjusted as little as possible. Fields in `changes` are never adjusted: a contradiction among the changes is an error, as
    in the constructor.

    Args:
        config: from a config file, say.
        changes: values by field: `{"training.steps": 20, "model.pattern.0.attention.num_heads": 2}`.
        report: called with one line for each adjusted field.
        recorded: the config of the run to resume. A field that depends only on settings that a resumed run may change (its steps)
            keeps its recorded value: the run may not change the field itself.

    Raises:
        UserError: a field does not exist, or a value cannot work.
    Example:
        >>> from transformer import AdamW, CosineSchedule
        >>> config = Config(optimizer=AdamW(schedule=CosineSchedule(warmup_steps=100)))
        >>> override(config, {"training.steps": 20}).optimizer.schedule.warmup_steps
        2
    """
    require(
        not ("training.steps" in changes and changes.get("training.epochs")),
        "A run has training.steps or training.epochs, got both; leave one out.",
    )
    fitted = _Fitted(with_kinds(config, changes), changes, report)
    fitted.follow(to_dict(recorded) if recorded else None)
    fitted.leave_unused()
    return from_dict(Config, fitted.new)


class _Fitted:
    """The values of a config with changes, and with dependent fields adjusted."""

    def __init__(self, config: Config, changes: Mapping[str, Any], report: Callable[[str], None]) -> None:
        self.config, self.given, self.report = config, changes, report
        self.old, self.new, self.changed = to_dict(config), to_dict(config), set(changes)
        for path, value in changes.items():
            try:
                section, name = _section(self.new, path)
                section[name]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise UserError(unknown_setting(config, path) or f"A config has no field {path!r}.") from error
            section[name] = list(value) if isinstance(value, tuple) else value

    def follow(self, kept: _Values | None) -> None:
        """Adjust each field that has a rule; `kept` are the values of the run to resume, if there is one."""
        for prefix, rule in _rules(len(self.old["model"]["pattern"])):
            path, base = prefix + rule.field, prefix.removesuffix(".")
            section, name = _section(self.new, path)
            if path in self.given or name not in section:  # the latter: a setting of another kind
                continue
            if kept and not path.startswith(RESUMABLE) and all(after.startswith(RESUMABLE) for after in rule.after):
                self._set(path, _part(kept, path), "as in the run that goes on")
            elif any(prefix + after in self.changed for after in rule.after):
                fitting = rule.fit(_part(self.new, base), _part(self.old, base))
                self._set(path, fitting, f"to fit {_causes(prefix, rule, self.changed)}")

    def leave_unused(self) -> None:
        """Reset each setting that the changed run does not use to its default, as a config requires."""
        config, hints = self.config, typing.get_type_hints(Config)
        for name, value in self.new.items():
            config = _replace(config, [name], typed(hints[name], from_dict(hints[name], value), name))
        for path, purpose in config.unused().items():
            if not any(f"{given}.".startswith(f"{path}.") for given in self.given):
                value, default = value_and_default(config, path)
                if not says_nothing(value, default):
                    self._set(path, plain(default), f"it is for {purpose or users(path)}")

    def _set(self, path: str, value: Any, reason: str) -> None:
        section, name = _section(self.new, path)
        if value != section[name]:
            self.report(f"{path} {_shown(section[name])} -> {_shown(value)}, {reason}")
            section[name] = value
            self.changed.add(path)


def with_kinds(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with the kinds named in `changes` (`objective.kind`); settings that the old kind lacks have their defaults.

    The result is not validated: the new kind may fit only after other changes.

    Raises:
        UserError: there is no such kind.
    """
    for path, chosen in list(chosen_kinds(config)):
        name = changes.get(f"{path}.kind", chosen.kind)
        if name != chosen.kind:
            config = _replace(config, path.split("."), switch(chosen, name))
    return config


def _replace(config: Any, path: list[str], value: Any) -> Any:
    """A config, or a tuple of its parts, with the value at a path replaced."""
    if not path:
        return value
    name, *rest = path
    if isinstance(config, tuple):
        index = int(name)
        return (*config[:index], _replace(config[index], rest, value), *config[index + 1 :])
    changed = copy.copy(config)
    object.__setattr__(changed, name, _replace(getattr(config, name), rest, value))
    return changed


def unknown_setting(config: Config, path: str) -> str:
    """Why a config has no field `path`, if it is a setting of an unselected kind; else an empty string."""
    section, _, name = path.rpartition(".")
    for place, chosen in chosen_kinds(config):
        own = {field.name for field in dataclasses.fields(chosen)}
        others = kinds_with(chosen.family, name) if place == section and name not in own else []
        if others:
            return f"{path} is a setting of {' and '.join(others)}, {place}.kind is {chosen.kind}; leave it out, or change that."
    return ""


def _rules(num_blocks: int) -> Iterator[tuple[str, _Rule]]:
    yield from (("", rule) for rule in _RULES)
    yield from ((f"model.pattern.{block}.", rule) for block in range(num_blocks) for rule in _BLOCK_RULES)


def _part(values: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        values = values[int(name) if isinstance(values, list) else name]
    return values


def _section(values: _Values, path: str) -> tuple[_Values, str]:
    """The dictionary that holds a field, and the field's name in it. An unknown name is refused when it is read."""
    section, _, name = path.rpartition(".")
    return _part(values, section), name


def _causes(prefix: str, rule: _Rule, changed: Collection[str]) -> str:
    return " and ".join(prefix + name for name in rule.after if prefix + name in changed)


def _shown(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
