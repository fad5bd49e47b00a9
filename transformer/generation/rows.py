"""Computes any number of rows of any length in padded batches of similar length."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from transformer.trained import Trained

_BATCHES_AT_ONCE = 64  # this many batches of rows are sorted by length
_SHORTEST = 16  # rows are padded to a power of two, at least this one: few programs are compiled

Row = tuple[Int[np.ndarray, " n"], ...]
"""The parts of a row, each int32 with its own length."""


def computed_rows(
    run: Trained, compute: Callable[..., Any], rows: Iterator[Row], batch_size: int, limit: int
) -> Iterator[tuple[Row, Any]]:
    """Yield each row with its result, in order; rows of similar length are computed together.

    Args:
        run: a `Trained`; its devices share each batch.
        compute: `(model, params, lengths_PB, *parts)` -> arrays [B, ...]; parts are padded with 0 at their ends.
        rows: all with the same number of parts.
        batch_size: B.
        limit: parts are padded to a power of two, but not beyond this; 0 means no bound.
    """
    while some := list(itertools.islice(rows, _BATCHES_AT_ONCE * batch_size)):
        found: list[Any] = [None] * len(some)
        order = sorted(range(len(some)), key=lambda index, some=some: sum(map(len, some[index])))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            columns = list(zip(*(some[index] for index in chosen), strict=True))
            lengths_PB = np.zeros((len(columns), batch_size), np.int32)
            lengths_PB[:, : len(chosen)] = [list(map(len, parts)) for parts in columns]
            padded = (run.place(_padded(parts, batch_size, limit)) for parts in columns)
            results = jax.device_get(compute(run.model, run.params, lengths_PB, *padded))
            for row, index in enumerate(chosen):  # the last rows are padding
                found[index] = jax.tree.map(lambda x, row=row: x[row], results)
        yield from zip(some, found, strict=True)


def _padded(parts: Sequence[np.ndarray], rows: int, limit: int) -> Int[np.ndarray, "B T"]:
    """Parts of rows in one array, padded with 0 at their ends and in further rows."""
    longest = max(map(len, parts))
    length = max(_SHORTEST, 1 << (longest - 1).bit_length())
    if limit:
        length = min(length, max(limit, longest))
    padded_BT = np.zeros((rows, length), np.int32)
    for row, part in enumerate(parts):
        padded_BT[row, : len(part)] = part
    return padded_BT


def segment_ids_of(lengths_B: Int[Array, " B"], tokens_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """1 for tokens, 0 for the padding after them."""
    return (jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]).astype(jnp.int32)
