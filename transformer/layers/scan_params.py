"""Parameters of a looped stack as those of a scanned one, and back."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def is_scanned(params: Any) -> bool:
    """Whether parameters are of a scanned model: its projections of queries have an axis of layers beside D, H and K."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return any(x.ndim == 4 for path, x in paths if jax.tree_util.keystr(path).endswith("['query']['kernel']"))


def scan_params(
    params: Any, pattern_length: int = 1, *, stack: Callable[[Sequence[Any]], Any] = lambda leaves: jnp.stack(leaves)
) -> Any:
    """Parameters (or anything that holds trees like theirs, such as a state) of a looped model as those of a scanned one.

    Args:
        params: a tree with one or more stacks in it.
        pattern_length: blocks of the model's pattern.
        stack: makes one leaf of those of successive layers.
    """

    def stacked(blocks: dict[str, Any], _: str) -> dict[str, Any]:
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

    periods: dict[str, int] = {}

    def count(blocks: dict[str, Any], stack: str) -> dict[str, Any]:
        # An optimizer's tree may have no moments in its blocks, all frozen; the parameters have.
        for x in jax.tree.leaves(blocks)[:1]:
            periods[stack] = x.shape[0]
        return blocks

    def unstacked(blocks: dict[str, Any], stack: str) -> dict[str, Any]:
        return {
            f"block_{period * len(blocks) + index}": jax.tree.map(
                lambda x, p=period: take(x, p), blocks[f"block_{index}"]
            )
            for period in range(periods[stack])
            for index in range(len(blocks))
        }

    _convert(params, count)
    return _convert(params, unstacked)


def _convert(params: Any, convert_blocks: Callable[[dict[str, Any], str], dict[str, Any]], name: str = "") -> Any:
    """Replace every `blocks` entry in a tree of dictionaries and tuples; the converter is told the name of what it is in."""
    if isinstance(params, tuple):
        parts = [_convert(part, convert_blocks) for part in params]
        return type(params)(*parts) if hasattr(params, "_fields") else tuple(parts)
    if not isinstance(params, dict):
        return params
    return {
        key: convert_blocks(part, name) if key == "blocks" and part else _convert(part, convert_blocks, key)
        for key, part in params.items()
    }
