"""Checks that raise `UserError` with the invariant and the value."""

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


def require_at_least(config: Any, low: float, *names: str) -> None:
    """`low <= value` for each field of `config`."""
    for name in names:
        value = getattr(config, name)
        require(value >= low, f"{type(config).__name__}.{name} must be at least {low:g}, got {value}.")
