"""Conversion of parameters between looped and scanned stacks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transformer.types import PyTree


def is_scanned(params: PyTree) -> bool:
    """Whether parameters belong to a scanned model: its query projections have an axis of layers besides D, H and K."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return any(x.ndim == 4 for path, x in paths if jax.tree_util.keystr(path).endswith("['query']['kernel']"))


def scan_params(
    params: PyTree,
    pattern_length: int = 1,
    num_first: int = 0,
    *,
    stack: Callable[[Sequence[Any]], Any] = lambda leaves: jnp.stack(leaves),
) -> PyTree:
    """Convert a looped model's parameters, or a tree that contains such trees (a state), to a scanned model's.

    Args:
        params: a tree with one or more stacks in it.
        pattern_length: blocks of the model's pattern.
        num_first: blocks before it (`ModelConfig.first`).
        stack: combines the leaves of successive layers into one.
    """

    def scanned(parts: dict[str, Any], _: str) -> dict[str, Any]:
        layers = _layers(parts["blocks"])
        end = len(layers) - (len(layers) - num_first) % pattern_length
        periods = [
            jax.tree.map(lambda *leaves: stack(leaves), *layers[num_first + index : end : pattern_length])
            for index in range(pattern_length)
        ]
        found = {"first": layers[:num_first], "blocks": periods, "last": layers[end:]}
        return {name: _named(blocks) for name, blocks in found.items() if blocks}

    return _convert(params, scanned)


def loop_params(params: PyTree, *, take: Callable[[Any, int], Any] = lambda leaf, period: leaf[period]) -> PyTree:
    """The inverse of `scan_params`: convert a scanned model's parameters to a looped one's.

    Args:
        params: a tree with one or more stacks in it.
        take: extracts the leaf of one period from the combined leaf.
    """

    periods: dict[str, int] = {}

    def count(parts: dict[str, Any], stack: str) -> dict[str, Any]:
        # The tree of an optimizer may lack moments in fully frozen blocks; the parameters are complete.
        for x in jax.tree.leaves(parts["blocks"])[:1]:
            periods[stack] = x.shape[0]
        return parts

    def looped(parts: dict[str, Any], stack: str) -> dict[str, Any]:
        pattern = _layers(parts["blocks"])
        middle = [jax.tree.map(lambda x, p=p: take(x, p), block) for p in range(periods[stack]) for block in pattern]
        return {"blocks": _named([*_layers(parts.get("first", {})), *middle, *_layers(parts.get("last", {}))])}

    _convert(params, count)
    return _convert(params, looped)


def _layers(blocks: dict[str, Any]) -> list[Any]:
    return [blocks[f"block_{index}"] for index in range(len(blocks))]


def _named(layers: Sequence[Any]) -> dict[str, Any]:
    return {f"block_{index}": layer for index, layer in enumerate(layers)}


_PARTS = ("first", "blocks", "last")


def _convert(params: Any, convert: Callable[[dict[str, Any], str], dict[str, Any]], name: str = "") -> Any:
    """Replace the parts of each stack in a tree of dictionaries and tuples; the converter also gets the stack's name."""
    if isinstance(params, tuple):
        parts = [_convert(part, convert) for part in params]
        return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)
    if not isinstance(params, dict):
        return params
    if params.get("blocks"):
        rest = {key: part for key, part in params.items() if key not in _PARTS}
        return convert({key: params[key] for key in _PARTS if key in params}, name) | rest
    return {key: _convert(part, convert, key) for key, part in params.items()}
