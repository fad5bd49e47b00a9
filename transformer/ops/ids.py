"""Rows of a table by their ids: a wrong id is refused where it is known, and gives NaN in compiled code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from transformer.validation import require


def check_ids(ids: Any, size: int, what: str = "the input", *, kind: str = "Tokens", limit: str = "vocab_size") -> None:
    """Raise UserError if an id is known, in Python or in an array that is not traced, and outside 0 ... size - 1.

    Args:
        ids: integers in any shape; nothing is checked of a tracer, nor of an array of which other processes hold a part.
        size: of the table.
        what: holds them, such as "prompt 3".
        kind: of ids they are.
        limit: name of the setting that is the size.
    """
    if isinstance(ids, Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_addressable):
        return
    known = np.asarray(ids)
    if known.size == 0:
        return
    require(
        np.issubdtype(known.dtype, np.integer),
        f"{kind} must be integers, {what} holds {known.dtype}.",
    )
    low, high = int(known.min()), int(known.max())
    remedy = "; encode it with the model's own tokenizer" if kind == "Tokens" else ""
    require(
        low >= 0 and high < size,
        f"{kind} must be at least 0 and below {limit}={size}, {what} holds {low} to {high}{remedy}.",
    )


def look_up(table: Float[Array, "V D"], ids: Int[Array, "*B"], **names: str) -> Float[Array, "*B D"]:
    """The rows of a table; of an id outside it, negative ones too, NaN, which no loss or sample can hide.

    The gradient of such a row is dropped. The names are those of `check_ids`.

    Raises:
        UserError: an id that is not traced is outside the table.

    >>> jax.jit(lambda ids: look_up(jnp.array([[1.0], [2.0]]), ids))(jnp.array([1, -1, 2]))[:, 0].tolist()
    [2.0, nan, nan]
    """
    check_ids(ids, len(table), **names)
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def token_rows(sequences: Any, size: int, what: str) -> list[Int[np.ndarray, " n"]]:
    """Sequences of tokens as int32 rows, for a model with a vocabulary of `size`.

    Raises:
        UserError: one is empty, or holds anything but ids below `size`.
    """
    rows = [np.asarray(sequence) for sequence in sequences]
    for index, row in enumerate(rows):
        require(
            row.ndim == 1 and len(row) > 0,
            f"Every {what} must be a sequence of one token or more, {what} {index} has shape {row.shape}; start it with the "
            "end-of-text token.",
        )
        check_ids(row, size, f"{what} {index}")
    return [row.astype(np.int32) for row in rows]
