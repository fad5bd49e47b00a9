"""Rows of a table by id: a wrong id is refused where its value is known, and gives NaN in compiled code."""

from collections.abc import Iterable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from transformer.types import Array, Ids, PyTree, Sizes
from transformer.validation import require

_TOKENS = Ids("", None, 0)


def check_ids(ids: object, size: int, what: str = "the input", like: Ids = _TOKENS) -> None:
    """Raise UserError if an id is outside 0 ... size - 1.

    Only known values are checked: not tracers, and not arrays that are partly held by other processes. `what` names the holder
    of the ids in messages, such as "prompt 3"; `like` names their kind and limit, by default tokens.
    """
    if isinstance(ids, Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_addressable):
        return
    known = np.asarray(ids)
    require(np.issubdtype(known.dtype, np.integer), f"{like.kind} must be integers, {what} holds {known.dtype}.")
    low, high = (int(known.min()), int(known.max())) if known.size else (0, 0)
    rule = f"{like.kind} must be at least 0 and below {like.limit}={size}, {what} holds {low} to {high}"
    require(low >= 0 and high < size, f"{rule}{like.remedy}.")


def look_up(table: Float[jax.Array, "V D"], ids: Int[jax.Array, "*B"]) -> Float[jax.Array, "*B D"]:
    """The rows of a table. An id outside the table, a negative one too, gives NaN, which no loss or sample can hide.

    Such an id adds nothing to the gradient.

    >>> jax.jit(lambda ids: look_up(jnp.array([[1.0], [2.0]]), ids))(jnp.array([1, -1, 2]))[:, 0].tolist()
    [2.0, nan, nan]
    """
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def token_rows(sequences: Iterable[Array], size: int, what: str) -> list[Int[np.ndarray, " n"]]:
    """Sequences of tokens as int32 rows; UserError if one is empty, or holds anything but ids below `size`."""
    rows = [np.asarray(sequence) for sequence in sequences]
    for index, row in enumerate(rows):
        rule = f"Every {what} must be a sequence of one token or more, {what} {index} has shape {row.shape}"
        require(row.ndim == 1 and len(row) > 0, f"{rule}; start it with the end-of-text token.")
        check_ids(row, size, f"{what} {index}")
    return [row.astype(np.int32) for row in rows]


def number_runs(ids_BT: Array, numpy: ModuleType = jnp) -> Array:
    """Segment ids with padding (0) renumbered as one more document, after the row's others; `numpy` is the array's library."""
    return numpy.where(ids_BT == 0, ids_BT.max(axis=1, keepdims=True) + 1, ids_BT)


def are_in_order(ids_BT: Array, most: int, numpy: ModuleType = jnp) -> Array:
    """Whether the ids of each row satisfy `AttentionMask.max_segments=most`, bool [B].

    >>> are_in_order(np.array([[1, 1, 2, 0], [1, 0, 2, 2], [0, 0, 0, 0]]), 2, np).tolist()
    [True, False, True]
    """
    numbers_BT = number_runs(ids_BT, numpy)
    steps_BT = numpy.diff(numbers_BT, axis=1)
    return (numbers_BT[:, 0] == 1) & ((steps_BT == 0) | (steps_BT == 1)).all(axis=1) & (ids_BT.max(axis=1) <= most)


def check_segments(ids: object, most: int, what: str) -> None:
    """Raise UserError unless the ids of each row satisfy `AttentionMask.max_segments`; traced ids are not checked."""
    if isinstance(ids, Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_addressable):
        return
    known = np.asarray(ids)
    kept = are_in_order(known, most, np)
    row = int(np.argmin(kept))
    require(
        bool(kept.all()),
        f"Segment ids must be 1, 2, ... in order, at most {most}, with padding (0) at a row's end, as the model is promised, "
        f"{what} hold {list(dict.fromkeys(known[row].tolist()))} in row {row}; number the documents of each row anew, or promise "
        "nothing (Objective.max_segments, or data.max_segments=0 for running text).",
    )


def check_batch_ids(sizes: Sizes, batch: PyTree, max_segments: int = 0) -> PyTree:
    """The batch itself; UserError if the model cannot take it.

    Refused are ids that the model does not have (in tokens, and in targets with a weight other than 0) and segment ids that
    do not satisfy `max_segments`. For the host: a compiled step cannot refuse a batch, and gives NaN.
    """
    for name in ("segment_ids", "source_segment_ids") if max_segments else ():
        if (ids := getattr(batch, name, None)) is not None:
            check_segments(ids, max_segments, f"the batch's {name}")
    for part in batch.ids(sizes) if hasattr(batch, "ids") else ():
        values, what = part.values, f"the batch's {part.name}"
        if part.weights is not None:
            values, what = np.asarray(values)[np.asarray(part.weights) != 0], f"{what} with a weight"
        check_ids(values, part.size, what, part)
    return batch
