"""Agreement between the processes of a run on several hosts."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from transformer.types import UserError


def largest_over_processes(number: int) -> int:
    """The maximum over all processes; all processes must call it."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.asarray(number))))


def merged_over_processes(state: dict[str, Any]) -> dict[str, Any]:
    """The union of the JSON objects of all processes, the same in each; all processes must call it."""
    if jax.process_count() == 1:
        return state
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.asarray(text.size))))
    # Trailing blanks after a JSON text are harmless.
    padded = np.pad(text, (0, longest - text.size), constant_values=ord(" "))
    merged: dict[str, Any] = {}
    for row in np.asarray(multihost_utils.process_allgather(padded)):
        merged = merge(merged, json.loads(row.tobytes()))
    return merged


def made_by_first(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A JSON object made by process 0, for every process; all processes must call it.

    Raises:
        UserError: process 0 failed to make it; raised in every process.
    """
    if jax.process_count() == 1:
        return make()
    made: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            made = {"made": make()}
        except UserError as error:
            made = {"error": str(error)}
    text = np.frombuffer(json.dumps(made).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(text.size)))
    text = text if jax.process_index() == 0 else np.zeros(size, np.uint8)
    given = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).astype(np.uint8).tobytes())
    if "error" in given:
        raise UserError(given["error"])
    return given["made"]


def merge(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """The union of two nested dictionaries.

    Raises:
        ValueError: both hold the same entry with different values.

    Example:
        >>> merge({"step": 3, "streams": {"0": 5}}, {"step": 3, "streams": {"1": 7}})
        {'step': 3, 'streams': {'0': 5, '1': 7}}
    """
    merged = dict(left)
    for name, value in right.items():
        if name in merged and isinstance(merged[name], dict) and isinstance(value, dict):
            merged[name] = merge(merged[name], value)
        elif merged.setdefault(name, value) != value:
            raise ValueError(f"Processes must agree on {name!r}, got {merged[name]!r} and {value!r}.")
    return merged
