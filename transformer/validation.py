"""Checks that raise `UserError` with invariant and value; types and choices of every settings class."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from transformer.types import UserError


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_installed(package: object, name: str, extra: str) -> None:
    """Raise UserError, with the installation command, unless an optional package is installed."""
    require(
        package is not None, f'This needs the package {name}; in a copy of the repository: pip install -e ".[{extra}]".'
    )


def require_range(config: object, low: float, high: float, *names: str) -> None:
    """`low <= value` and `value < high` for each field of `config`."""
    for name in names:
        value = getattr(config, name)
        require(
            low <= value < high,
            f"{type(config).__name__}.{name} must be at least {low:g} and below {high:g}, got {value}.",
        )


def require_at_least(config: object, low: float, *names: str) -> None:
    """`low <= value` for each field of `config`."""
    for name in names:
        value = getattr(config, name)
        require(value >= low, f"{type(config).__name__}.{name} must be at least {low:g}, got {value}.")


# ---- Types and choices -----------------------------------------------------------------------------------------------


class Settings:
    """The base class of every config and kind: a frozen dataclass that checks the types and choices of its fields.

    A class adds checks in its own `__post_init__`, which runs after this one. Accepted values are converted to Python's types:

    * an integer of at most 32 bits (JAX's default), or a finite float32 number, for which an integer may stand; true and false
      are neither;
    * a NumPy scalar, to the number, truth value or text that it holds;
    * a list, to a tuple;
    * for `Annotated[T, function]`, the function's result; for `Annotated[int, bits]`, an integer of this many bits.
    """

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        if rules := cls.__dict__.get("__post_init__"):
            setattr(cls, "__post_init__", _typed_before(rules))  # noqa: B010

    def __post_init__(self) -> None:
        """Check the fields of a class without rules of its own."""
        _check_fields(self)

    def unused(self) -> Mapping[str, str]:
        """Settings that have no effect beside its other values, each with its purpose.

        A run has no flags for them, and its `Config` refuses them unless they have their defaults.
        """
        return {}


def _typed_before(rules: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(rules)
    def checked(self: Any) -> None:
        _check_fields(self)
        rules(self)

    return checked


def _check_fields(config: Any) -> None:
    for name, hint in _hints(type(config)):
        before = getattr(config, name)
        value = typed(hint, before, f"{type(config).__name__}.{name}")
        if value is not before:
            object.__setattr__(config, name, value)


@functools.cache
def _hints(kind: type) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(kind))


def typed(hint: Any, value: Any, name: str) -> Any:
    """A value converted to its declared type.

    Raises:
        UserError: it has another type, or is none of the choices.
    """
    kind, extra = (hint.__origin__, hint.__metadata__[0]) if typing.get_origin(hint) is Annotated else (hint, 31)
    value = extra(value) if callable(extra) else value
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    kind = _alternative(kind, value)
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        open_ended = members[-1] is Ellipsis
        if not isinstance(value, (list, tuple)) or not (open_ended or len(value) == len(members)):
            raise _wrong(hint, value, name)
        parts = [typed(members[0 if open_ended else i], part, name) for i, part in enumerate(value)]
        same = type(value) is tuple and all(a is b for a, b in zip(parts, value, strict=True))
        return value if same else tuple(parts)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(hint, value, name)
        key_kind, part_kind = members
        return {
            typed(key_kind, key, f"a name in {name}"): typed(part_kind, v, f"{name}.{key}") for key, v in value.items()
        }
    if origin is Literal:
        if not any(type(value) is type(member) and value == member for member in members):
            raise _wrong(hint, value, name)
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
        value = float(value)
    if not _is_instance(value, origin or kind) or (kind is int and isinstance(value, bool)):
        raise _wrong(hint, value, name)
    if kind is float and not abs(value) <= _LARGEST:
        raise UserError(f"{name} must be a finite number of float32 (below 3.4e38), got {value}.")
    bits = extra if isinstance(extra, int) else 31
    if kind is int and not -(2**bits) <= value < 2**bits:
        raise UserError(f"{name} must be below 2^{bits} = {2**bits:,}, got {shown(value)}.")
    return value


def _is_instance(value: Any, kind: Any) -> bool:
    try:
        return isinstance(value, kind)
    except TypeError:  # Any, a protocol, a type variable: types that cannot be checked here are left to the class
        return True


def _wrong(hint: Any, value: Any, name: str) -> UserError:
    several = " (a tuple)" if any(typing.get_origin(kind) is tuple for kind in alternatives(hint)) else ""
    meant = did_you_mean(value, choices(hint))
    return UserError(f"{name} must be {described(hint)}{several}, got {shown(value)}{meant}")


def _alternative(hint: Any, value: Any) -> Any:
    """The member of a union that a value matches, or a type that is not a union."""
    members = alternatives(hint)
    if value is None and type(None) in typing.get_args(hint):
        return type(None)
    sequence = isinstance(value, (list, tuple))
    return next((member for member in members if (typing.get_origin(member) is tuple) == sequence), members[0])


def alternatives(hint: object) -> tuple[Any, ...]:
    """The types in a union except None, or the one type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(kind for kind in typing.get_args(hint) if kind is not type(None))
    return (hint,)


def choices(hint: object) -> list[str]:
    """The words that a type allows."""
    literals = (kind for kind in alternatives(hint) if typing.get_origin(kind) is Literal)
    return [str(choice) for kind in literals for choice in typing.get_args(kind)]


_LARGEST = (2 - 2**-23) * 2.0**127
"""Of float32."""
_DESCRIBED = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object of fields",
}


def described(hint: object) -> str:
    """The allowed values of a type, for messages."""
    kinds = []
    for kind in alternatives(typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint):
        members = typing.get_args(kind)
        if typing.get_origin(kind) is Literal:
            kinds.append(f"one of {', '.join(choice or 'nothing' for choice in choices(kind))}")
        elif typing.get_origin(kind) is tuple:
            count = "" if members[-1] is Ellipsis else f"{len(members)} "
            kinds.append(f"{count}{described(members[0]).removeprefix('a ')}s")
        else:
            kinds.append(
                _DESCRIBED.get(typing.get_origin(kind) or kind) or f"of type {getattr(kind, '__name__', kind)}"
            )
    return ", or ".join(kinds)


def did_you_mean(value: object, known: list[str]) -> str:
    """The end of a sentence about an unknown value, with the most similar known one, if any."""
    near = difflib.get_close_matches(value, known, 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else "."


def shown(value: object) -> str:
    """A value for messages, shortened."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or a class whose own code fails
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def counted(number: int, noun: str) -> str:
    """A number of things, for messages.

    >>> counted(1, "text"), counted(1234, "pair")
    ('1 text', '1,234 pairs')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
