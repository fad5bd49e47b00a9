"""The options of a command, read from its command line as a dataclass has them."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from transformer.cli.fields import flags, parse
from transformer.types import UserError
from transformer.validation import require

T = TypeVar("T")
Given = dict[str, Any]
"""What the command line says, by field; what it does not say has its default and is not here."""


def read(default: T, arguments: list[str], command: str) -> tuple[T, Given]:
    """The options of a command, and which of them were given.

    Words without a flag go to the positional fields in turn; one that takes a single word must have it, unless it may be None.
    """
    kind: Any = type(default)
    places = [field for field in dataclasses.fields(kind) if field.metadata.get("positional")]
    about = "\n".join(line.strip() for line in (kind.__doc__ or "").splitlines())
    names = [f"[{place.name.upper()}]" if place.default is None else place.name.upper() for place in places]
    usage = " ".join([command, *names])
    given, words = parse(flags(default), arguments, command=command, usage=usage, about=about)
    for place in places:
        if isinstance(place.default, tuple):
            given[place.name], words = tuple(words), []
        elif words:
            given[place.name], *words = words
        else:
            require(
                place.default is None,
                f"`{command}` needs {place.name.upper()}, got none; `{command} --help` tells more.",
            )
    refuse_words(words, command)
    return _replaced(default, given), given


def refuse_words(words: list[str], command: str) -> None:
    """Words that belong to no flag and no field are an error."""
    require(not words, f"`{command}` takes no {words[0] if words else ''!r} there; quote a value that has spaces.")


def refuse(given: Given, reason: Callable[[str], str]) -> None:
    """Flags that were given but mean nothing here are an error: `reason` completes the sentence that begins with the flag."""
    for name in given:
        raise UserError(f"--{name.replace('_', '-')} {reason(name)}")


def _replaced(value: Any, given: Given) -> Any:
    """A dataclass with the fields in `given`, whose names have a dot for each level."""
    changes = {name: new for name, new in given.items() if "." not in name}
    for section in {name.partition(".")[0] for name in given if "." in name}:
        inner = {name.partition(".")[2]: new for name, new in given.items() if name.startswith(section + ".")}
        changes[section] = _replaced(getattr(value, section), inner)
    return dataclasses.replace(value, **changes)
