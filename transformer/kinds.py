"""Kinds: frozen dataclasses of settings with the behaviour that they select, found by name in a family."""

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from transformer.types import UserError
from transformer.validation import Settings, did_you_mean, require, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

AnyKind = TypeVar("AnyKind", bound="type[Kind]")


_LOADED: "dict[str, type[Kind]]" = {}


def section_of_kind(class_name: str) -> str | None:
    """The config section of a loaded kind, by its class name; None for other classes."""
    return _LOADED[class_name].family.section if class_name in _LOADED else None


def is_setting(section: str, name: str) -> bool:
    """Whether a loaded kind in a config's `section` has a setting of this name."""
    return any(
        kind.family.section == section and name in {field.name for field in dataclasses.fields(kind)}
        for kind in _LOADED.values()
    )


class Family:
    """The kinds that a config field chooses from. The field holds an instance; no other code compares kind names.

    Kinds of this package are imported on first use. User-defined kinds are added by `register`.

    Args:
        section: where a config holds the chosen kind, such as `objective`.
        modules: name -> module that registers the kind; the first is the default.
        field: the config field with the name, if it is not the section's `kind`.
    """

    def __init__(self, section: str, modules: Mapping[str, str], field: str = "") -> None:
        self.section = section
        self.field = field or f"{section}.kind"
        self._modules = dict(modules)
        self._kinds: dict[str, type[Kind]] = {}

    def register(self, kind: AnyKind) -> AnyKind:
        """Add a kind under its `kind`; usable as a decorator.

        Raises:
            UserError: another kind has the name.
        """
        name, known = kind.kind, self._kinds.get(kind.kind)
        same = known is None or (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__)
        require(
            same and self._modules.get(name, kind.__module__) == kind.__module__,
            f"{self.section} has a kind {name!r} already; give {kind.__module__}.{kind.__qualname__} another name.",
        )
        self._kinds[name] = kind
        _LOADED[kind.__name__] = kind
        return kind

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all known kinds."""
        return tuple(dict.fromkeys((*self._modules, *self._kinds)))

    def find(self, name: object) -> type[Any]:
        """The kind with a name.

        Raises:
            UserError: there is none.
        """
        # Building the message takes longer than everything else in a config's checks.
        if not isinstance(name, str) or name not in self.names:
            near = did_you_mean(name, list(self.names))
            raise UserError(
                f"{self.field} must be one of {', '.join(self.names)}, got {shown(name)}{near} Your own kind is known once the "
                "module that registers it is imported."
            )
        if name not in self._kinds:
            importlib.import_module(self._modules[name])  # a name in this table, never a name from a file
        return self._kinds[name]

    def default(self) -> Any:
        """The first kind with its default settings."""
        return self.find(self.names[0])()


@dataclasses.dataclass(frozen=True)
class Kind(Settings):
    """The base class of all kinds."""

    family: ClassVar[Family]
    kind: ClassVar[str]
    """Its name in configs and on the command line."""


def switch(chosen: Kind, name: str) -> Kind:
    """Another kind of the same family, with the settings that both kinds have."""
    kind = chosen.family.find(name)
    own = {field.name for field in dataclasses.fields(kind)}
    return kind(**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen) if f.name in own})


def kinds_with(family: Family, setting: str) -> list[str]:
    """Names of the kinds with a setting."""
    return [n for n in family.names if setting in {field.name for field in dataclasses.fields(family.find(n))}]


def chosen_kinds(config: "DataclassInstance | type[DataclassInstance]", path: str = "") -> Iterator[tuple[str, Kind]]:
    """All kinds in a config, with their paths."""
    for field in dataclasses.fields(config):
        value, here = getattr(config, field.name), f"{path}.{field.name}".removeprefix(".")
        parts = enumerate(value) if isinstance(value, tuple) else [("", value)]
        for index, part in parts:
            if dataclasses.is_dataclass(part):
                place = here if index == "" else f"{here}.{index}"
                if isinstance(part, Kind):
                    yield place, part
                yield from chosen_kinds(part, place)
