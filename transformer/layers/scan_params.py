"""Parameters of a looped stack as those of a scanned one, and back."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def scan_params(
    params: Any, pattern_length: int = 1, *, stack: Callable[[Sequence[Any]], Any] = lambda leaves: jnp.stack(leaves)
) -> Any:
    """Parameters (or anything that holds trees like theirs, such as a state) of a looped model as those of a scanned one.

    Args:
        params: a tree with one or more stacks in it.
        pattern_length: blocks of the model's pattern.
        stack: makes one leaf of those of successive layers.
    """

    def stacked(blocks: dict[str, Any]) -> dict[str, Any]:
        return {
            f"block_{index}": jax.tree.map(
                lambda *layers: stack(layers),
                *(blocks[f"block_{layer}"] for layer in range(index, len(blocks), pattern_length)),
            )
            for index in range(pattern_length)
        }

    return _convert(params, stacked)


def loop_params(params: Any, *, take: Callable[[Any, int], Any] = lambda leaf, period: leaf[period]) -> Any:
    """The inverse of `scan_params`: parameters of a scanned model as those of a looped one.

    Args:
        params: a tree with one or more stacks in it.
        take: makes the leaf of one period of a leaf of all.
    """

    def unstacked(blocks: dict[str, Any]) -> dict[str, Any]:
        num_periods = jax.tree.leaves(blocks)[0].shape[0]
        return {
            f"block_{period * len(blocks) + index}": jax.tree.map(
                lambda x, p=period: take(x, p), blocks[f"block_{index}"]
            )
            for period in range(num_periods)
            for index in range(len(blocks))
        }

    return _convert(params, unstacked)


def _convert(params: Any, convert_blocks: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Replace every `blocks` entry in a tree of dictionaries and tuples."""
    if isinstance(params, tuple):
        parts = [_convert(part, convert_blocks) for part in params]
        return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)
    if not isinstance(params, dict):
        return params
    return {
        name: convert_blocks(part) if name == "blocks" and part else _convert(part, convert_blocks)
        for name, part in params.items()
    }
