"""Reads the options of a command from its command line into a dataclass."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from transformer.cli.fields import flags, parse
from transformer.types import UserError
from transformer.validation import require

T = TypeVar("T")
Given = dict[str, Any]
"""The values given on the command line, by field; fields with their default are absent."""


def read(default: T, arguments: list[str], command: str) -> tuple[T, Given]:
    """The options of a command, and the given ones by field.

    Words without a flag are the values of the positional fields, in order. A field of one word is required unless its default
    is None.
    """
    kind: Any = type(default)
    positionals = [field for field in dataclasses.fields(kind) if field.metadata.get("positional")]
    about = "\n".join(line.strip() for line in (kind.__doc__ or "").splitlines())
    names = [f"[{field.name.upper()}]" if field.default is None else field.name.upper() for field in positionals]
    usage = " ".join([command, *names])
    given, words = parse(flags(default), arguments, command=command, usage=usage, about=about)
    for field in positionals:
        if isinstance(field.default, tuple):
            given[field.name], words = tuple(words), []
        elif words:
            given[field.name], *words = words
        else:
            require(
                field.default is None,
                f"`{command}` needs {field.name.upper()}, got none; `{command} --help` lists the options.",
            )
    refuse_words(words, command)
    return _replaced(default, given), given


def refuse_words(words: list[str], command: str) -> None:
    """Refuse words without a flag or field."""
    require(not words, f"`{command}` takes no {words[0] if words else ''!r} there; quote a value that has spaces.")


def refuse(given: Given, reason: Callable[[str], str]) -> None:
    """Refuse the given flags; `reason` completes the message after the name of the flag."""
    for name in given:
        raise UserError(f"--{name.replace('_', '-')} {reason(name)}")


def _replaced(value: Any, given: Given) -> Any:
    """The dataclass with the fields in `given`; dots in names separate nested dataclasses."""
    changes = {name: new for name, new in given.items() if "." not in name}
    for section in {name.partition(".")[0] for name in given if "." in name}:
        inner = {name.partition(".")[2]: new for name, new in given.items() if name.startswith(section + ".")}
        changes[section] = _replaced(getattr(value, section), inner)
    return dataclasses.replace(value, **changes)
