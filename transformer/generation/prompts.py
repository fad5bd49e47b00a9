"""Inputs of generation: rows without padding, and ids that end a row."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from transformer.validation import require


def unpad(tokens_BT: ArrayLike, mask_BT: ArrayLike) -> list[Int[np.ndarray, " n"]]:
    """The rows of a padded batch without their padding on the left or right; for prompts or sources.

    Args:
        tokens_BT: int [B, T].
        mask_BT: bool or 0 and 1 [B, T], the attention mask of other libraries: 0 is padding.

    Raises:
        UserError: shapes differ, or a row has only padding or padding between tokens.

    >>> [row.tolist() for row in unpad([[0, 0, 5], [7, 8, 9]], [[0, 0, 1], [1, 1, 1]])]
    [[5], [7, 8, 9]]
    """
    tokens_BT, mask_BT = np.asarray(tokens_BT), np.asarray(mask_BT)
    require(
        tokens_BT.ndim == 2 and tokens_BT.shape == mask_BT.shape,
        f"Tokens and their mask must have one shape [B, T], got {tokens_BT.shape} and {mask_BT.shape}.",
    )
    require(bool(np.isin(mask_BT, (0, 1)).all()), "A mask must be 1 for tokens and 0 for padding, got other values.")
    rows = []
    for index, (tokens_T, mask_T) in enumerate(zip(tokens_BT, mask_BT, strict=True)):
        columns = np.flatnonzero(mask_T)
        require(len(columns) > 0, f"Every row must have a token, row {index} has only padding; remove it.")
        first, end = int(columns[0]), int(columns[-1]) + 1
        require(
            end - first == len(columns),
            f"Padding must be on the left or right, row {index} has padding between tokens; move it to one side.",
        )
        rows.append(tokens_T[first:end])
    return rows


def end_ids(end_of_text: int | Sequence[int], vocab_size: int) -> Int[np.ndarray, " E"]:
    """The ids that end a row, int32 [E]; -1 is never drawn.

    >>> end_ids((3, 5), vocab_size=11).tolist()
    [3, 5]
    """
    ids_E = np.atleast_1d(np.asarray(end_of_text))
    require(
        len(ids_E) > 0
        and np.issubdtype(ids_E.dtype, np.integer)
        and bool(((ids_E >= -1) & (ids_E < vocab_size)).all()),
        f"end_of_text must be a token below vocab_size={vocab_size}, several of them, or -1 for none, got {end_of_text}.",
    )
    return ids_E.astype(np.int32)
