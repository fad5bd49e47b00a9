"""The number of pairs of a query and a visible key, from the static part of a mask."""

import functools
import math
import re
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from transformer.ops.masks import AttentionMask, BlockPattern
from transformer.types import Array

_MARK = re.compile(r"attention of a row: (\S+) of (\d+) pairs, (\d+) queries, widths (\d+) and (\d+)")


def mark_attention(mask: AttentionMask, query_BTHK: Array, key_BSGK: Array, value_BSGK: Array) -> str:
    """A name for the result of attention that describes the call in a traced program (`read_mark`)."""
    T, S = query_BTHK.shape[1], key_BSGK.shape[1]
    widths = f"{key_BSGK.shape[-1]} and {value_BSGK.shape[-1]}"
    return f"attention of a row: {visible_pairs(mask, T, S)} of {T * S} pairs, {T} queries, widths {widths}"


def read_mark(equation: JaxprEqn) -> tuple[float, float] | None:
    """Operations of attention's two products over the visible pairs, and over all pairs; None for other equations."""
    found = _MARK.fullmatch(equation.params["name"]) if equation.primitive.name == "name" else None
    if found is None:
        return None
    pairs, whole, queries, key_width, value_width = map(float, found.groups())
    out: Any = equation.outvars[0].aval  # declared without a shape
    heads = math.prod(out.shape) / max(queries * value_width, 1)  # over all rows
    each = 2.0 * heads * (key_width + value_width)
    return each * pairs, each * whole


def visible_pairs(mask: AttentionMask, num_queries: int, num_keys: int) -> float:
    """Pairs of one row in which the query sees the key, by the mask's static fields.

    Conditions that depend on data (segments, padding and lengths) are assumed to hide nothing. If positions depend on data
    (`query_offset`: a Transformer-XL memory, a cache), the queries are taken to be the last keys. A prefix is assumed to have
    any length below the row's with equal probability, as `prefix_lm` draws it: two thirds of a long row's pairs are visible.

    >>> visible_pairs(AttentionMask(causal=True), 4, 4), visible_pairs(AttentionMask(causal=True, window=2), 4, 4)
    (10.0, 7.0)
    """
    offset = num_keys - num_queries if mask.query_offset is not None else 0
    return _count(mask.causal, mask.window, mask.pattern, mask.key_prefix is not None, num_queries, num_keys, offset)


@functools.lru_cache(maxsize=1024)
def _count(
    causal: bool,
    window: int,
    pattern: BlockPattern | None,
    has_prefix: bool,
    num_queries: int,
    num_keys: int,
    offset: int,
) -> float:
    queries_T, keys_S = np.arange(num_queries) + offset, np.arange(num_keys)
    low_T, high_T = np.zeros(num_queries, np.int64), np.full(num_queries, num_keys)
    if window > 0:
        low_T = np.clip(queries_T - window + 1, 0, num_keys)
        high_T = np.clip(queries_T + window, 0, num_keys)
    # Keys up to this index are visible; later ones only if they belong to the prefix.
    now_T = np.clip(queries_T + 1, low_T, high_T) if causal else high_T
    in_prefix_S = (num_keys - 1 - keys_S) / num_keys if has_prefix else np.zeros(num_keys)
    unit = max(1, num_queries + offset) if pattern is None else pattern.block_size
    total = 0.0
    for block in np.unique(queries_T // unit):
        rows = queries_T // unit == block
        seen_S = np.ones(num_keys, bool) if pattern is None else pattern.sees(block, keys_S // unit)
        keys, prefix = (np.concatenate([[0], np.cumsum(seen_S * share)]) for share in (np.ones(num_keys), in_prefix_S))
        low, now, high = low_T[rows], now_T[rows], high_T[rows]
        total += float(np.sum(keys[now] - keys[low]) + np.sum(prefix[high] - prefix[now]))
    return total
