"""Checks that raise `UserError` with the invariant and the value."""

import dataclasses
from typing import Any

from transformer.types import UserError


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_range(config: Any, low: float, high: float, *names: str) -> None:
    """`low <= value` and `value < high` for each field of `config`."""
    for name in names:
        value = getattr(config, name)
        require(
            low <= value < high,
            f"{type(config).__name__}.{name} must be at least {low:g} and below {high:g}, got {value}.",
        )


def require_int32(config: Any, *, exempt: tuple[str, ...] = ()) -> None:
    """Every integer of a config, in tuples too, is of JAX's default type, between -2^31 and 2^31 - 1, but for exempt fields."""
    for field in dataclasses.fields(config):
        if field.name in exempt:
            continue
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            require(
                not isinstance(number, int) or -(2**31) <= number < 2**31,
                f"{type(config).__name__}.{field.name} must be below 2^31 = 2,147,483,648, got {number}.",
            )


def require_at_least(config: Any, low: float, *names: str) -> None:
    """`low <= value` for each field of `config`."""
    for name in names:
        value = getattr(config, name)
        require(value >= low, f"{type(config).__name__}.{name} must be at least {low:g}, got {value}.")
